"""The backends this machine has, fastest first, and the choice between them."""

from __future__ import annotations

import warnings

import torch

from endor.errors import KernelError
from endor.kernels.backend import Backend
from endor.kernels.native_backend import native_backends
from endor.kernels.reference import ReferenceBackend
from endor.kernels.triton_backend import triton_backends

__all__ = ["active_backend", "backends", "choose"]

_BACKENDS: dict[str, Backend] = {
    b.name: b for b in (*native_backends(), *triton_backends(), ReferenceBackend())
}
_CPU = torch.device("cpu")


def backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, fastest first; each is accepted as `backend=`."""
    return tuple(_BACKENDS)


def active_backend(device: torch.device | str = "cpu", *, codec: str = "raw") -> str:
    """Name of the backend that `decode` uses on `device`, instruction set included (`native-avx512`)."""
    return choose(None, codec, torch.device(device)).name


def choose(name: str | None, codec: str, device: torch.device) -> Backend:
    """The backend called `name`, or the fastest that can run `codec` on `device`. Raises KernelError."""
    if name is not None:
        return _named(name, codec, device)
    for backend in _BACKENDS.values():
        if backend.supports(codec, device) and backend.is_default_on(device):
            if device == _CPU and backend.name == "reference":
                _warn_slow()
            return backend
    raise KernelError(f"no backend can run codec {codec} on {device}")


def _named(name: str, codec: str, device: torch.device) -> Backend:
    if name not in _BACKENDS:
        raise KernelError(f"unknown backend {name!r}; this machine has {', '.join(_BACKENDS)}")
    backend = _BACKENDS[name]
    if not backend.supports(codec, device):
        raise KernelError(f"backend {name} cannot run codec {codec} on {device}")
    return backend


def _warn_slow() -> None:
    """Once per process (`warnings` shows a message of one line of code once)."""
    warnings.warn(
        "the native extension of Endor is not installed: encoding and decoding run in plain torch, about "
        "fifty times slower. Install a C++ compiler and reinstall endor-offload",
        RuntimeWarning,
        stacklevel=2,
    )

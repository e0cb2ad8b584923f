"""The one way in: check the request, choose a backend, run it.

A backend is chosen by name or, by default, as the fastest that supports the codec and the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.codecs import CODECS
from endor.formats.packed import DENSE_SECTION, MASKS, PackedTensor, TensorLayout
from endor.kernels.backend import Backend, rows_of
from endor.kernels.native_backend import native_backends
from endor.kernels.reference import ReferenceBackend

__all__ = ["active_backend", "backends", "decode", "decode_rows", "encode"]

_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (*native_backends(), ReferenceBackend())}
"""Fastest first."""


def backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, fastest first; each is accepted as `backend=`."""
    return tuple(_BACKENDS)


def active_backend(device: torch.device | str = "cpu", *, codec: str = "raw") -> str:
    """Name of the backend that `decode` uses on `device`, instruction set included (`native-avx512`)."""
    return _choose(None, codec, torch.device(device)).name


def encode(
    weight: Tensor, *, values: str = "raw", mask: str = "bitmap", backend: str | None = None
) -> PackedTensor:
    """Pack `weight` bit-exactly.

    Args:
        weight: any rank >= 1 and any strides; not changed, not kept.
        values: name of the values codec.
        mask: `bitmap` keeps the elements whose bits are not all zero; `dense` keeps all.
        backend: one of `backends()`; the fastest one by default.

    Raises KernelError where mask, codec, dtype and backend do not go together.
    """
    if values not in CODECS or mask not in MASKS or not CODECS[values].supports(weight.dtype, mask):
        raise KernelError(f"cannot encode {weight.dtype} with values {values!r} and mask {mask!r}")
    source = weight.detach().contiguous()
    if mask == "dense" and values == "raw":
        layout = TensorLayout(tuple(source.shape), source.dtype, "dense", "raw", source.numel())
        copied = source.data_ptr() != weight.data_ptr()
        return PackedTensor(layout, {DENSE_SECTION: source if copied else source.clone()})
    return _choose(backend, values, source.device).encode(source, values)


def decode(packed: PackedTensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The dense tensor that `packed` stands for, bit for bit.

    Args:
        packed: contents may come from a file: whatever they say, nothing outside the sections is touched.
        out: contiguous tensor of the layout's shape and dtype to write to; a new one by default.
        backend: one of `backends()`; the fastest one by default.

    Raises FormatError where the contents contradict each other (then `out` is undefined), KernelError for an `out`
    or a backend that does not fit.
    """
    layout = packed.layout
    if out is None:
        out = torch.empty(layout.shape, dtype=layout.dtype, device=packed.device)
    else:
        _check_out(out, layout.shape, packed)
    if layout.is_plain:
        return out.copy_(packed.sections[DENSE_SECTION])
    _choose(backend, layout.codec, packed.device).decode(packed, 0, layout.geometry.row_blocks, out)
    return out


def decode_rows(
    packed: PackedTensor, start_block: int, stop_block: int, out: Tensor, *, backend: str | None = None
) -> Tensor:
    """Decode row blocks [start_block, stop_block), each of `layout.geometry.row_block` rows, to `out` [rows, cols].

    Only the blocks that are decoded are checked. Raises as `decode` does.
    """
    layout = packed.layout
    if not 0 <= start_block <= stop_block <= layout.geometry.row_blocks:
        raise KernelError(f"row blocks {start_block} to {stop_block} of {layout.geometry.row_blocks} do not exist")
    rows = rows_of(layout, start_block, stop_block)
    _check_out(out, (len(rows), layout.geometry.cols), packed)
    if layout.is_plain:
        dense = packed.sections[DENSE_SECTION].view(layout.geometry.rows, layout.geometry.cols)
        return out.copy_(dense[rows.start : rows.stop])
    _choose(backend, layout.codec, packed.device).decode(packed, start_block, stop_block, out)
    return out


def _check_out(out: Tensor, shape: tuple[int, ...], packed: PackedTensor) -> None:
    if (
        out.shape != shape
        or out.dtype != packed.layout.dtype
        or out.device != packed.device
        or not out.is_contiguous()
    ):
        raise KernelError(
            f"out must be a contiguous {packed.layout.dtype} tensor of shape {list(shape)} on {packed.device}, "
            f"found {out.dtype}{list(out.shape)} with strides {list(out.stride())} on {out.device}"
        )


def _choose(name: str | None, codec: str, device: torch.device) -> Backend:
    if name is None:
        for backend in _BACKENDS.values():
            if backend.supports(codec, device):
                return backend
        raise KernelError(f"no backend can run codec {codec} on {device}")
    if name not in _BACKENDS:
        raise KernelError(f"unknown backend {name!r}; this machine has {', '.join(_BACKENDS)}")
    if not _BACKENDS[name].supports(codec, device):
        raise KernelError(f"backend {name} cannot run codec {codec} on {device}")
    return _BACKENDS[name]

"""The Triton kernels as a backend for CUDA (and ROCm) tensors; Triton itself is imported when one is decoded.

Under `TRITON_INTERPRET=1`, Triton's own switch for debugging, the same kernels run on CPU tensors in numpy:
the tests use that. It is slow, so it never is a default.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from endor.formats.packed import PackedTensor
from endor.kernels.backend import Backend
from endor.kernels.reference import ReferenceBackend
from endor.kernels.triton_mode import is_interpreted

__all__ = ["TritonBackend", "triton_backends"]

_CODECS = ("raw", "exponent", "int8", "int4")
_REFERENCE = ReferenceBackend()


class TritonBackend(Backend):
    """Decodes on the device that the sections are on; encoding, which is offline work, is plain torch."""

    name = "triton"

    def supports(self, codec: str, device: torch.device) -> bool:
        return codec in _CODECS and device.type == ("cpu" if is_interpreted() else "cuda")

    def is_default_on(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def encode(self, weight: Tensor, codec: str, *, mask: str = "bitmap") -> PackedTensor:
        return _REFERENCE.encode(weight, codec, mask=mask)

    def decode(self, packed: PackedTensor, start_block: int, stop_block: int, out: Tensor) -> None:
        """As `Backend.decode`; waits for the device, because damage is an exception here.

        `endor.kernels.triton_launch` has what does not wait.
        """
        from endor.kernels import triton_launch

        if out.numel() == 0 or triton_launch.launch_is_impossible(packed.layout):
            _REFERENCE.decode(packed, start_block, stop_block, out)
            return
        status = triton_launch.new_status(out.device)
        triton_launch.launch_decode(packed, start_block, stop_block, out, status)
        triton_launch.raise_for(status)


def triton_backends() -> tuple[TritonBackend, ...]:
    """The backend, where Triton is installed and has something to run on."""
    if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or is_interpreted()):
        return ()
    return (TritonBackend(),)

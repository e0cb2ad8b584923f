"""Memory that weights are decoded into and that is used again and again: one buffer per thread."""

from __future__ import annotations

import threading

import torch

from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.dispatch import decode

__all__ = ["ThreadScratch"]


class ThreadScratch:
    """Decodes into memory that the same thread reuses; its next call overwrites what it returned.

    Fresh memory for each weight takes three times as long where the allocator maps it anew each time, as
    glibc does above 32 MiB. With one buffer for all threads, two that run the model would overwrite each
    other's weights.
    """

    def __init__(self) -> None:
        self._buffers = threading.local()

    def decode(self, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense tensor in `dtype`, valid until the thread's next call. Raises FormatError for damage."""
        layout = packed.layout
        if packed.device.type != "cpu":  # torch keeps the memory of other devices for reuse itself
            return decode(packed).to(dtype)
        dense = decode(packed, out=self._shaped("stored", layout, layout.dtype))
        return dense if dtype == layout.dtype else self._shaped("cast", layout, dtype).copy_(dense)

    def _shaped(self, use: str, layout: TensorLayout, dtype: torch.dtype) -> torch.Tensor:
        nbytes = layout.geometry.numel * dtype.itemsize
        buffer = vars(self._buffers).get(use)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._reserve(use, nbytes)
        return buffer[:nbytes].view(dtype).view(layout.shape)

    def _reserve(self, use: str, nbytes: int) -> torch.Tensor:
        """Give this thread a buffer of at least `nbytes`."""
        buffer = self._allocate(nbytes)
        setattr(self._buffers, use, buffer)
        return buffer

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

"""Memory that weights are decoded into and that is used again and again: one buffer per thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from endor.formats.packed import PackedTensor
from endor.kernels.backend import rows_of
from endor.kernels.dispatch import decode, decode_rows

__all__ = ["ThreadScratch"]


class ThreadScratch:
    """Decodes into memory that the same thread reuses; its next call overwrites what it returned.

    Fresh memory for each weight takes three times as long where the allocator maps it anew each time, as
    glibc does above 32 MiB. With one buffer for all threads, two that run the model would overwrite each
    other's weights.
    """

    status = None
    """Damage is an exception of the call that meets it."""

    def __init__(self) -> None:
        self._buffers = threading.local()

    def decode(self, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense tensor in `dtype`, valid until the thread's next call. Raises FormatError for damage."""
        layout = packed.layout
        if packed.device.type != "cpu":  # torch keeps the memory of other devices for reuse itself
            return decode(packed).to(dtype)
        return self._cast(decode(packed, out=self._shaped("stored", layout.shape, layout.dtype)), dtype)

    def decode_rows(
        self, packed: PackedTensor, start_block: int, stop_block: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Row blocks [start_block, stop_block) of a weight on the CPU in `dtype`, [rows, columns], valid
        until the thread's next call. Raises FormatError for damage."""
        tile = self._rows(packed, start_block, stop_block)
        return self._cast(decode_rows(packed, start_block, stop_block, tile), dtype)

    def _rows(self, packed: PackedTensor, start_block: int, stop_block: int) -> torch.Tensor:
        """Memory for some row blocks."""
        layout = packed.layout
        shape = (len(rows_of(layout, start_block, stop_block)), layout.geometry.cols)
        return self._shaped("stored", shape, layout.dtype)

    def _cast(self, dense: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return dense if dtype == dense.dtype else self._shaped("cast", dense.shape, dtype).copy_(dense)

    def _shaped(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = vars(self._buffers).get(use)
        if buffer is None or buffer.numel() < nbytes:
            buffer = self._reserve(use, nbytes)
        return buffer[:nbytes].view(dtype).view(torch.Size(shape))

    def _reserve(self, use: str, nbytes: int) -> torch.Tensor:
        """Give this thread a buffer of at least `nbytes`."""
        buffer = self._allocate(nbytes)
        setattr(self._buffers, use, buffer)
        return buffer

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

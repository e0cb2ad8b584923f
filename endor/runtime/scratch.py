"""One buffer that every decode of a model writes to, as large as its largest weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.dispatch import decode
from endor.loaders import StagingPool
from endor.runtime.stats import StatsRecorder

__all__ = ["DecodeScratch"]


class DecodeScratch:
    """Decodes into memory that is reused: what it returned is overwritten by its next call.

    Args:
        weights: layouts of all weights that will be decoded, with the dtype each is wanted in.
        stats: where decode time is counted.
    """

    def __init__(self, weights: Iterable[tuple[TensorLayout, torch.dtype]], stats: StatsRecorder) -> None:
        self._stats = stats
        stored = cast = 0
        for layout, dtype in weights:
            stored = max(stored, layout.dense_bytes)
            if dtype != layout.dtype:
                cast = max(cast, layout.geometry.numel * dtype.itemsize)
        self._pools = [StagingPool(n) for n in (stored, cast) if n]
        self._buffers = [pool.allocate(pool.capacity_bytes).tensor() for pool in self._pools]

    @property
    def nbytes(self) -> int:
        return sum(pool.capacity_bytes for pool in self._pools)

    def decode(self, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense tensor in `dtype`, valid until the next call. Raises FormatError for damaged contents."""
        layout = packed.layout
        with self._stats.decoding():
            dense = decode(packed, out=_shaped(self._buffers[0], layout, layout.dtype))
            if dtype == layout.dtype:
                return dense
            return _shaped(self._buffers[1], layout, dtype).copy_(dense)

    def close(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
        for pool in self._pools:
            pool.close()


def _shaped(buffer: torch.Tensor, layout: TensorLayout, dtype: torch.dtype) -> torch.Tensor:
    nbytes = layout.geometry.numel * dtype.itemsize
    return buffer[:nbytes].view(dtype).view(layout.shape)

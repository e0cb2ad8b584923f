"""The runtime's decode scratch: a buffer on huge pages, as large as what is decoded at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.linear import tile_shape
from endor.kernels.scratch import ThreadScratch
from endor.loaders import StagingPool
from endor.runtime.stats import StatsRecorder

__all__ = ["DecodeScratch", "decoded_bytes", "most_decoded"]


def decoded_bytes(layout: TensorLayout, dtype: torch.dtype, *, matmul: str) -> tuple[int, int]:
    """Dense bytes of what is decoded of a weight at a time, as stored and, if that is another dtype, cast."""
    numel = layout.geometry.numel if matmul == "decode" else math.prod(tile_shape(layout))
    return numel * layout.dtype.itemsize, 0 if dtype == layout.dtype else numel * dtype.itemsize


def most_decoded(weights: Iterable[tuple[TensorLayout, torch.dtype]], *, matmul: str) -> dict[str, int]:
    """Dense bytes of the most that is decoded at a time: `stored` and `cast`, see `decoded_bytes`."""
    needs = [decoded_bytes(layout, dtype, matmul=matmul) for layout, dtype in weights]
    return {
        "stored": max((stored for stored, _ in needs), default=0),
        "cast": max((cast for _, cast in needs), default=0),
    }


class DecodeScratch(ThreadScratch):
    """Decodes into memory that is reused: what it returned is overwritten by the same thread's next call.

    The thread that makes it gets its buffers at once, since they are part of the memory that is planned;
    another thread that runs the model gets its own when it needs them.

    Args:
        weights: layouts of all weights that will be decoded, with the dtype each is wanted in.
        stats: where decode time is counted.
        matmul: how they are multiplied: `auto` decodes tile by tile, `decode` whole weights.
    """

    def __init__(
        self, weights: Iterable[tuple[TensorLayout, torch.dtype]], stats: StatsRecorder, *, matmul: str
    ) -> None:
        super().__init__()
        self.matmul = matmul
        self._stats = stats
        self._pools: list[StagingPool] = []
        for use, nbytes in most_decoded(weights, matmul=matmul).items():
            if nbytes:
                self._reserve(use, nbytes)

    @property
    def nbytes(self) -> int:
        return sum(pool.capacity_bytes for pool in self._pools)

    def decode(self, packed: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The dense tensor in `dtype`, valid until the thread's next call. Raises FormatError for damage."""
        with self._stats.decoding():
            return super().decode(packed, dtype)

    def decode_rows(
        self, packed: PackedTensor, start_block: int, stop_block: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Some row blocks in `dtype`, valid until the thread's next call. Raises FormatError for damage."""
        with self._stats.decoding():
            return super().decode_rows(packed, start_block, stop_block, dtype)

    def close(self) -> None:
        """Give the memory back."""
        vars(self._buffers).clear()
        while self._pools:
            self._pools.pop().close()

    def _allocate(self, nbytes: int) -> torch.Tensor:
        pool = StagingPool(nbytes)
        self._pools.append(pool)
        return pool.allocate(pool.capacity_bytes).tensor()

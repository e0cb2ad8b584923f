"""Staging memory: one anonymous arena, allocated and touched once, from which page-aligned buffers are lent.

Direct reads into 4 KiB pages lose a third of the disk's bandwidth, and the first touch of fresh memory is
slower than the disk. So the arena is aligned to 2 MiB, asks for huge pages, is faulted in once and reused for
the whole run.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from endor.errors import PlanError
from endor.loaders.memory import available_bytes
from endor.loaders.pool import HUGE_PAGE_BYTES, Buffer, Pool

__all__ = ["HUGE_PAGE_BYTES", "StagingBuffer", "StagingPool", "available_bytes"]

_MADV_POPULATE_WRITE: Final = 23  # not in Python's mmap module; Linux >= 5.14


class StagingBuffer(Buffer):
    """A range of the arena, used where it was read to."""

    __slots__ = ("_pool",)

    def __init__(self, pool: StagingPool, offset_bytes: int, length_bytes: int) -> None:
        super().__init__(offset_bytes, length_bytes)
        self._pool = pool

    @property
    def memory(self) -> memoryview:
        """The buffer's bytes, writable, without a copy."""
        self._check_live()
        return self._pool._view[self.offset_bytes : self.offset_bytes + self.length_bytes]

    def tensor(self, offset_bytes: int = 0, length_bytes: int | None = None) -> torch.Tensor:
        self._check_live()
        length = self._checked(offset_bytes, length_bytes)
        return self._pool._tensor.narrow(0, self.offset_bytes + offset_bytes, length)

    def _check_live(self) -> None:
        if self.released or self._pool.closed:
            raise ValueError(
                "a staging buffer was used after it was released: its bytes may be another unit's by now"
            )


class StagingPool(Pool[StagingBuffer]):
    """Host memory.

    Args:
        capacity_bytes: rounded up to whole huge pages.
        pin: registers the arena with a device (`Accelerator.pin`), which then copies from it by itself; for
            as long as the pool is open.
    """

    def __init__(
        self, capacity_bytes: int, *, pin: Callable[[Tensor], Callable[[], None]] | None = None
    ) -> None:
        super().__init__(capacity_bytes)
        arena, start = _map_arena(self.capacity_bytes)
        self._arena: mmap.mmap | None = arena
        self._view = memoryview(arena)[start : start + self.capacity_bytes]
        self._tensor = torch.frombuffer(arena, dtype=torch.uint8, offset=start, count=self.capacity_bytes)
        self._unpin = pin(self._tensor) if pin is not None else None

    def _make(self, offset_bytes: int, length_bytes: int) -> StagingBuffer:
        return StagingBuffer(self, offset_bytes, length_bytes)

    def close(self) -> None:
        """Give the memory back to the system. Idempotent. Views that outlive the pool read as zeros."""
        if self.closed:
            return
        self.closed = True
        self._lent.clear()
        unpin, self._unpin = self._unpin, None
        if unpin is not None:  # before the pages go: the device's driver holds on to them
            unpin()
        # Not `mmap.close`: torch's views do not keep it from unmapping, and reading one would crash the
        # process. Emptied, the mapping lives as long as its last view does.
        arena, self._arena = self._arena, None
        if arena is not None and sys.platform == "linux":
            arena.madvise(mmap.MADV_DONTNEED)
        self._view = memoryview(b"")
        self._tensor = torch.empty(0, dtype=torch.uint8)


def _map_arena(length_bytes: int) -> tuple[mmap.mmap, int]:
    """A private mapping and the offset in it of `length_bytes` bytes on huge-page alignment, faulted in."""
    available = available_bytes()
    if available is not None and length_bytes > available:
        raise PlanError(
            f"{length_bytes} bytes of staging memory are needed, {available} are available:"
            " lower the prefetch depth or the memory budget"
        )
    try:
        # Private on purpose: Python's default is a shared mapping, whose pages are not huge.
        arena = mmap.mmap(-1, length_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError) as error:
        raise PlanError(
            f"{length_bytes} bytes of staging memory are needed and could not be mapped: {error}"
        ) from error
    probe = torch.frombuffer(arena, dtype=torch.uint8)
    start = -probe.data_ptr() % HUGE_PAGE_BYTES
    _fault_in(arena, start, length_bytes, probe)
    return arena, start


def _fault_in(arena: mmap.mmap, start: int, length_bytes: int, tensor: torch.Tensor) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower reads, same bytes
            arena.madvise(mmap.MADV_HUGEPAGE, start, length_bytes)
        with contextlib.suppress(OSError):  # an older kernel: the pages are touched below
            arena.madvise(_MADV_POPULATE_WRITE, start, length_bytes)
            return
    tensor.narrow(0, start, length_bytes).zero_()

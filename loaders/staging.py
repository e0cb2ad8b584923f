"""Staging memory: one anonymous arena, allocated and touched once, from which page-aligned buffers are lent.

Direct reads into 4 KiB pages lose a third of the disk's bandwidth, and the first touch of fresh memory is
slower than the disk. So the arena is aligned to 2 MiB, asks for huge pages, is faulted in once and reused for
the whole run.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from types import TracebackType
from typing import Final, Self

import torch

from endor.errors import PlanError
from endor.loaders.memory import available_bytes
from endor.loaders.plan import PAGE_BYTES, first_fit, round_up

__all__ = ["HUGE_PAGE_BYTES", "StagingBuffer", "StagingPool", "available_bytes"]

HUGE_PAGE_BYTES: Final = 2 << 20
_MADV_POPULATE_WRITE: Final = 23  # not in Python's mmap module; Linux >= 5.14


class StagingBuffer:
    """A page-aligned range of the arena, its borrower's until `release`; after that it raises ValueError."""

    __slots__ = ("_pool", "length_bytes", "offset_bytes", "released")

    def __init__(self, pool: StagingPool, offset_bytes: int, length_bytes: int) -> None:
        self._pool = pool
        self.offset_bytes = offset_bytes
        self.length_bytes = length_bytes
        self.released = False

    @property
    def memory(self) -> memoryview:
        """The buffer's bytes, writable, without a copy."""
        self._check_live()
        return self._pool._view[self.offset_bytes : self.offset_bytes + self.length_bytes]

    def tensor(self, offset_bytes: int = 0, length_bytes: int | None = None) -> torch.Tensor:
        """A uint8 tensor over a range of the buffer (to its end without a length), without a copy."""
        self._check_live()
        length = self.length_bytes - offset_bytes if length_bytes is None else length_bytes
        if offset_bytes < 0 or length < 0 or offset_bytes + length > self.length_bytes:
            raise ValueError(
                f"range [{offset_bytes}, {offset_bytes + length}) is outside a staging buffer of"
                f" {self.length_bytes} bytes"
            )
        return self._pool._tensor.narrow(0, self.offset_bytes + offset_bytes, length)

    def release(self) -> None:
        """Give the range back. A second call changes nothing."""
        self.released = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _check_live(self) -> None:
        if self.released or self._pool.closed:
            raise ValueError(
                "a staging buffer was used after it was released: its bytes may be another unit's by now"
            )


class StagingPool:
    """`capacity_bytes` of page-aligned memory, lent first-fit. Not thread-safe: one owner lends."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise PlanError(f"a staging pool needs at least one byte, found {capacity_bytes}")
        self.capacity_bytes = round_up(capacity_bytes, HUGE_PAGE_BYTES)
        self.closed = False
        self._lent: list[StagingBuffer] = []
        arena, start = _map_arena(self.capacity_bytes)
        self._arena: mmap.mmap | None = arena
        self._view = memoryview(arena)[start : start + self.capacity_bytes]
        self._tensor = torch.frombuffer(arena, dtype=torch.uint8, offset=start, count=self.capacity_bytes)

    @property
    def lent_bytes(self) -> int:
        return sum(buffer.length_bytes for buffer in self._lent if not buffer.released)

    def try_allocate(self, length_bytes: int) -> StagingBuffer | None:
        """A buffer of `length_bytes` rounded up to whole pages, or None if no free range is long enough."""
        if self.closed:
            raise ValueError("the staging pool is closed")
        if length_bytes <= 0:
            raise PlanError(f"a staging buffer has at least one byte, found {length_bytes}")
        self._lent = [buffer for buffer in self._lent if not buffer.released]
        length = round_up(length_bytes, PAGE_BYTES)
        taken = ((buffer.offset_bytes, buffer.offset_bytes + buffer.length_bytes) for buffer in self._lent)
        start = first_fit(taken, length)
        if start + length > self.capacity_bytes:
            return None
        buffer = StagingBuffer(self, start, length)
        self._lent.append(buffer)
        return buffer

    def allocate(self, length_bytes: int) -> StagingBuffer:
        """Like `try_allocate`, but what does not fit is a PlanError that says what is needed."""
        buffer = self.try_allocate(length_bytes)
        if buffer is None:
            raise PlanError(
                f"{length_bytes} bytes of staging memory are needed in one piece: the pool has"
                f" {self.capacity_bytes}, of which {self.lent_bytes} are lent; release buffers first or make"
                " the pool larger"
            )
        return buffer

    def reclaim(self, *, keep: list[StagingBuffer]) -> None:
        """Take back all buffers but those in `keep`; for an owner who knows that nothing writes to them."""
        for buffer in self._lent:
            buffer.released = buffer not in keep
        self._lent = list(keep)

    def close(self) -> None:
        """Give the memory back to the system. Idempotent. Views that outlive the pool read as zeros."""
        if self.closed:
            return
        self.closed = True
        self._lent.clear()
        # Not `mmap.close`: torch's views do not keep it from unmapping, and reading one would crash the
        # process. Emptied, the mapping lives as long as its last view does.
        arena, self._arena = self._arena, None
        if arena is not None and sys.platform == "linux":
            arena.madvise(mmap.MADV_DONTNEED)
        self._view = memoryview(b"")
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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

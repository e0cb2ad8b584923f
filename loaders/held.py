"""The host tier: units whose bytes stay in memory, lent without a copy or copied on from there.

Where blocks are computed with in host memory they are used in place (`MemoryReader.tensor`). Where they must
move on, to a GPU's memory, this is a `Reader` like any other, whose reads of held units cost a copy and no
disk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from endor.errors import LoadError
from endor.loaders.chunks import ChunkedReader
from endor.loaders.plan import ReadOp, Unit
from endor.loaders.posix import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, PosixFile
from endor.loaders.reader import Destination, DirectMode, Moved, read_unit
from endor.loaders.staging import StagingBuffer, StagingPool

__all__ = ["MemoryReader"]


@dataclass(frozen=True)
class _Held:
    """One read's bytes, from `start` in a staging buffer that nobody writes to any more."""

    op: ReadOp
    buffer: StagingBuffer
    start: int

    def covers(self, offset_bytes: int, length_bytes: int) -> bool:
        return self.op.offset_bytes <= offset_bytes and offset_bytes + length_bytes <= self.op.end_bytes

    def tensor(self, offset_bytes: int, length_bytes: int) -> torch.Tensor:
        return self.buffer.tensor(self.start + offset_bytes - self.op.offset_bytes, length_bytes)


_HeldByFile = dict[Path, list[_Held]]


def _find(held: _HeldByFile, file: Path, offset_bytes: int, length_bytes: int) -> torch.Tensor | None:
    for one in held.get(file, ()):
        if one.covers(offset_bytes, length_bytes):
            return one.tensor(offset_bytes, length_bytes)
    return None


class _HeldFile(PosixFile):
    """A file of which some ranges are in memory."""

    def __init__(self, path: Path, *, direct: DirectMode, held: _HeldByFile) -> None:
        self._held = held
        super().__init__(path, direct=direct)

    def wants_direct(self, op: ReadOp, address: int) -> bool:
        found = _find(self._held, self.path, op.offset_bytes, op.length_bytes)
        return found is None and super().wants_direct(op, address)

    def read(self, destination: Destination, offset_bytes: int, *, direct: bool) -> Moved:
        assert isinstance(destination, memoryview)
        found = _find(self._held, self.path, offset_bytes, len(destination))
        if found is None:
            return super().read(destination, offset_bytes, direct=direct)
        target = ctypes.addressof(ctypes.c_char.from_buffer(destination))
        ctypes.memmove(target, found.data_ptr(), len(destination))  # without the interpreter's lock
        return Moved(bytes_memory=len(destination))


class MemoryReader(ChunkedReader):
    """A `Reader` that serves from memory what it was told to hold, and reads everything else as posix does.

    What is held stays what it was when it was read, whatever becomes of the file; it is freed by `close`.
    """

    name = "memory"

    def __init__(
        self,
        *,
        direct: DirectMode = "auto",
        threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self._held: _HeldByFile = {}
        self._pools: list[StagingPool] = []
        super().__init__(
            partial(_HeldFile, direct=direct, held=self._held), threads=threads, chunk_bytes=chunk_bytes
        )

    @property
    def held_bytes(self) -> int:
        """Memory that held units take."""
        return sum(pool.capacity_bytes for pool in self._pools)

    def hold(self, units: Sequence[Unit]) -> None:
        """Read the units once and serve them from memory from now on; all of them or, on an error, none.

        Raises:
            LoadError: a unit cannot be read.
            PlanError: there is not enough memory for them.
        """
        if not units:
            return
        pool = StagingPool(sum(unit.span_bytes for unit in units))
        found: list[_Held] = []
        try:
            for unit in units:
                buffer = pool.allocate(unit.span_bytes)
                read_unit(self, unit, buffer.memory)
                found += [_Held(op, buffer, at) for op, at in zip(unit.ops, unit.op_offsets, strict=True)]
        except BaseException:
            pool.close()
            raise
        self._pools.append(pool)
        for one in found:
            self._held.setdefault(one.op.file, []).append(one)

    def tensor(self, op: ReadOp) -> torch.Tensor:
        """The bytes of `op` where they are held, uint8, without a copy; not to be written to.

        Raises:
            LoadError: they are not held, or the reader is closed.
        """
        found = _find(self._held, op.file, op.offset_bytes, op.length_bytes)
        if found is None:
            raise LoadError(
                f"{op.file}: {op.length_bytes} bytes at offset {op.offset_bytes} are not held in memory;"
                " `hold` their unit first, or read them"
            )
        return found

    def close(self) -> None:
        super().close()
        self._held.clear()
        while self._pools:
            self._pools.pop().close()

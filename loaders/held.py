"""The host tier: units whose bytes stay in memory, lent without a copy or copied on from there.

`HeldUnits` holds whole units as they lie in a staging buffer, for the prefetcher of a device, which copies
them to their slots without reading anything. `MemoryReader` is a `Reader` like any other, whose reads of what
it holds cost a copy and no disk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from endor.errors import LoadError
from endor.loaders.chunks import ChunkedReader
from endor.loaders.plan import ReadOp, Unit
from endor.loaders.pool import Buffer
from endor.loaders.posix import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, PosixFile
from endor.loaders.reader import Destination, DirectMode, Moved, Reader, read_unit
from endor.loaders.staging import StagingBuffer, StagingPool

__all__ = ["HeldUnits", "MemoryReader"]


class HeldUnits:
    """Units in one arena of host memory, each with its reads at their `Unit.op_offsets`.

    All of them are there, or the constructor raises and nothing is. What is held stays what it was when it
    was read, whatever becomes of the file. A context manager.

    Args:
        units: at least one.
        reader: that reads them, once.
        check: is called with the index and the memory of each when it has been read.
        pin: see `StagingPool`.

    Raises LoadError where a unit cannot be read, PlanError where there is not enough memory, and what `check`
    raises.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        reader: Reader,
        *,
        check: Callable[[int, memoryview], None] | None = None,
        pin: Callable[[torch.Tensor], Callable[[], None]] | None = None,
    ) -> None:
        self._held: dict[tuple[ReadOp, ...], torch.Tensor] = {}
        self._pool = StagingPool(sum(unit.span_bytes for unit in units), pin=pin)
        try:
            for index, unit in enumerate(units):
                buffer = self._pool.allocate(unit.span_bytes)
                read_unit(reader, unit, buffer.memory)
                if check is not None:
                    check(index, buffer.memory)
                self._held[unit.ops] = buffer.tensor(0, unit.span_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._pool.capacity_bytes

    def find(self, unit: Unit) -> torch.Tensor | None:
        """uint8 [unit.span_bytes], not to be written to; None for a unit that is not held."""
        return self._held.get(unit.ops)

    def bring(self, unit: Unit, buffer: Buffer) -> Moved:
        """Start the copy of a unit that is held to its slot."""
        buffer.land(unit, self._held[unit.ops])
        return Moved(bytes_memory=unit.total_bytes)

    def close(self) -> None:
        """Free the memory; whatever copies from it has to be over. Idempotent."""
        self._held.clear()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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

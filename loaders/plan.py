"""What is to be read, in which order and how far ahead: values only, no file is touched here.

A `ReadOp` is a byte range of one file; a `Unit` is what is streamed as one (a decoder block: normally one
page-aligned range of one shard); a `LoadPlan` is the cyclic order of units and the prefetch depth. The memory
a plan needs is a pure function of it (`LoadPlan.ring_bytes`), because space is handed out in the order of the
units by the same `first_fit` that the staging pool uses: docs/design/loaders.md says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from endor.errors import PlanError

__all__ = ["PAGE_BYTES", "LoadPlan", "ReadOp", "Unit", "first_fit", "ring_bytes_of", "round_up"]

PAGE_BYTES: Final = 4096
"""Alignment of file offsets, memory addresses and lengths that every O_DIRECT file system accepts."""

SLOT_ALIGNMENT_BYTES: Final = 256
"""What any vector load of any device is content with."""
_SIMULATED_CYCLES: Final = 64


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def first_fit(taken: Iterable[tuple[int, int]], length_bytes: int) -> int:
    """The lowest offset at which `length_bytes` overlap none of the `taken` (start, end) ranges."""
    cursor = 0
    for start, end in sorted(taken):
        if start - cursor >= length_bytes:
            break
        cursor = max(cursor, end)
    return cursor


@dataclass(frozen=True)
class ReadOp:
    """`length_bytes` bytes of `file`, from `offset_bytes` after its beginning."""

    file: Path
    offset_bytes: int
    length_bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.file, Path):
            raise PlanError(f"a read needs a pathlib.Path, found {type(self.file).__name__} {self.file!r}")
        if self.offset_bytes < 0:
            raise PlanError(f"{self.file}: a read starts at offset >= 0, found {self.offset_bytes}")
        if self.length_bytes <= 0:
            raise PlanError(f"{self.file}: a read takes at least one byte, found {self.length_bytes}")

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.length_bytes


@dataclass(frozen=True)
class Unit:
    """What is streamed as one. Its reads lie in one staging buffer, each at its `op_offsets`."""

    name: str
    ops: tuple[ReadOp, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise PlanError("a unit needs a name")
        if not self.ops:
            raise PlanError(f"unit {self.name!r} reads nothing: expected at least one read")

    @cached_property
    def op_offsets(self) -> tuple[int, ...]:
        """Where each read starts in the unit's buffer.

        A read keeps its file offset's remainder modulo a page, so that its whole pages can be read directly
        whatever the range; a range that starts on a page starts on a page of the buffer.
        """
        offsets: list[int] = []
        cursor = 0
        for op in self.ops:
            offsets.append(round_up(cursor, PAGE_BYTES) + op.offset_bytes % PAGE_BYTES)
            cursor = offsets[-1] + op.length_bytes
        return tuple(offsets)

    @cached_property
    def slot_offsets(self) -> tuple[int, ...]:
        """Where each read's bytes start in a slot of a device, which they are copied to: aligned for kernels.

        They take no more room than in a buffer that is read to.
        """
        offsets: list[int] = []
        cursor = 0
        for op in self.ops:
            offsets.append(round_up(cursor, SLOT_ALIGNMENT_BYTES))
            cursor = offsets[-1] + op.length_bytes
        return tuple(offsets)

    @cached_property
    def span_bytes(self) -> int:
        """Staging memory the unit takes, in whole pages."""
        return round_up(self.op_offsets[-1] + self.ops[-1].length_bytes, PAGE_BYTES)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes read from files."""
        return sum(op.length_bytes for op in self.ops)


@dataclass(frozen=True)
class LoadPlan:
    """The units in the order of use, repeated for ever, and how many are read ahead of the one in use."""

    units: tuple[Unit, ...]
    depth: int

    def __post_init__(self) -> None:
        if not self.units:
            raise PlanError("a load plan needs at least one unit: with nothing to stream, do not build one")
        if self.depth < 0:
            raise PlanError(f"prefetch depth is 0 (read when asked) or more, found {self.depth}")
        seen: set[str] = set()
        for unit in self.units:
            if unit.name in seen:
                raise PlanError(
                    f"unit name {unit.name!r} is used twice: names identify units in errors and statistics"
                )
            seen.add(unit.name)

    @cached_property
    def largest_unit_bytes(self) -> int:
        """Staging memory of the largest unit: the least a ring can have."""
        return max(unit.span_bytes for unit in self.units)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes read in one pass over the units."""
        return sum(unit.total_bytes for unit in self.units)

    @cached_property
    def ring_bytes(self) -> int:
        """Staging memory with which one unit in use and `depth` units ahead of it always fit."""
        return ring_bytes_of([unit.span_bytes for unit in self.units], self.depth)


def ring_bytes_of(sizes: Sequence[int], depth: int) -> int:
    """High-water mark of placing the units in order, each when the unit `depth + 1` before it is released."""
    ahead: deque[tuple[int, int]] = deque(maxlen=depth)
    seen: set[tuple[int, tuple[tuple[int, int], ...]]] = set()
    high_water = 0
    for position in range(_SIMULATED_CYCLES * len(sizes)):
        index = position % len(sizes)
        state = (index, tuple(ahead))
        if state in seen:  # from here the placement repeats itself
            break
        seen.add(state)
        start = first_fit(ahead, sizes[index])
        ahead.append((start, start + sizes[index]))
        high_water = max(high_water, start + sizes[index])
    return high_water

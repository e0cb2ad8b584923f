"""What lends memory, in page-aligned ranges of one arena: the part that host and device memory share.

Where a range begins is decided first-fit by what is lent, so a plan can say in advance how large an arena has
to be (`LoadPlan.ring_bytes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

import torch

from endor.errors import PlanError
from endor.loaders.accelerator import Copied
from endor.loaders.plan import PAGE_BYTES, ReadOp, Unit, first_fit, round_up
from endor.loaders.reader import Reader, Ticket

__all__ = ["HUGE_PAGE_BYTES", "Buffer", "Pool"]

HUGE_PAGE_BYTES: Final = 2 << 20


class Buffer(ABC):
    """A page-aligned range of an arena, its borrower's until `release`; after that it raises ValueError.

    Attributes:
        copied: the last copy to it; None where bytes are used where they were read to.
    """

    __slots__ = ("copied", "length_bytes", "offset_bytes", "released")

    def __init__(self, offset_bytes: int, length_bytes: int) -> None:
        self.offset_bytes = offset_bytes
        self.length_bytes = length_bytes
        self.released = False
        self.copied: Copied | None = None

    @property
    @abstractmethod
    def memory(self) -> memoryview:
        """The bytes that readers write to, without a copy."""

    @abstractmethod
    def tensor(self, offset_bytes: int = 0, length_bytes: int | None = None) -> torch.Tensor:
        """A uint8 tensor over a range of the buffer (to its end without a length), without a copy."""

    def release(self) -> None:
        """Give the range back, with the work on it that this thread has started. A second call changes
        nothing."""
        self.released = True

    # What memory of a device needs; nothing to do for host memory, which is used where it was read to.

    @property
    def is_writable(self) -> bool:
        """Whether nothing uses the range any more; does not wait."""
        return True

    def wait_writable(self) -> None:
        """Block until `is_writable`."""
        return

    def submit(self, reader: Reader, op: ReadOp, offset_bytes: int) -> Ticket:
        """Have `reader` read a part of the unit to its place, `offset_bytes` from the beginning."""
        return reader.submit(op, self.memory[offset_bytes : offset_bytes + op.length_bytes])

    def read_bytes(self, length_bytes: int) -> memoryview:
        """What was read, in host memory."""
        return self.memory[:length_bytes]

    def offsets_of(self, unit: Unit) -> tuple[int, ...]:
        """Where the bytes of each read of a unit begin in the range, when they have arrived."""
        return unit.op_offsets

    def land(self, unit: Unit, source: torch.Tensor) -> None:
        """Start the copy of a unit, which lies at its `Unit.op_offsets` in host memory `source`."""
        raise NotImplementedError

    def arrive(self) -> None:
        """What this thread starts from now on may use `tensor`."""
        return

    def reuse(self) -> None:
        """Keep the range for another unit: as `release` and a new allocation of the same range."""
        return

    # Shared.

    def _checked(self, offset_bytes: int, length_bytes: int | None) -> int:
        """The length of a range, which lies in the buffer."""
        length = self.length_bytes - offset_bytes if length_bytes is None else length_bytes
        if offset_bytes < 0 or length < 0 or offset_bytes + length > self.length_bytes:
            raise ValueError(
                f"range [{offset_bytes}, {offset_bytes + length}) is outside a staging buffer of"
                f" {self.length_bytes} bytes"
            )
        return length

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


B = TypeVar("B", bound=Buffer)


class Pool(ABC, Generic[B]):
    """`capacity_bytes` of page-aligned memory, lent first-fit. Not thread-safe: one owner lends."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise PlanError(f"a staging pool needs at least one byte, found {capacity_bytes}")
        self.capacity_bytes = round_up(capacity_bytes, HUGE_PAGE_BYTES)
        self.closed = False
        self._lent: list[B] = []

    @abstractmethod
    def _make(self, offset_bytes: int, length_bytes: int) -> B:
        """A buffer of a range that is free."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back to the system. Idempotent."""

    def settle(self) -> None:
        """Block until nothing uses memory that is not lent; for an owner who lost count of that."""
        return

    @property
    def lent_bytes(self) -> int:
        return sum(buffer.length_bytes for buffer in self._lent if not buffer.released)

    def try_allocate(self, length_bytes: int) -> B | None:
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
        buffer = self._make(start, length)
        self._lent.append(buffer)
        return buffer

    def allocate(self, length_bytes: int) -> B:
        """Like `try_allocate`, but what does not fit is a PlanError that says what is needed."""
        buffer = self.try_allocate(length_bytes)
        if buffer is None:
            raise PlanError(
                f"{length_bytes} bytes of staging memory are needed in one piece: the pool has"
                f" {self.capacity_bytes}, of which {self.lent_bytes} are lent; release buffers first or make"
                " the pool larger"
            )
        return buffer

    def reclaim(self, *, keep: Sequence[Buffer]) -> None:
        """Take back all buffers but those in `keep`; for an owner who knows that nothing writes to them."""
        kept = [buffer for buffer in self._lent if any(buffer is one for one in keep)]
        for buffer in self._lent:
            buffer.released = not any(buffer is one for one in kept)
        self._lent = kept

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

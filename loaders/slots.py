"""Device memory in slots: one arena, allocated once, whose ranges are filled by copies while others are used.

Who owns what, and for how long. A slot is its unit's from `try_allocate` to `release`. The device may still
read it then: the kernels of its block are queued. So a range remembers its last stays: which copy filled it,
and an event behind the work that used it. The next copy to the range waits for that work, in the order of
copies; no thread waits. A reader that writes to device memory knows no such order: for it a thread waits, the
background thread for blocks, the one that runs the model for experts. What is copied from is its owner's to
keep until the copy has ended. The arena outlives every copy and kernel, because closing waits for them: so no
tensor needs `record_stream`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from endor.loaders.accelerator import Accelerator, Copied, Event
from endor.loaders.plan import ReadOp, Unit
from endor.loaders.pool import Buffer, Pool
from endor.loaders.reader import Reader, Ticket, device_reader

__all__ = ["SlotBuffer", "SlotPool"]


@dataclass(frozen=True)
class _Stay:
    """One unit's time in a range of the arena, which the device may not have come to the end of."""

    start: int
    end: int
    copied: Copied | None
    left: Event

    @property
    def is_over(self) -> bool:
        return self.left.is_done and (self.copied is None or self.copied.ended.is_done)

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.ended.wait()
        self.left.wait()


class SlotBuffer(Buffer):
    """A slot."""

    __slots__ = ("_before", "_pool")

    def __init__(self, pool: SlotPool, offset_bytes: int, length_bytes: int) -> None:
        super().__init__(offset_bytes, length_bytes)
        self._pool = pool
        self._before = pool._stays_in(offset_bytes, offset_bytes + length_bytes)

    @property
    def memory(self) -> memoryview:
        raise ValueError(
            "a slot is device memory: units are copied to it, or read by a reader that reaches it"
        )

    def tensor(self, offset_bytes: int = 0, length_bytes: int | None = None) -> torch.Tensor:
        """A range of the slot, on the device."""
        if self.released or self._pool.closed:
            raise ValueError("a slot was used after it was released: its bytes may be another unit's by now")
        length = self._checked(offset_bytes, length_bytes)
        return self._pool._tensor.narrow(0, self.offset_bytes + offset_bytes, length)

    def release(self) -> None:
        if not self.released:
            self._end_stay()
            super().release()

    @property
    def is_writable(self) -> bool:
        return all(stay.is_over for stay in self._before)

    def wait_writable(self) -> None:
        for stay in self._before:
            stay.wait()

    def submit(self, reader: Reader, op: ReadOp, offset_bytes: int) -> Ticket:
        into_slots = self._pool.into_slots
        if into_slots is None:
            return super().submit(reader, op, offset_bytes)
        return into_slots.submit(op, self.tensor(offset_bytes, op.length_bytes))

    def read_bytes(self, length_bytes: int) -> memoryview:
        return self.tensor(0, length_bytes).cpu().numpy().data

    def offsets_of(self, unit: Unit) -> tuple[int, ...]:
        return unit.slot_offsets if self._pool.into_slots is None else unit.op_offsets

    def land(self, unit: Unit, source: torch.Tensor) -> None:
        places = zip(unit.ops, self.offsets_of(unit), unit.op_offsets, strict=True)
        pairs = [
            (self.tensor(to, op.length_bytes), source.narrow(0, at, op.length_bytes)) for op, to, at in places
        ]
        self.copied = self._pool.accelerator.copy(pairs, after=[stay.left for stay in self._before])

    def arrive(self) -> None:
        if self.copied is not None:
            self._pool.accelerator.follow(self.copied.ended)

    def reuse(self) -> None:
        self._end_stay()
        self.copied = None
        self._before = self._pool._stays_in(self.offset_bytes, self.offset_bytes + self.length_bytes)

    def _end_stay(self) -> None:
        end = self.offset_bytes + self.length_bytes
        left = self._pool.accelerator.mark()
        self._pool._stays.append(_Stay(self.offset_bytes, end, self.copied, left))


class SlotPool(Pool[SlotBuffer]):
    """Memory of a device, lent first-fit.

    Args:
        capacity_bytes: rounded up to whole huge pages.
        accelerator: of the device.
        reader: if it is one that writes to device memory (GPUDirect Storage) it does, into the slots, which
            are registered with it once.

    Raises PlanError where there is not so much memory.

    Attributes:
        into_slots: that reader; None if units are copied from host memory.
    """

    def __init__(
        self, capacity_bytes: int, accelerator: Accelerator, *, reader: Reader | None = None
    ) -> None:
        super().__init__(capacity_bytes)
        self.accelerator = accelerator
        self._process = os.getpid()
        self.into_slots = device_reader(reader) if reader is not None else None
        self._stays: list[_Stay] = []
        self._tensor = accelerator.empty(self.capacity_bytes)
        self._deregister = self.into_slots.register(self._tensor) if self.into_slots else None

    def settle(self) -> None:
        self.accelerator.settle()
        self._stays.clear()

    def close(self) -> None:
        """Give the memory back, once the device has done what uses it. Idempotent."""
        if self.closed or os.getpid() != self._process:  # a forked process has no device
            return
        self.closed = True
        try:
            self.settle()
        finally:
            self._lent.clear()
            self._tensor = torch.empty(0, dtype=torch.uint8)
            deregister, self._deregister = self._deregister, None
            if deregister is not None:
                deregister()

    def _make(self, offset_bytes: int, length_bytes: int) -> SlotBuffer:
        return SlotBuffer(self, offset_bytes, length_bytes)

    def _stays_in(self, start: int, end: int) -> tuple[_Stay, ...]:
        """Those in a range that are not over."""
        self._stays = [stay for stay in self._stays if not stay.is_over]
        return tuple(stay for stay in self._stays if stay.start < end and start < stay.end)

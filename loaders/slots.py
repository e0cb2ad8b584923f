"""Device memory in slots: one arena, allocated once, whose ranges are filled by copies while others are used.

Who owns what, and for how long. A slot is its unit's from `try_allocate` to `release`. The device may still
read it then: the kernels of its block are queued. So a range remembers its last stays: which copy filled it,
and an event behind the work that used it. The next copy to the range waits for that work, in the order of
copies; no thread waits. The host memory in front of a slot (its bounce, at the same offset of a pinned arena)
may be written again when the copy from it has ended; for that the thread that reads waits, never the one that
runs the model. The arenas outlive every copy and kernel, because closing waits for them: so no tensor needs
`record_stream`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from endor.loaders.accelerator import Accelerator, Copied, Event
from endor.loaders.plan import ReadOp
from endor.loaders.pool import Buffer, Pool
from endor.loaders.reader import Reader, Ticket, device_reader
from endor.loaders.staging import StagingPool

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


class SlotBuffer(Buffer):
    """A slot, and the host memory in front of it if the pool has that."""

    __slots__ = ("_before", "_pool")

    def __init__(self, pool: SlotPool, offset_bytes: int, length_bytes: int) -> None:
        super().__init__(offset_bytes, length_bytes)
        self._pool = pool
        self._before = pool._stays_in(offset_bytes, offset_bytes + length_bytes)

    @property
    def memory(self) -> memoryview:
        """The host memory in front of the slot, writable."""
        self._check_live()
        return self._pool._bounce_bytes(self.offset_bytes, self.length_bytes)

    def tensor(self, offset_bytes: int = 0, length_bytes: int | None = None) -> torch.Tensor:
        """A range of the slot, on the device."""
        self._check_live()
        length = self._checked(offset_bytes, length_bytes)
        return self._pool._tensor.narrow(0, self.offset_bytes + offset_bytes, length)

    def release(self) -> None:
        if not self.released:
            self._end_stay()
            super().release()

    @property
    def is_writable(self) -> bool:
        return all(event.is_done for event in self._in_the_way())

    def wait_writable(self) -> None:
        for event in self._in_the_way():
            event.wait()

    def submit(self, reader: Reader, op: ReadOp, offset_bytes: int) -> Ticket:
        into_slots = self._pool.into_slots
        if into_slots is None:
            return super().submit(reader, op, offset_bytes)
        return into_slots.submit(op, self.tensor(offset_bytes, op.length_bytes))

    def read_bytes(self, length_bytes: int) -> memoryview:
        if self._pool.into_slots is not None:
            return self.tensor(0, length_bytes).cpu().numpy().data
        return super().read_bytes(length_bytes)

    def land(self, length_bytes: int, source: torch.Tensor | None = None) -> None:
        if source is None and self._pool.into_slots is not None:
            return  # the bytes are there
        if source is None:
            source = self._pool._bounce_tensor(self.offset_bytes, length_bytes)
        target = self.tensor(0, length_bytes)
        self.copied = self._pool.accelerator.copy(
            [(target, source)], after=[stay.left for stay in self._before]
        )

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

    def _in_the_way(self) -> Iterator[Event]:
        """What has to be over before a reader may write."""
        for stay in self._before:
            if stay.copied is not None:
                yield stay.copied.ended
            if self._pool.into_slots is not None:
                yield stay.left

    def _check_live(self) -> None:
        if self.released or self._pool.closed:
            raise ValueError("a slot was used after it was released: its bytes may be another unit's by now")


class SlotPool(Pool[SlotBuffer]):
    """Memory of a device, lent first-fit.

    Args:
        capacity_bytes: rounded up to whole huge pages.
        accelerator: of the device.
        bounce: have as much pinned host memory in front, for what is read from disk. Without it units come
            from memory that is pinned already, or by a reader that writes to device memory.
        reader: if it is one that writes to device memory (GPUDirect Storage) it does, into the slots, which
            are registered with it once; then there is no bounce.

    Raises PlanError where there is not so much memory of either kind.

    Attributes:
        into_slots: that reader; None if what is read goes through host memory.
    """

    def __init__(
        self,
        capacity_bytes: int,
        accelerator: Accelerator,
        *,
        bounce: bool = True,
        reader: Reader | None = None,
    ) -> None:
        super().__init__(capacity_bytes)
        self.accelerator = accelerator
        self.into_slots = device_reader(reader) if reader is not None else None
        self._stays: list[_Stay] = []
        self._tensor = accelerator.empty(self.capacity_bytes)
        self._deregister = self.into_slots.register(self._tensor) if self.into_slots else None
        wants_bounce = bounce and self.into_slots is None
        self._bounce = StagingPool(self.capacity_bytes, pin=accelerator.pin) if wants_bounce else None
        self._bounce_all = self._bounce.allocate(self.capacity_bytes) if self._bounce else None

    @property
    def bounce_bytes(self) -> int:
        """Pinned host memory."""
        return self._bounce.capacity_bytes if self._bounce else 0

    def settle(self) -> None:
        self.accelerator.settle()
        self._stays.clear()

    def close(self) -> None:
        """Give the memory of both kinds back, once the device has done what uses it. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.settle()
        self._lent.clear()
        deregister, self._deregister = self._deregister, None
        if deregister is not None:
            deregister()
        if self._bounce is not None:
            self._bounce.close()
        self._tensor = torch.empty(0, dtype=torch.uint8)

    def _make(self, offset_bytes: int, length_bytes: int) -> SlotBuffer:
        return SlotBuffer(self, offset_bytes, length_bytes)

    def _stays_in(self, start: int, end: int) -> tuple[_Stay, ...]:
        """Those in a range that are not over."""
        self._stays = [stay for stay in self._stays if not stay.is_over]
        return tuple(stay for stay in self._stays if stay.start < end and start < stay.end)

    def _bounce_bytes(self, offset_bytes: int, length_bytes: int) -> memoryview:
        if self._bounce_all is None:
            raise ValueError("this pool has no host memory in front of its slots")
        return self._bounce_all.memory[offset_bytes : offset_bytes + length_bytes]

    def _bounce_tensor(self, offset_bytes: int, length_bytes: int) -> torch.Tensor:
        if self._bounce_all is None:
            raise ValueError("this pool has no host memory in front of its slots")
        return self._bounce_all.tensor(offset_bytes, length_bytes)

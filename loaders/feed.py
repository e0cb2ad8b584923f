"""What a device gets from disk: read ahead into pinned memory, whether or not a slot is free for it.

A ring of slots is shared by what comes from disk and what is in host memory. If reads had to wait for slots,
the disk would rest while blocks from memory are in turn. So the disk has a ring of its own, of host memory,
which is read ahead by as many units from disk as the plan says. A unit stays in it until its copy has ended.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

from endor.errors import PlanError
from endor.loaders.accelerator import Accelerator, Event
from endor.loaders.flight import OnRead
from endor.loaders.plan import LoadPlan, Unit, ring_bytes_of
from endor.loaders.pool import Buffer
from endor.loaders.prefetch import Lease, Prefetcher
from endor.loaders.reader import Moved, Reader
from endor.loaders.staging import StagingPool

__all__ = ["DiskFeed", "feed_bytes_of"]

_COPYING = 2
"""Units whose copies may be on their way at a time: with one, the link would rest between two copies for as
long as a thread takes to wake up."""


def feed_bytes_of(sizes: Sequence[int], depth: int) -> int:
    """Host memory with which `_COPYING` units that are copied and `depth` others fit, units of such sizes."""
    return ring_bytes_of(sizes, _ahead(len(sizes), depth))


def _ahead(count: int, depth: int) -> int:
    return min(depth + _COPYING - 1, count)


class DiskFeed:
    """Reads units from disk for their copies to a device. Used by one thread; a prefetcher of slots owns it.

    Args:
        units: in the order of use, all from disk.
        reader: its owner's to close.
        depth: units that are read ahead of the one that is copied.
        accelerator: of the device.
        on_read: see `OnRead`; indices are those of `units`.

    Raises PlanError where there is not enough memory.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        reader: Reader,
        *,
        depth: int,
        accelerator: Accelerator,
        on_read: OnRead | None = None,
    ) -> None:
        self._numbers = {unit.ops: number for number, unit in enumerate(units)}
        self._copying: deque[tuple[Event, Lease]] = deque()
        self._next = 0
        self._reads_ahead = depth > 0
        self._process = os.getpid()
        pool = StagingPool(feed_bytes_of([unit.span_bytes for unit in units], depth), pin=accelerator.pin)
        # Units that are copied count as in use; with depth 0 each is read when it is asked for, though.
        plan = LoadPlan(tuple(units), _ahead(len(units), depth) if depth else 0)
        self._prefetcher = Prefetcher(plan, reader, pool, on_read=on_read)

    @property
    def nbytes(self) -> int:
        """Host memory taken."""
        return self._prefetcher.ring_bytes

    def bring(self, unit: Unit, buffer: Buffer) -> Moved:
        """Start the copy of a unit to its slot, when its bytes are there."""
        lease = self._take(unit)
        try:
            buffer.land(unit, lease.tensor())
        except BaseException:
            lease.release()
            raise
        assert buffer.copied is not None
        self._copying.append((buffer.copied.ended, lease))
        return lease.report

    def close(self) -> None:
        """End reads and copies, free the memory. Idempotent. In a forked process there is nothing to end."""
        if os.getpid() != self._process:
            return
        while self._copying:
            self._end_oldest()
        self._prefetcher.close()

    def _take(self, unit: Unit) -> Lease:
        number = self._numbers[unit.ops]
        in_turn = number == self._next and self._reads_ahead
        while self._copying and (
            not in_turn or len(self._copying) >= _COPYING or self._copying[0][0].is_done
        ):
            self._end_oldest()
        self._next = (number + 1) % len(self._numbers)
        try:
            return self._prefetcher.acquire(number)
        except PlanError:
            # When copies end decides where units lie, so those still copied can leave no hole long enough.
            if not self._copying:
                raise
        while self._copying:
            self._end_oldest()
        return self._prefetcher.acquire(number)

    def _end_oldest(self) -> None:
        ended, lease = self._copying.popleft()
        try:
            ended.wait()
        finally:
            lease.release()

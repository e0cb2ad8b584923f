"""Brings units ahead of use: while one is computed with, the next `depth` are on their way to where they are
used, which is staging memory or, for a device with memory of its own, a slot there.

How it stays correct. The consumer's thread decides everything (which unit, which memory) under one lock; one
background thread only submits reads, waits for them and runs the `on_read` hook. So a placement depends on
the order of the consumer's calls alone, and a signal can interrupt the consumer alone: what it leaves half
done is thrown away by the next call, after a fence through the background thread has made sure that nothing
is written any more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from endor.errors import LoadError, PlanError
from endor.loaders.accelerator import Copied
from endor.loaders.flight import Flight, FlightCrew, Hold, OnRead, Source
from endor.loaders.plan import LoadPlan, Unit
from endor.loaders.pool import Pool
from endor.loaders.reader import Moved, Reader, ReadReport, name_unit
from endor.loaders.staging import StagingPool

__all__ = ["Lease", "OnRead", "PrefetchStats", "Prefetcher"]


@dataclass(frozen=True)
class PrefetchStats(Moved):
    """Totals since the prefetcher was made; subtract two snapshots for what lies between them.

    The bytes are those of the units acquired; `discarded_bytes` come on top.
    """

    acquires: int = 0
    stall_s: float = 0.0
    """Time `acquire` waited for bytes."""
    read_s: float = 0.0
    """Time the reader was busy with the units acquired."""
    discarded_units: int = 0
    """Units read ahead, or begun, and given up because another one was asked for."""
    discarded_bytes: int = 0

    def __sub__(self, earlier: PrefetchStats) -> PrefetchStats:
        return PrefetchStats(
            **{field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)}
        )


class Lease:
    """A unit's bytes, valid inside its `with` and not after: they become another unit's."""

    _hold = Hold(released=True)  # until `__init__` has come to its end, which Ctrl-C may prevent

    def __init__(self, prefetcher: Prefetcher, flight: Flight) -> None:
        self._prefetcher = prefetcher
        self._flight = flight
        self._memory: memoryview | None = None
        self.stall_s = 0.0
        self.report = ReadReport()
        self._hold = Hold(released=False)
        flight.holds.append(self._hold)

    @property
    def released(self) -> bool:
        return self._hold.released

    @property
    def index(self) -> int:
        return self._flight.index

    @property
    def unit(self) -> Unit:
        return self._flight.unit

    @property
    def copied(self) -> Copied | None:
        """The copy to the device that brought the unit; None where there is no such copy."""
        return self._flight.buffer.copied

    @property
    def memory(self) -> memoryview:
        """All `unit.span_bytes` bytes; read `k` of the unit lies at `unit.op_offsets[k]`. Of host memory."""
        self._check_live()
        if self._memory is None:
            self._memory = self._flight.buffer.memory[: self.unit.span_bytes]
        return self._memory

    def tensor(self, offset_bytes: int = 0, length_bytes: int | None = None) -> torch.Tensor:
        """A uint8 view of a range of the unit where it is used, without a copy."""
        self._check_live()
        length = self.unit.span_bytes - offset_bytes if length_bytes is None else length_bytes
        return self._flight.buffer.tensor(offset_bytes, length)

    def op_tensor(self, op_index: int) -> torch.Tensor:
        """A uint8 view of exactly the bytes of one read of the unit."""
        offset_bytes = self._flight.buffer.offsets_of(self.unit)[op_index]
        return self.tensor(offset_bytes, self.unit.ops[op_index].length_bytes)

    def release(self) -> None:
        """Give the bytes up. Idempotent; the next unit's read may start into them at once."""
        if not self.released:
            self._hold.released = True
            if self._memory is not None:
                with contextlib.suppress(BufferError):  # something still looks at it
                    self._memory.release()
            self._prefetcher._after_release()

    def _check_live(self) -> None:
        if self.released:
            raise ValueError(f"lease of unit {self.unit.name!r} was used after it was released")

    def __enter__(self) -> Self:
        self._check_live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # No lock here: the collector may run us while this very thread holds it.
        if not self.released:
            self._hold.released = True
            warnings.warn(
                f"lease of unit {self.unit.name!r} was never released", ResourceWarning, stacklevel=2
            )


class Prefetcher:
    """Runs a `LoadPlan`: `acquire(i)` lends unit `i`, and the units after it, cyclically, are read meanwhile.

    The reader stays its owner's to close. A pool that is passed in must be lent to nobody else, and is closed
    with the prefetcher, like the one made here (of `plan.ring_bytes`) when none is passed.

    Args:
        plan: what is acquired.
        reader: of files.
        pool: of the memory that units are used in; host memory by default.
        on_read: see `OnRead`.
        source_of: says from where a unit is copied to a device's memory; None for one that is read there.
    """

    def __init__(
        self,
        plan: LoadPlan,
        reader: Reader,
        pool: Pool[Any] | None = None,
        *,
        on_read: OnRead | None = None,
        source_of: Callable[[Unit], Source | None] | None = None,
    ) -> None:
        if pool is not None and pool.capacity_bytes < plan.largest_unit_bytes:
            largest = max(plan.units, key=lambda unit: unit.span_bytes)
            raise PlanError(
                f"unit {largest.name!r} needs {largest.span_bytes} bytes of staging memory, the pool has"
                f" {pool.capacity_bytes}; {plan.ring_bytes} are needed for prefetch depth {plan.depth}"
            )
        self.plan = plan
        self._pool: Pool[Any] = StagingPool(plan.ring_bytes) if pool is None else pool
        self._source_of = source_of
        self._lock = threading.Lock()
        self._ahead: deque[Flight] = deque()
        self._held: list[Flight] = []
        self._next = 0
        self._interrupted = False
        self._closed = False
        self._stats = PrefetchStats()
        self._process = os.getpid()
        self._crew = FlightCrew(reader, on_read)

    def acquire(self, index: int) -> Lease:
        """Lend unit `index`, waiting until its bytes are there.

        Any order works; the plan's is the fast one. Raises LoadError (or what `on_read` raised) when its read
        failed, and asking again tries again; PlanError when the leases that are held leave no room for it.
        """
        if not 0 <= index < len(self.plan.units):
            raise PlanError(f"there is no unit {index}: the plan has {len(self.plan.units)}")
        began_s = perf_counter()
        lease: Lease | None = None
        try:
            with self._lock:
                self._check_usable()
                lease = self._lend(index)
            flight = lease._flight
            flight.done.wait()
            if flight.error is not None:
                raise name_unit(flight.error, flight.unit)
            flight.buffer.arrive()
            self._account(lease, perf_counter() - began_s)
            return lease
        except BaseException:  # also Ctrl-C while waiting: nobody will ever hold this lease
            if lease is not None:
                lease.release()
            raise

    def stats(self) -> PrefetchStats:
        return self._stats

    @property
    def ring_bytes(self) -> int:
        """Staging memory really taken."""
        return self._pool.capacity_bytes

    def close(self) -> None:
        """End reads and thread, free the memory. Idempotent. Leases still held become invalid and warn.

        In a process forked from the one that made it there is nothing to end.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            leaked = [flight.unit.name for flight in self._held if flight.is_leased]
            for flight in (*self._ahead, *self._held):
                self._crew.cancel(flight)
                for hold in flight.holds:
                    hold.released = True
            self._crew.close()
            self._ahead.clear()
            self._held.clear()
            self._pool.close()
        if leaked:
            warnings.warn(
                f"prefetcher closed while units were leased: {', '.join(leaked)}",
                ResourceWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Bookkeeping: all of what follows happens under the lock.

    def _check_usable(self) -> None:
        if self._closed:
            raise LoadError("the prefetcher is closed: load the model again")
        if os.getpid() != self._process:
            raise LoadError(
                "the prefetcher belongs to the process that made it: load the model again in this one"
            )

    def _lend(self, index: int) -> Lease:
        if self._interrupted:
            self._reset()
        self._interrupted = True  # until this function has come to its end
        self._collect()
        flight = next((held for held in self._held if held.index == index), None)
        if flight is None:
            flight = self._next_flight(index)
            self._held.append(flight)
        lease = Lease(self, flight)
        self._fill()
        self._interrupted = False
        return lease

    def _next_flight(self, index: int) -> Flight:
        """The flight of `index`: one that is ahead, or a new one; what lies before it is given up."""
        ahead = [flight.index for flight in self._ahead]
        self._discard(ahead.index(index) if index in ahead else len(ahead))
        if self._ahead:
            return self._ahead.popleft()
        flight = self._launch(index) or self._launch_after_zombies(index)
        if flight is None:
            self._interrupted = False
            raise self._no_room(self.plan.units[index])
        return flight

    def _launch_after_zombies(self, index: int) -> Flight | None:
        """Reads whose `acquire` was interrupted hold memory until they are done: end them and try again."""
        for flight in self._held:
            if not flight.is_leased:
                self._crew.cancel(flight)
        self._crew.fence()
        self._collect()
        return self._launch(index)

    def _launch(self, index: int) -> Flight | None:
        unit = self.plan.units[index]
        buffer = self._pool.try_allocate(unit.span_bytes)
        if buffer is None:
            return None
        source = None if self._source_of is None else self._source_of(unit)
        flight = Flight(index, unit, buffer, source)
        self._crew.launch(flight)
        self._next = (index + 1) % len(self.plan.units)
        return flight

    def _fill(self) -> None:
        """Read ahead until `depth + 1` units are in memory or on their way."""
        while self.plan.depth and len(self._ahead) + len(self._held) <= self.plan.depth:
            flight = self._launch(self._next)
            if flight is None:
                break
            self._ahead.append(flight)

    def _collect(self) -> None:
        """Take back the memory of units that nobody leases and nobody writes to."""
        for flight in self._held:
            if flight.done.is_set and not flight.is_leased:
                flight.buffer.release()
        self._held = [flight for flight in self._held if not flight.buffer.released]

    def _discard(self, count: int) -> None:
        """Give up the first `count` units that were read ahead."""
        dropped = [self._ahead.popleft() for _ in range(count)]
        if dropped:
            self._abandon(dropped)
            for flight in dropped:
                flight.buffer.release()

    def _abandon(self, flights: list[Flight]) -> None:
        for flight in flights:
            self._crew.cancel(flight)
        for flight in flights:
            flight.done.wait()
        self._stats = _plus(
            self._stats,
            discarded_units=len(flights),
            discarded_bytes=sum(flight.report.bytes_read for flight in flights),
        )

    def _reset(self) -> None:
        """After an interrupted call: keep what is leased, forget everything else."""
        self._abandon(list(self._ahead))
        self._crew.fence()  # also what was launched and not yet noted
        self._ahead.clear()
        self._held = [flight for flight in self._held if flight.is_leased]
        self._pool.settle()  # the device may be at work for leases that are lost
        self._pool.reclaim(keep=[flight.buffer for flight in self._held])

    def _after_release(self) -> None:
        with self._lock:
            if self._closed or self._interrupted or os.getpid() != self._process:
                return
            self._interrupted = True
            self._collect()
            self._fill()
            self._interrupted = False

    def _account(self, lease: Lease, stall_s: float) -> None:
        report = lease._flight.report
        first = lease._flight.holds[0] is lease._hold
        lease.stall_s = stall_s
        lease.report = report if first else ReadReport()  # a second lease of the same bytes read nothing
        with self._lock:
            self._stats = _plus(self._stats, acquires=1, stall_s=stall_s, **vars(lease.report))

    def _no_room(self, unit: Unit) -> PlanError:
        held = ", ".join(f"{flight.unit.name!r} ({flight.unit.span_bytes} bytes)" for flight in self._held)
        return PlanError(
            f"unit {unit.name!r} needs {unit.span_bytes} bytes of staging memory, the ring has"
            f" {self._pool.capacity_bytes} and these units are leased: {held}; release one first or"
            " use a larger depth"
        )


def _plus(stats: PrefetchStats, **more: float) -> PrefetchStats:
    return PrefetchStats(
        **{field.name: getattr(stats, field.name) + more.get(field.name, 0) for field in fields(stats)}
    )

"""One unit's way to where it is used, and the background thread that takes it there.

The thread submits reads, waits for them, runs the `on_read` hook and, for a device with memory of its own,
starts the copy on; it decides nothing. Signals never reach it, so what it has begun it finishes, and a latch
put into its queue (a fence) opens when everything before it is done.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from endor.errors import LoadError
from endor.loaders.latch import Latch
from endor.loaders.plan import Unit
from endor.loaders.pool import Buffer
from endor.loaders.reader import Moved, Reader, ReadReport, Ticket, drain

__all__ = ["Flight", "FlightCrew", "Hold", "OnRead", "Source"]

OnRead = Callable[[int, memoryview], None]
"""Called in the background thread with a unit's index and memory after each read of it; what it raises
surfaces at `acquire`. The memory is `Unit.span_bytes` long, the unit's reads lie at `Unit.op_offsets`."""


class Source(Protocol):
    """Host memory that units are copied to a device from."""

    def bring(self, unit: Unit, buffer: Buffer) -> Moved:
        """Start the copy of a unit to its slot, and see to it that its bytes stay until that has ended.

        Called in the background thread, in the order of use. Returns what it took to have the bytes; raises
        what reading them raises.
        """
        ...


class Hold:
    """One lease's claim on a flight's memory, given up by a single store that no signal can split."""

    __slots__ = ("released",)

    def __init__(self, *, released: bool) -> None:
        self.released = released


class Flight:
    """One unit on its way into, or in, the memory it is used in.

    After `done` no thread writes to the buffer any more. A device may still copy to it: who uses it lets it
    `arrive`. With a `source` nothing is read to the buffer; it is copied from there.
    """

    __slots__ = (
        "buffer",
        "cancelled",
        "done",
        "error",
        "holds",
        "index",
        "report",
        "source",
        "tickets",
        "unit",
    )

    def __init__(self, index: int, unit: Unit, buffer: Buffer, source: Source | None = None) -> None:
        self.index = index
        self.unit = unit
        self.buffer = buffer
        self.source = source
        self.done = Latch()
        self.cancelled = False
        self.error: BaseException | None = None
        self.report = ReadReport()
        self.tickets: list[Ticket] = []
        self.holds: list[Hold] = []

    @property
    def is_leased(self) -> bool:
        return any(not hold.released for hold in self.holds)


class FlightCrew:
    """The background thread: takes flights in order, each as far as its `done`."""

    def __init__(self, reader: Reader, on_read: OnRead | None) -> None:
        self._reader = reader
        self._tasks: SimpleQueue[Flight | Latch | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_work, args=(self._tasks, reader, on_read), name="endor-prefetch", daemon=True
        )
        # Also when the owner forgets `close`: at collection or exit, the thread still goes.
        self._finalizer = weakref.finalize(self, _shut_down, self._tasks, self._thread)
        self._thread.start()

    def launch(self, flight: Flight) -> None:
        self._tasks.put(flight)

    def cancel(self, flight: Flight) -> None:
        """Give up what has not been read yet; the memory is free after the next `fence`."""
        flight.cancelled = True
        for ticket in tuple(flight.tickets):
            self._reader.cancel(ticket)

    def fence(self) -> None:
        """Return when every flight launched before is done."""
        fence = Latch()
        self._tasks.put(fence)
        fence.wait()

    def close(self) -> None:
        """Finish what was launched and end the thread. May be repeated, as after a Ctrl-C."""
        _shut_down(self._tasks, self._thread)
        self._finalizer.detach()


def _work(tasks: SimpleQueue[Flight | Latch | None], reader: Reader, on_read: OnRead | None) -> None:
    """Finish tasks in order; submit every known read before waiting for the oldest: the disk never idles.

    What a device still uses cannot be written to yet. Such a flight is submitted later, in its turn,
    because behind it in the queue may be others that have nothing to wait for.
    """
    started: deque[Flight | Latch | None] = deque()
    waiting: deque[Flight] = deque()
    while True:
        while not started or not tasks.empty():
            task = tasks.get()
            started.append(task)
            if isinstance(task, Flight):
                waiting.append(task)
            _submit_writable(waiting, reader)
        oldest = started.popleft()
        if oldest is None:
            return
        if isinstance(oldest, Latch):
            oldest.set()
            continue
        if oldest in waiting:  # then it is the first of them
            _submit(waiting.popleft(), reader)
        _submit_writable(waiting, reader)
        _finish(oldest, reader, on_read)


def _submit_writable(waiting: deque[Flight], reader: Reader) -> None:
    while waiting and _is_writable(waiting[0]):
        _submit(waiting.popleft(), reader)


def _is_writable(flight: Flight) -> bool:
    try:
        return flight.cancelled or flight.source is not None or flight.buffer.is_writable
    except BaseException:  # noqa: BLE001 - `_submit` meets the same failure and keeps it
        return True


def _submit(flight: Flight, reader: Reader) -> None:
    try:
        ops = zip(flight.unit.ops, flight.unit.op_offsets, strict=True) if flight.source is None else ()
        for op, start in ops:
            flight.buffer.wait_writable()
            if flight.cancelled:
                break
            flight.tickets.append(flight.buffer.submit(reader, op, start))
    except BaseException as error:  # noqa: BLE001 - a thread's boundary: it is raised again where the unit is acquired
        flight.error = error
        flight.cancelled = True
    if flight.cancelled:  # also when that happened while we submitted
        for ticket in flight.tickets:
            reader.cancel(ticket)


def _finish(flight: Flight, reader: Reader, on_read: OnRead | None) -> None:
    try:
        for ticket in flight.tickets:
            flight.report += reader.wait(ticket)
        if not flight.cancelled:
            if flight.source is not None:
                flight.report += flight.source.bring(flight.unit, flight.buffer)
            elif on_read is not None:
                on_read(flight.index, flight.buffer.read_bytes(flight.unit.span_bytes))
    except BaseException as error:  # noqa: BLE001 - a thread's boundary, as above
        flight.error = flight.error or error
        drain(reader, flight.tickets)
    if flight.cancelled and flight.error is None:
        flight.error = LoadError("the read was given up")
    flight.tickets.clear()
    flight.done.set()


def _shut_down(tasks: SimpleQueue[Flight | Latch | None], thread: threading.Thread) -> None:
    tasks.put(None)
    if thread is not threading.current_thread():  # the collector may run us anywhere
        thread.join()

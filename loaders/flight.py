"""One unit's way into staging memory, and the background thread that takes it there.

The thread submits reads, waits for them and runs the `on_read` hook; it decides nothing. Signals never reach
it, so what it has begun it finishes, and a latch put into its queue (a fence) opens when everything before it
is done.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from endor.errors import LoadError
from endor.loaders.latch import Latch
from endor.loaders.plan import Unit
from endor.loaders.reader import Reader, ReadReport, Ticket, drain
from endor.loaders.staging import StagingBuffer

__all__ = ["Flight", "FlightCrew", "Hold", "OnRead"]

OnRead = Callable[[int, memoryview], None]
"""Called in the background thread with a unit's index and memory after each read of it; what it raises
surfaces at `acquire`. The memory is `Unit.span_bytes` long, the unit's reads lie at `Unit.op_offsets`."""


class Hold:
    """One lease's claim on a flight's memory, given up by a single store that no signal can split."""

    __slots__ = ("released",)

    def __init__(self, *, released: bool) -> None:
        self.released = released


class Flight:
    """One unit on its way into, or in, staging memory. After `done` nobody writes to the buffer any more."""

    __slots__ = ("buffer", "cancelled", "done", "error", "holds", "index", "report", "tickets", "unit")

    def __init__(self, index: int, unit: Unit, buffer: StagingBuffer) -> None:
        self.index = index
        self.unit = unit
        self.buffer = buffer
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
    """Finish tasks in order; submit every known read before waiting for the oldest: the disk never idles."""
    started: deque[Flight | Latch | None] = deque()
    while True:
        while not started or not tasks.empty():
            task = tasks.get()
            if isinstance(task, Flight):
                _submit(task, reader)
            started.append(task)
        oldest = started.popleft()
        if oldest is None:
            return
        if isinstance(oldest, Latch):
            oldest.set()
        else:
            _finish(oldest, reader, on_read)


def _submit(flight: Flight, reader: Reader) -> None:
    memory = flight.buffer.memory
    try:
        for op, start in zip(flight.unit.ops, flight.unit.op_offsets, strict=True):
            if flight.cancelled:
                break
            flight.tickets.append(reader.submit(op, memory[start : start + op.length_bytes]))
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
        if on_read is not None and not flight.cancelled:
            on_read(flight.index, flight.buffer.memory[: flight.unit.span_bytes])
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

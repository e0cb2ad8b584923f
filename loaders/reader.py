"""The contract of a reader: what moves byte ranges of files into memory while its caller does other work.

Ownership. From `submit` until `wait` returns or raises, the reader may write to the destination: the caller
keeps it alive and does not use it. Once `wait` has returned, or raised, the reader never touches it again.
`close` ends every read in flight in that sense, so a destination may be freed after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from endor.errors import EndorError, LoadError
from endor.loaders.latch import Latch
from endor.loaders.plan import ReadOp, Unit

__all__ = [
    "BusyClock",
    "Destination",
    "DeviceMemory",
    "DeviceReader",
    "DirectMode",
    "Moved",
    "ReadReport",
    "Reader",
    "Ticket",
    "device_reader",
    "read_unit",
]

DirectMode = Literal["auto"] | bool
"""Whether to read around the page cache: True and False are rules, `auto` asks what the cache holds."""


class DeviceMemory(Protocol):
    """Contiguous bytes on a GPU, as a uint8 tensor of torch or cupy is."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

    def __getitem__(self, key: slice, /) -> Any: ...


Destination = memoryview | DeviceMemory


@dataclass(frozen=True)
class Moved:
    """Bytes by the path that really served them."""

    bytes_direct: int = 0
    """From the disk, around the page cache."""
    bytes_buffered: int = 0
    """Through the page cache."""
    bytes_gds: int = 0
    """From the disk to the GPU, with no copy in host memory (GPUDirect Storage)."""
    bytes_memory: int = 0
    """Copied from what is held in host memory."""

    @property
    def bytes_read(self) -> int:
        return self.bytes_direct + self.bytes_buffered + self.bytes_gds + self.bytes_memory


@dataclass(frozen=True)
class ReadReport(Moved):
    """What one read or several took: bytes by path, and time.

    Time in which two reads were in flight counts once, so that the sum over a reader's tickets is the time in
    which it was busy.
    """

    read_s: float = 0.0

    def __add__(self, other: Moved) -> ReadReport:
        both = {name: getattr(self, name) + getattr(other, name, 0) for name in _REPORTED}
        return ReadReport(**both)


_REPORTED = tuple(field.name for field in fields(ReadReport))


class BusyClock:
    """Splits the time in which a reader is busy among its reads, which end nearly in the order they began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted_until_s = 0.0

    def count(self, began_s: float) -> float:
        """Seconds of a read that began at `began_s` and ends now, without what is counted already."""
        with self._lock:
            now_s = perf_counter()
            taken_s = now_s - max(began_s, self._counted_until_s)
            self._counted_until_s = now_s
            return taken_s


class Ticket:
    """A submitted read, finished when all its parts are: readers report parts, callers use `Reader.wait`."""

    def __init__(self, op: ReadOp, destination: Destination, *, parts: int, clock: BusyClock) -> None:
        self.op = op
        self.destination = destination
        self.stopped = False
        self._left = parts
        self._lock = threading.Lock()
        self._done = Latch()
        self._error: BaseException | None = None
        self._clock = clock
        self._began_s = 0.0
        self._report = ReadReport()

    @property
    def is_done(self) -> bool:
        return self._done.is_set

    def begin_part(self) -> bool:
        """Whether the part is still wanted; after an error or a cancellation the rest is skipped."""
        with self._lock:
            if not self._began_s:
                self._began_s = perf_counter()
            if self.stopped and self._error is None:
                self._error = LoadError(
                    f"{self.op.file}: the read at offset {self.op.offset_bytes} was cancelled"
                )
            return self._error is None

    def end_part(self, moved: Moved, error: BaseException | None = None) -> None:
        """Account for one part; the last one finishes the ticket."""
        with self._lock:
            self._report += moved
            self._error = self._error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._report += ReadReport(read_s=self._clock.count(self._began_s))
            self._done.set()

    @property
    def is_last_part(self) -> bool:
        """Whether one part is left; meaningful to the thread that is about to end it."""
        with self._lock:
            return self._left == 1

    def result(self) -> ReadReport:
        """Block until all parts have ended; raise the first error."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._report


class Reader(Protocol):
    """Reads byte ranges in the background. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """What `--reader` and statistics call it."""
        ...

    def submit(self, op: ReadOp, destination: memoryview) -> Ticket:
        """Start reading `op` into `destination`, which has exactly `op.length_bytes` writable bytes.
        Raises LoadError when the file cannot be opened or is too short, and when the reader is closed;
        PlanError when the destination does not fit.
        """
        ...

    def wait(self, ticket: Ticket) -> ReadReport:
        """Return when every byte is in place; raise LoadError when that cannot be. May be called again."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Give up what has not begun. `wait` is still owed, and raises LoadError if anything was left out."""
        ...

    def close(self) -> None:
        """End all reads, threads and descriptors. Idempotent. Tickets left unfinished raise from `wait`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class DeviceReader(Reader, Protocol):
    """A reader that writes to device memory by itself, by GPUDirect Storage."""

    @property
    def serves_device(self) -> bool:
        """Whether it really does here; otherwise it is a reader like any other."""
        ...

    def submit(self, op: ReadOp, destination: Destination) -> Ticket:
        """As `Reader.submit`, also into device memory."""
        ...

    def register(self, memory: DeviceMemory) -> Callable[[], None]:
        """Prepare device memory for being read into, once; what is returned undoes that."""
        ...


def device_reader(reader: Reader) -> DeviceReader | None:
    """`reader` as one that writes to device memory, if it does."""
    return reader if getattr(reader, "serves_device", False) else None  # type: ignore[return-value]


def read_unit(reader: Reader, unit: Unit, memory: memoryview) -> ReadReport:
    """Read one unit now, its reads at their `Unit.op_offsets` in `memory`: for what is loaded to stay.

    Errors name the unit.
    """
    tickets: list[Ticket] = []
    try:
        for op, start in zip(unit.ops, unit.op_offsets, strict=True):
            tickets.append(reader.submit(op, memory[start : start + op.length_bytes]))
        return sum((reader.wait(ticket) for ticket in tickets), ReadReport())
    except (
        BaseException
    ) as error:  # also Ctrl-C: `memory` is the caller's again only when no read is in flight
        drain(reader, tickets)
        named = name_unit(error, unit)
        if named is error:
            raise
        raise named from error


def name_unit(error: BaseException, unit: Unit) -> BaseException:
    """An error of reading `unit`, with its name."""
    if type(error) is LoadError and not str(error).startswith(f"unit {unit.name!r}: "):
        named = LoadError(f"unit {unit.name!r}: {error}", errno=error.errno)
        named.__cause__ = error
        return named
    if isinstance(error, EndorError):
        error.add_note(f"while unit {unit.name!r} was read")
    return error


def drain(reader: Reader, tickets: Sequence[Ticket]) -> None:
    """Cancel and wait for all of `tickets`; their errors are not news."""
    for ticket in tickets:
        reader.cancel(ticket)
    for ticket in tickets:
        try:
            reader.wait(ticket)
        except LoadError:
            continue

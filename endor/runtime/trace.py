"""What happened when: events of a run in the Trace Event Format, which chrome://tracing and Perfetto show.

Format: "Trace Event Format", Google, JSON object form, complete ("X") events in microseconds.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from endor.formats.writer import atomic_write
from endor.loaders import Destination, DeviceMemory, Reader, ReadOp, ReadReport, Ticket, device_reader

__all__ = ["Trace", "TracedReader"]

_MAX_EVENTS = 1_000_000
_TRACKS = {"forward": 1, "block": 2, "decode": 3, "stall": 4, "read": 5, "copy": 6}


class Trace:
    """Collects events in memory, at most a million (about 100 bytes each); `save` writes them.

    Any thread may add events. Tracks: `forward`, `block` (from the moment a block's bytes are there until it
    is done), `decode`, `stall` (the model waits for bytes), `read` (the reader is busy), `copy` (to a device
    with its own memory). With such a device `forward`, `decode`, `stall` and `copy` are its own time, the
    rest is that of the thread that gives it work.
    """

    def __init__(self) -> None:
        self._began_s = perf_counter()
        self._lock = threading.Lock()
        self._events: list[tuple[str, str, float, float, dict[str, Any]]] = []
        self.dropped = 0

    def add(self, track: str, name: str, began_s: float, ended_s: float, **details: Any) -> None:
        """An event between two values of `time.perf_counter`."""
        with self._lock:
            if len(self._events) < _MAX_EVENTS:
                self._events.append((track, name, began_s, ended_s, details))
            else:
                self.dropped += 1

    @contextmanager
    def during(self, track: str, name: str, **details: Any) -> Iterator[None]:
        """An event as long as the context, whatever ends it."""
        began_s = perf_counter()
        try:
            yield
        finally:
            self.add(track, name, began_s, perf_counter(), **details)

    def to_json(self) -> dict[str, Any]:
        """The events as the format wants them."""
        process = os.getpid()
        tracks = [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": tid, "args": {"name": track}}
            for track, tid in _TRACKS.items()
        ]
        with self._lock:
            events = [
                {
                    "ph": "X",
                    "cat": track,
                    "name": name,
                    "pid": process,
                    "tid": _TRACKS[track],
                    "ts": round((began_s - self._began_s) * 1e6, 3),
                    "dur": round((ended_s - began_s) * 1e6, 3),
                    "args": details,
                }
                for track, name, began_s, ended_s, details in self._events
            ]
        return {
            "traceEvents": tracks + events,
            "displayTimeUnit": "ms",
            "otherData": {"dropped": self.dropped},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the events so far to a file. Raises OSError."""
        atomic_write(Path(path), json.dumps(self.to_json()).encode())


class TracedReader:
    """A reader that says when another one was busy; owns it."""

    def __init__(self, reader: Reader, trace: Trace) -> None:
        self._reader = reader
        self._trace = trace
        self._lock = threading.Lock()
        self._submitted_s: dict[int, float] = {}
        self._busy_until_s = 0.0

    @property
    def name(self) -> str:
        return self._reader.name

    @property
    def serves_device(self) -> bool:
        """See `DeviceReader`."""
        return device_reader(self._reader) is not None

    def register(self, memory: DeviceMemory) -> Callable[[], None]:
        """See `DeviceReader`."""
        reader = device_reader(self._reader)
        assert reader is not None
        return reader.register(memory)

    def submit(self, op: ReadOp, destination: Destination) -> Ticket:
        began_s = perf_counter()
        if isinstance(destination, memoryview):
            ticket = self._reader.submit(op, destination)
        else:
            reader = device_reader(self._reader)
            assert reader is not None
            ticket = reader.submit(op, destination)
        with self._lock:
            self._submitted_s[id(ticket)] = began_s
        return ticket

    def wait(self, ticket: Ticket) -> ReadReport:
        try:
            report = self._reader.wait(ticket)
        finally:
            with self._lock:
                submitted_s = self._submitted_s.pop(id(ticket), None)
                # Reads are served in the order of their submission: one begins when the last has ended.
                began_s = max(submitted_s or 0.0, self._busy_until_s)
                ended_s = max(began_s, perf_counter())
                if submitted_s is not None:
                    self._busy_until_s = ended_s
        if submitted_s is not None:
            op = ticket.op
            self._trace.add(
                "read", op.file.name, began_s, ended_s, offset=op.offset_bytes, bytes=report.bytes_read
            )
        return report

    def cancel(self, ticket: Ticket) -> None:
        self._reader.cancel(ticket)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

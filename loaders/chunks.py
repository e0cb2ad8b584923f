"""What readers with threads of their own share: reads cut into chunks, a queue of them, a few threads.

A read is cut into equal chunks so that the threads finish together. A reader says which kind of file it
opens; how a chunk is read is the file's business.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import ClassVar, Self

from endor.errors import LoadError, PlanError
from endor.loaders.files import SourceFile
from endor.loaders.latch import Latch
from endor.loaders.plan import PAGE_BYTES, ReadOp, round_up
from endor.loaders.reader import BusyClock, Destination, Moved, ReadReport, Ticket

__all__ = ["ChunkedReader"]


@dataclass(frozen=True)
class _Chunk:
    """A part of one read, for one thread."""

    ticket: Ticket
    file: SourceFile
    start: int
    end: int
    direct: bool
    closing: Latch

    def run(self) -> None:
        ticket = self.ticket
        moved = Moved()
        failure: BaseException | None = None
        try:
            ticket.stopped = ticket.stopped or self.closing.is_set
            if ticket.begin_part():
                moved = self._read()
                if ticket.is_last_part and not moved.bytes_memory:
                    self.file.check_unchanged()
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: whatever it is belongs to the one who waits
            failure = error
        ticket.end_part(moved, failure)

    def _read(self) -> Moved:
        part = self.ticket.destination[self.start : self.end]
        try:
            return self.file.read(part, self.ticket.op.offset_bytes + self.start, direct=self.direct)
        finally:
            if isinstance(part, memoryview):
                part.release()


class ChunkedReader:
    """A `Reader` that reads with `threads` threads, `chunk_bytes` at a time.

    Subclasses give their name and, to `__init__`, how a file is opened.
    """

    name: ClassVar[str]
    takes_device_memory: ClassVar[bool] = False

    def __init__(self, open_file: Callable[[Path], SourceFile], *, threads: int, chunk_bytes: int) -> None:
        if threads < 1:
            raise PlanError(f"a reader needs at least one thread, found {threads}")
        if chunk_bytes < PAGE_BYTES:
            raise PlanError(f"a chunk has at least {PAGE_BYTES} bytes, found {chunk_bytes}")
        self._open_file = open_file
        self._chunk_bytes = round_up(chunk_bytes, PAGE_BYTES)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._files: dict[Path, SourceFile] = {}
        self._closing = Latch()
        self._clock = BusyClock()
        self._chunks: SimpleQueue[_Chunk | None] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_serve, args=(self._chunks,), name=f"endor-{self.name}-{number}", daemon=True
            )
            for number in range(threads)
        ]
        # Also when the owner forgets `close`: at collection or exit, threads and descriptors still go.
        self._shut_down_arguments = (self._closing, self._chunks, self._threads, self._files)
        self._finalizer = weakref.finalize(self, _shut_down, *self._shut_down_arguments)
        for thread in self._threads:
            thread.start()

    def submit(self, op: ReadOp, destination: Destination) -> Ticket:
        address = self._address(op, destination)
        with self._lock:
            if self._closing.is_set:
                raise LoadError(f"{op.file}: the reader is closed")
            if os.getpid() != self._process:  # its threads are not here: nobody would ever read
                raise LoadError(
                    f"{op.file}: the reader belongs to the process that made it: load the model again in"
                    " this one"
                )
            file = self._files.get(op.file)
            if file is None:
                file = self._files[op.file] = self._open_file(op.file)
            file.check_long_enough(op)
            direct = file.wants_direct(op, address)
            bounds = _chunk_bounds(op, self._chunk_bytes)
            ticket = Ticket(op, destination, parts=len(bounds) - 1, clock=self._clock)
            for start, end in pairwise(bounds):
                self._chunks.put(_Chunk(ticket, file, start, end, direct, self._closing))
        return ticket

    def _address(self, op: ReadOp, destination: Destination) -> int:
        """Where the destination lies; PlanError if the read does not fit it."""
        if isinstance(destination, memoryview):
            return _host_address(op, destination)
        if not self.takes_device_memory:
            raise PlanError(
                f"{op.file}: reader {self.name} reads into host memory only, found a destination of type"
                f" {type(destination).__name__}"
            )
        return _device_address(op, destination)

    def wait(self, ticket: Ticket) -> ReadReport:
        return ticket.result()

    def cancel(self, ticket: Ticket) -> None:
        ticket.stopped = True

    def close(self) -> None:
        if os.getpid() != self._process:
            return
        with self._lock:
            _shut_down(*self._shut_down_arguments)
            self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _host_address(op: ReadOp, destination: memoryview) -> int:
    if destination.nbytes != op.length_bytes or destination.readonly or destination.itemsize != 1:
        raise PlanError(
            f"{op.file}: a read of {op.length_bytes} bytes needs as many writable bytes, found"
            f" {destination.nbytes} of format {destination.format!r}, readonly={destination.readonly}"
        )
    return ctypes.addressof(ctypes.c_char.from_buffer(destination))


def _device_address(op: ReadOp, destination: Destination) -> int:
    interface = getattr(destination, "__cuda_array_interface__", None)
    if interface is None:
        raise PlanError(
            f"{op.file}: a read goes into a memoryview or GPU memory, found {type(destination).__name__}"
        )
    address, readonly = interface["data"]
    shape, kind = tuple(interface["shape"]), str(interface["typestr"])
    if shape != (op.length_bytes,) or kind != "|u1" or interface.get("strides") or readonly:
        raise PlanError(
            f"{op.file}: a read of {op.length_bytes} bytes needs as many contiguous writable uint8 in GPU"
            f" memory, found {kind} of shape {shape}, readonly={readonly}"
        )
    return int(address)


def _chunk_bounds(op: ReadOp, chunk_bytes: int) -> list[int]:
    """Where to cut a read: equal parts of about `chunk_bytes` at most, cut on the pages of the file."""
    parts = -(-op.length_bytes // chunk_bytes)
    length = round_up(-(-op.length_bytes // parts), PAGE_BYTES)
    first_cut = length - op.offset_bytes % PAGE_BYTES
    return [0, *range(first_cut, op.length_bytes, length), op.length_bytes]


def _serve(chunks: SimpleQueue[_Chunk | None]) -> None:
    """A reader thread's life. Holds no reference to the reader, so that a forgotten one is collected."""
    while (chunk := chunks.get()) is not None:
        chunk.run()
        del chunk  # not until the next one comes: it keeps the destination alive


def _shut_down(
    closing: Latch,
    chunks: SimpleQueue[_Chunk | None],
    threads: list[threading.Thread],
    files: dict[Path, SourceFile],
) -> None:
    """Let the queue run dry, then end threads and descriptors; threads first, they use the descriptors.

    Every step may be repeated, so that a `close` interrupted by Ctrl-C can be called again.
    """
    if not closing.is_set:
        closing.set()
    for _ in threads:
        chunks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the collector may run us anywhere
            thread.join()
    while files:
        files.popitem()[1].close()

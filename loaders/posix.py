"""Reads files with `preadv` in a few threads, around the page cache where that is faster.

One open file is a pair of descriptors: a direct one (O_DIRECT: the disk writes straight into the destination,
whole pages only) and a buffered one (through the page cache: any range). A read is cut into equal chunks so
that its threads finish together. Everything that can go wrong with a file is a LoadError that names it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import weakref
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Literal, Self

from endor.errors import LoadError, PlanError
from endor.loaders.latch import Latch
from endor.loaders.pagecache import cached_fraction
from endor.loaders.plan import PAGE_BYTES, ReadOp, round_up
from endor.loaders.reader import BusyClock, ReadReport, Ticket

__all__ = ["DirectMode", "PosixReader"]

DirectMode = Literal["auto"] | bool

DEFAULT_THREADS: Final = 2
DEFAULT_CHUNK_BYTES: Final = 16 << 20
_CACHED_ENOUGH: Final = 0.9
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere every read is buffered


@dataclass(frozen=True)
class _Identity:
    """What says that a file is still the one that was opened. Not its change time: deleting changes that."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class _OpenFile:
    """One file: its two descriptors, and the identity it had when it was opened."""

    def __init__(self, path: Path, *, direct: DirectMode) -> None:
        self.path = path
        self.policy = direct
        self.direct_descriptor: int | None = None
        try:
            self.buffered_descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.error("cannot be opened", error) from error
        try:
            self.identity = _Identity.of(os.fstat(self.buffered_descriptor))
            if direct and _O_DIRECT:
                self._open_direct()
        except OSError as error:
            self.close()
            raise self.error("cannot be opened", error) from error

    def _open_direct(self) -> None:
        try:
            self.direct_descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system without direct reads
                return
            raise
        if _Identity.of(os.fstat(self.direct_descriptor)) != self.identity:
            raise OSError(errno.ESTALE, "it was replaced at this moment")
        # The buffered descriptor now serves ragged ends and cached bytes: it must not read ahead.
        self._advise(random=True)

    def error(self, message: str, cause: OSError | None = None) -> LoadError:
        if cause is None:
            return LoadError(f"{self.path}: {message}")
        return LoadError(f"{self.path}: {message}: {cause.strerror}", errno=cause.errno)

    def wants_direct(self, op: ReadOp, address: int) -> bool:
        """Whether to go around the page cache; possible where the file and memory share a grid of pages."""
        if self.direct_descriptor is None or (address - op.offset_bytes) % PAGE_BYTES:
            return False
        if self.policy == "auto":
            return (
                cached_fraction(self.buffered_descriptor, op.offset_bytes, op.length_bytes) < _CACHED_ENOUGH
            )
        return True

    def refuse_direct(self) -> None:
        """For a file system that opens files for direct reads and then does not do them."""
        self.policy = False
        self._advise(random=False)

    def _advise(self, *, random: bool) -> None:
        if sys.platform == "linux":
            os.posix_fadvise(
                self.buffered_descriptor, 0, 0, os.POSIX_FADV_RANDOM if random else os.POSIX_FADV_NORMAL
            )

    def read(self, view: memoryview, offset_bytes: int, *, direct: bool) -> tuple[int, int]:
        """Fill `view` from `offset_bytes`; the bytes that came directly and through the page cache."""
        length = len(view)
        start, end = 0, 0
        if direct:  # whole pages directly, ragged ends through the page cache
            start = min(-offset_bytes % PAGE_BYTES, length)
            end = max(start, length - (offset_bytes + length) % PAGE_BYTES)
        moved = self._read_direct(view[start:end], offset_bytes + start) if end > start else 0
        if start:
            self._read_buffered(view[:start], offset_bytes)
        if start + moved < length:
            self._read_buffered(view[start + moved :], offset_bytes + start + moved)
        return moved, length - moved

    def _read_direct(self, view: memoryview, offset_bytes: int) -> int:
        """As many bytes as the file system reads directly; the caller gets the rest, if any, another way."""
        done = 0
        while done < len(view) and self.direct_descriptor is not None:
            try:
                got = os.preadv(self.direct_descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self.refuse_direct()
                    break
                raise self._failed(error, offset_bytes + done, len(view) - done) from error
            done += got - got % PAGE_BYTES
            if got % PAGE_BYTES or not got:  # the end of the file, or a device with larger blocks
                break
        return done

    def _read_buffered(self, view: memoryview, offset_bytes: int) -> None:
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.buffered_descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                raise self._failed(error, offset_bytes + done, len(view) - done) from error
            if not got:
                raise self.error(
                    f"the file ends at byte {offset_bytes + done}, expected {offset_bytes + len(view)} or"
                    " more: it was cut short; restore or convert it again"
                )
            done += got

    def _failed(self, error: OSError, offset_bytes: int, length_bytes: int) -> LoadError:
        return self.error(f"reading {length_bytes} bytes at offset {offset_bytes} failed", error)

    def check_long_enough(self, op: ReadOp) -> None:
        if op.end_bytes > self.identity.size_bytes:
            raise self.error(
                f"the file has {self.identity.size_bytes} bytes, expected at least {op.end_bytes}"
                f" (a read of {op.length_bytes} at offset {op.offset_bytes}): it was cut short;"
                " restore or convert it again"
            )

    def check_unchanged(self) -> None:
        """Raise LoadError unless this is still the file that was opened; a deleted one still serves."""
        try:
            found = _Identity.of(os.fstat(self.buffered_descriptor))
        except OSError as error:
            raise self.error("cannot be checked for changes", error) from error
        if found != self.identity:
            raise self.error(
                f"the file was modified while it was read: expected {self.identity}, found {found};"
                " load the model again"
            )
        try:
            found = _Identity.of(self.path.stat())
        except (FileNotFoundError, PermissionError):
            return
        except OSError as error:
            raise self.error("cannot be checked for changes", error) from error
        if found != self.identity:
            raise self.error(
                f"the file was replaced while it was read: expected {self.identity}, found {found};"
                " load the model again"
            )

    def close(self) -> None:
        os.close(self.buffered_descriptor)
        if self.direct_descriptor is not None:
            os.close(self.direct_descriptor)


@dataclass(frozen=True)
class _Chunk:
    """A part of one read, for one thread."""

    ticket: Ticket
    file: _OpenFile
    start: int
    end: int
    direct: bool
    closing: Latch

    def run(self) -> None:
        ticket = self.ticket
        direct = buffered = 0
        failure: BaseException | None = None
        try:
            ticket.stopped = ticket.stopped or self.closing.is_set
            if ticket.begin_part():
                with ticket.destination[self.start : self.end] as view:
                    direct, buffered = self.file.read(
                        view, ticket.op.offset_bytes + self.start, direct=self.direct
                    )
                if ticket.is_last_part:
                    self.file.check_unchanged()
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: whatever it is belongs to the one who waits
            failure = error
        ticket.end_part(direct=direct, buffered=buffered, error=failure)


class PosixReader:
    """A `Reader` of local files.

    `direct="auto"` reads around the page cache what is not in it; True always does so where the file system
    can; False never. `bytes_direct` and `bytes_buffered` in the reports say what really happened.
    """

    name = "posix"

    def __init__(
        self,
        *,
        direct: DirectMode = "auto",
        threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        if threads < 1:
            raise PlanError(f"a reader needs at least one thread, found {threads}")
        if chunk_bytes < PAGE_BYTES:
            raise PlanError(f"a chunk has at least {PAGE_BYTES} bytes, found {chunk_bytes}")
        self._direct: DirectMode = direct
        self._chunk_bytes = round_up(chunk_bytes, PAGE_BYTES)
        self._lock = threading.Lock()
        self._files: dict[Path, _OpenFile] = {}
        self._closing = Latch()
        self._clock = BusyClock()
        self._chunks: SimpleQueue[_Chunk | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_serve, args=(self._chunks,), name=f"endor-posix-{number}", daemon=True)
            for number in range(threads)
        ]
        # Also when the owner forgets `close`: at collection or exit, threads and descriptors still go.
        self._shut_down_arguments = (self._closing, self._chunks, self._threads, self._files)
        self._finalizer = weakref.finalize(self, _shut_down, *self._shut_down_arguments)
        for thread in self._threads:
            thread.start()

    def submit(self, op: ReadOp, destination: memoryview) -> Ticket:
        if destination.nbytes != op.length_bytes or destination.readonly or destination.itemsize != 1:
            raise PlanError(
                f"{op.file}: a read of {op.length_bytes} bytes needs as many writable bytes, found"
                f" {destination.nbytes} of format {destination.format!r}, readonly={destination.readonly}"
            )
        with self._lock:
            if self._closing.is_set:
                raise LoadError(f"{op.file}: the reader is closed")
            file = self._files.get(op.file)
            if file is None:
                file = self._files[op.file] = _OpenFile(op.file, direct=self._direct)
            file.check_long_enough(op)
            direct = file.wants_direct(op, ctypes.addressof(ctypes.c_char.from_buffer(destination)))
            bounds = _chunk_bounds(op, self._chunk_bytes)
            ticket = Ticket(op, destination, parts=len(bounds) - 1, clock=self._clock)
            for start, end in pairwise(bounds):
                self._chunks.put(_Chunk(ticket, file, start, end, direct, self._closing))
        return ticket

    def wait(self, ticket: Ticket) -> ReadReport:
        return ticket.result()

    def cancel(self, ticket: Ticket) -> None:
        ticket.stopped = True

    def close(self) -> None:
        with self._lock:
            _shut_down(*self._shut_down_arguments)
            self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _shut_down(
    closing: Latch,
    chunks: SimpleQueue[_Chunk | None],
    threads: list[threading.Thread],
    files: dict[Path, _OpenFile],
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

"""Reads files with `preadv` in a few threads, around the page cache where that is faster.

One open file is a pair of descriptors: a direct one (O_DIRECT: the disk writes straight into the destination, whole
pages only) and a buffered one (through the page cache: any range). A read is cut into equal chunks so that its
threads finish together. Everything that can go wrong with a file is a LoadError that names it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Literal, Self

from endor.errors import LoadError, PlanError

from .pagecache import cached_fraction
from .plan import PAGE_BYTES, ReadOp, round_up
from .reader import ReadReport, Ticket

__all__ = ["DirectMode", "PosixReader"]

DirectMode = Literal["auto"] | bool

DEFAULT_THREADS: Final = 2
DEFAULT_CHUNK_BYTES: Final = 16 << 20
_CACHED_ENOUGH: Final = 0.9


@dataclass(frozen=True)
class _Identity:
    """What says that a file is still the one that was opened."""

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
        self.direct_descriptor: int | None = None
        try:
            self.buffered_descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.identity = _Identity.of(os.fstat(self.buffered_descriptor))
            if direct:
                self._open_direct()
        except OSError as error:
            self.close()
            raise LoadError(error.errno, f"cannot be opened: {error.strerror}", str(path)) from error

    buffered_descriptor: int = -1

    def _open_direct(self) -> None:
        try:
            self.direct_descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system has no direct reads
                raise
            return
        # The buffered descriptor now serves ragged ends only: no read-ahead behind the direct reads' back.
        os.posix_fadvise(self.buffered_descriptor, 0, 0, os.POSIX_FADV_RANDOM)

"""A file that is being read: the identity it had when it was opened, and words for what can go wrong with it.

Each reader's kind of open file extends `SourceFile`: it says how a range is read and by which path.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from endor.errors import LoadError
from endor.loaders.pagecache import cached_fraction
from endor.loaders.plan import PAGE_BYTES, ReadOp
from endor.loaders.reader import Destination, DirectMode, Moved

__all__ = ["FileIdentity", "SourceFile", "whole_pages"]

_CACHED_ENOUGH = 0.9


@dataclass(frozen=True)
class FileIdentity:
    """What says that a file is still the one that was opened. Not its change time: deleting changes that."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def whole_pages(offset_bytes: int, length_bytes: int) -> tuple[int, int]:
    """The part of a range that is whole pages of the file, relative to the range's start; maybe empty."""
    start = min(-offset_bytes % PAGE_BYTES, length_bytes)
    return start, max(start, length_bytes - (offset_bytes + length_bytes) % PAGE_BYTES)


class SourceFile(ABC):
    """One open file: a descriptor that reads through the page cache, and whatever else its reader needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.error("cannot be opened", error) from error
        try:
            self.identity = FileIdentity.of(os.fstat(self.descriptor))
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, LoadError):
                raise self.error("cannot be opened", error) from error
            raise

    @abstractmethod
    def _open(self) -> None:
        """Open what else is needed; an OSError becomes a LoadError that names the file."""

    @abstractmethod
    def wants_direct(self, op: ReadOp, address: int) -> bool:
        """Whether `op` is to go around the page cache into memory at `address`."""

    @abstractmethod
    def read(self, destination: Destination, offset_bytes: int, *, direct: bool) -> Moved:
        """Fill `destination` from `offset_bytes`, and say which path the bytes really took."""

    def close(self) -> None:
        os.close(self.descriptor)

    def error(self, message: str, cause: OSError | None = None) -> LoadError:
        if cause is None:
            return LoadError(f"{self.path}: {message}")
        return LoadError(f"{self.path}: {message}: {cause.strerror}", errno=cause.errno)

    def failed(self, error: OSError, offset_bytes: int, length_bytes: int) -> LoadError:
        return self.error(f"reading {length_bytes} bytes at offset {offset_bytes} failed", error)

    def ends_early(self, found_bytes: int, expected_bytes: int) -> LoadError:
        return self.error(
            f"the file ends at byte {found_bytes}, expected {expected_bytes} or more: it was cut short;"
            " restore or convert it again"
        )

    def is_mostly_cached(self, op: ReadOp) -> bool:
        return cached_fraction(self.descriptor, op.offset_bytes, op.length_bytes) >= _CACHED_ENOUGH

    def suits_direct(self, op: ReadOp, address: int, policy: DirectMode) -> bool:
        """Whether `policy` has `op` read directly; possible where file and memory share a grid of pages."""
        if policy is False or (address - op.offset_bytes) % PAGE_BYTES:
            return False
        return policy is True or not self.is_mostly_cached(op)

    def advise(self, *, random: bool) -> None:
        """Whether the page cache is to read ahead of `descriptor`; not where others read it directly."""
        if sys.platform == "linux":
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM if random else os.POSIX_FADV_NORMAL)

    def read_buffered(self, view: memoryview, offset_bytes: int) -> None:
        """Fill `view` through the page cache."""
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                raise self.failed(error, offset_bytes + done, len(view) - done) from error
            if not got:
                raise self.ends_early(offset_bytes + done, offset_bytes + len(view))
            done += got

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
            found = FileIdentity.of(os.fstat(self.descriptor))
        except OSError as error:
            raise self.error("cannot be checked for changes", error) from error
        if found != self.identity:
            raise self.error(
                f"the file was modified while it was read: expected {self.identity}, found {found};"
                " load the model again"
            )
        try:
            found = FileIdentity.of(self.path.stat())
        except (FileNotFoundError, PermissionError):
            return
        except OSError as error:
            raise self.error("cannot be checked for changes", error) from error
        if found != self.identity:
            raise self.error(
                f"the file was replaced while it was read: expected {self.identity}, found {found};"
                " load the model again"
            )

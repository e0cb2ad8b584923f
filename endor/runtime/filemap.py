"""Files mapped into memory: for weights that the page cache has already, and for those used a few rows at a
time."""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from endor.errors import LoadError
from endor.loaders import PAGE_BYTES, cached_fraction

__all__ = ["MappedFile"]

_MAP_NORESERVE: Final = 0x4000  # Linux; not in Python's module. Private pages are made only where one writes


@dataclass(frozen=True)
class _Identity:
    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class MappedFile:
    """A whole file as a uint8 tensor whose pages are read when they are touched.

    The mapping is private: what a model writes to a weight never reaches the file. It is never unmapped by
    hand, because a tensor that looks at it would crash the process; it goes with the last of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LoadError(f"{path}: cannot be opened: {error.strerror}", errno=error.errno) from error
        try:
            self._identity = _Identity.of(os.fstat(self._descriptor))
            flags = mmap.MAP_PRIVATE | (_MAP_NORESERVE if sys.platform == "linux" else 0)
            self._map: mmap.mmap | None = mmap.mmap(
                self._descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except (OSError, ValueError) as error:
            os.close(self._descriptor)
            raise LoadError(f"{path}: cannot be mapped: {error}") from error
        with torch.inference_mode(mode=False):  # it outlives the forward that opens the file
            self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def bytes_at(self, offset_bytes: int, length_bytes: int) -> torch.Tensor:
        """A view of a range, uint8."""
        return self._tensor.narrow(0, offset_bytes, length_bytes)

    def cached_fraction(self, offset_bytes: int, length_bytes: int) -> float:
        """How much of a range the page cache has."""
        return cached_fraction(self._descriptor, offset_bytes, length_bytes)

    def expect_rows(self, offset_bytes: int, length_bytes: int) -> None:
        """A few pages of this range will be touched here and there: the system must not read around them."""
        self._advise("MADV_RANDOM", offset_bytes, length_bytes)

    def read_soon(self, offset_bytes: int, length_bytes: int) -> None:
        """All of this range will be touched: the system may begin to read it now."""
        self._advise("MADV_WILLNEED", offset_bytes, length_bytes)

    def _advise(self, advice: str, offset_bytes: int, length_bytes: int) -> None:
        if self._map is not None and hasattr(mmap, advice):
            start = offset_bytes - offset_bytes % PAGE_BYTES
            self._map.madvise(getattr(mmap, advice), start, offset_bytes + length_bytes - start)

    def check_unchanged(self) -> None:
        """Raise LoadError unless this is still the file that was mapped; a deleted one still serves."""
        found = _Identity.of(os.fstat(self._descriptor))
        try:
            at_path = _Identity.of(self.path.stat())
        except (FileNotFoundError, PermissionError):
            at_path = found
        if found != self._identity or at_path != self._identity:
            raise LoadError(
                f"{self.path}: the file was modified or replaced while a model uses it: expected "
                f"{self._identity}, found {found if found != self._identity else at_path}; load the model "
                "again"
            )

    def close(self) -> None:
        """Close the descriptor and forget the mapping. Idempotent."""
        if self._map is not None:
            self._map = None
            self._tensor = torch.empty(0, dtype=torch.uint8)
            os.close(self._descriptor)

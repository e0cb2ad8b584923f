"""What the system's page cache holds of a file, and how to make it hold nothing.

A direct read ignores the page cache, a buffered one of cached bytes is five times faster than the disk, and a
buffered one of uncached bytes is slower than a direct one. So somebody has to ask first.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from pathlib import Path
from typing import Final

from endor.loaders.plan import PAGE_BYTES

__all__ = ["cached_fraction", "drop_from_page_cache"]

_SYS_CACHESTAT: Final = 451  # Linux >= 6.5; the same number on x86-64, arm64 and riscv
_SAMPLED_PAGES: Final = 2


class _Range(ctypes.Structure):
    _fields_ = (("offset_bytes", ctypes.c_uint64), ("length_bytes", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent")
    )


_libc = ctypes.CDLL(None, use_errno=True)


def cached_fraction(descriptor: int, offset_bytes: int, length_bytes: int) -> float:
    """How much of a file's range is in the page cache, from 0 to 1; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0.0
    asked = _Range(offset_bytes, length_bytes)
    found = _Cachestat()
    failed = _libc.syscall(_SYS_CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(found), 0)
    if failed:  # an older kernel, or a file that is not ours and must not be observed
        return _sampled_fraction(descriptor, offset_bytes, length_bytes)
    first_page = offset_bytes // PAGE_BYTES
    end_page = -(-(offset_bytes + length_bytes) // PAGE_BYTES)
    return min(1.0, int(found.cached) / (end_page - first_page))


def _sampled_fraction(descriptor: int, offset_bytes: int, length_bytes: int) -> float:
    """1 if a few random bytes are served without waiting for the disk, else 0.

    Asking this way makes the kernel fetch the page it was asked for (one page, measured; a longer question
    would fetch all of it), so the places are random: the traces of earlier questions must not answer later
    ones.
    """
    byte = bytearray(1)
    for _ in range(_SAMPLED_PAGES):
        position = offset_bytes + random.randrange(length_bytes)
        try:
            if os.preadv(descriptor, [byte], position, os.RWF_NOWAIT) != 1:
                return 0.0
        except OSError:  # EAGAIN: not cached. EOPNOTSUPP: a file system that cannot say
            return 0.0
    return 1.0


def drop_from_page_cache(path: Path) -> None:
    """Write back what is dirty of a file and drop it from the page cache: the next read is from disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        if sys.platform == "linux":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)

"""Reads files through a mapping of them, safely: here for comparison and for those who ask for it.

Touching a mapped page of a file that was cut short, or that the disk cannot deliver, kills the process with
SIGBUS. So nothing here touches one: the kernel copies out of the mapping (`process_vm_readv` on ourselves),
and where a page cannot be had it says so instead. The posix reader is faster everywhere it was measured
(docs/design/loaders.md); `auto` never takes this one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np

from endor.loaders.chunks import ChunkedReader
from endor.loaders.files import SourceFile
from endor.loaders.plan import ReadOp
from endor.loaders.reader import Destination, Moved

__all__ = ["MmapReader"]

DEFAULT_THREADS: Final = 2
DEFAULT_CHUNK_BYTES: Final = 16 << 20

_copy_from_process = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)  # Linux


class _Range(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length_bytes", ctypes.c_size_t))


class _MappedFile(SourceFile):
    """One file and its mapping; where the kernel does not copy for us, the file is read instead."""

    def __init__(self, path: Path) -> None:
        self._map: mmap.mmap | None = None
        self._address = 0  # of the mapping; 0 where it cannot be copied from
        super().__init__(path)

    def _open(self) -> None:
        size = self.identity.size_bytes
        if size and _copy_from_process is not None:
            self._map = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data

    def wants_direct(self, op: ReadOp, address: int) -> bool:  # noqa: ARG002 - a mapping is the page cache
        return False

    def read(self, destination: Destination, offset_bytes: int, *, direct: bool) -> Moved:  # noqa: ARG002
        assert isinstance(destination, memoryview)
        done = self._copy(destination, offset_bytes)
        if done < len(destination):  # the file says what is wrong, in a system call and not by a signal
            self.read_buffered(destination[done:], offset_bytes + done)
        return Moved(bytes_buffered=len(destination))

    def _copy(self, view: memoryview, offset_bytes: int) -> int:
        """As many bytes as the mapping gives."""
        target = ctypes.addressof(ctypes.c_char.from_buffer(view))
        source = self._address + offset_bytes
        done = 0
        while self._address and _copy_from_process is not None and done < len(view):
            local = _Range(target + done, len(view) - done)
            remote = _Range(source + done, len(view) - done)
            got = _copy_from_process(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            if got <= 0:
                if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):  # a sandbox that forbids it
                    self._address = 0
                break
            done += got
        return done

    def close(self) -> None:
        super().close()
        if self._map is not None:
            self._map.close()


class MmapReader(ChunkedReader):
    """A `Reader` of local files through the page cache, by mapping them."""

    name = "mmap"

    def __init__(self, *, threads: int = DEFAULT_THREADS, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        super().__init__(_MappedFile, threads=threads, chunk_bytes=chunk_bytes)

"""Reads files with `preadv` in a few threads, around the page cache where that is faster.

One open file is a pair of descriptors: a direct one (O_DIRECT: the disk writes straight into the destination,
whole pages only) and a buffered one (through the page cache: any range). Everything that can go wrong with a
file is a LoadError that names it.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Final

from endor.loaders.chunks import ChunkedReader
from endor.loaders.files import FileIdentity, SourceFile, whole_pages
from endor.loaders.plan import PAGE_BYTES, ReadOp
from endor.loaders.reader import Destination, DirectMode, Moved

__all__ = ["PosixFile", "PosixReader"]

DEFAULT_THREADS: Final = 2
DEFAULT_CHUNK_BYTES: Final = 16 << 20
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere every read is buffered


class PosixFile(SourceFile):
    """One file and its two descriptors."""

    def __init__(self, path: Path, *, direct: DirectMode) -> None:
        self.policy: DirectMode = direct
        self.direct_descriptor: int | None = None
        super().__init__(path)

    def _open(self) -> None:
        if not self.policy or not _O_DIRECT:
            return
        try:
            self.direct_descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system without direct reads
                return
            raise
        if FileIdentity.of(os.fstat(self.direct_descriptor)) != self.identity:
            raise OSError(errno.ESTALE, "it was replaced at this moment")
        # The buffered descriptor now serves ragged ends and cached bytes: it must not read ahead.
        self.advise(random=True)

    def wants_direct(self, op: ReadOp, address: int) -> bool:
        return self.direct_descriptor is not None and self.suits_direct(op, address, self.policy)

    def refuse_direct(self) -> None:
        """For a file system that opens files for direct reads and then does not do them."""
        self.policy = False
        self.advise(random=False)

    def read(self, destination: Destination, offset_bytes: int, *, direct: bool) -> Moved:
        assert isinstance(destination, memoryview)
        view, length = destination, len(destination)
        # Whole pages directly, ragged ends through the page cache.
        start, end = whole_pages(offset_bytes, length) if direct else (0, 0)
        moved = self._read_direct(view[start:end], offset_bytes + start) if end > start else 0
        if start:
            self.read_buffered(view[:start], offset_bytes)
        if start + moved < length:
            self.read_buffered(view[start + moved :], offset_bytes + start + moved)
        return Moved(bytes_direct=moved, bytes_buffered=length - moved)

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
                raise self.failed(error, offset_bytes + done, len(view) - done) from error
            done += got - got % PAGE_BYTES
            if got % PAGE_BYTES or not got:  # the end of the file, or a device with larger blocks
                break
        return done

    def close(self) -> None:
        super().close()
        if self.direct_descriptor is not None:
            os.close(self.direct_descriptor)


class PosixReader(ChunkedReader):
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
        super().__init__(partial(PosixFile, direct=direct), threads=threads, chunk_bytes=chunk_bytes)

"""Reading files: pread, never a mapping, so that a truncated file gives an error and not SIGBUS."""

from __future__ import annotations

import os

from endor.errors import LoadError

__all__ = ["read_exactly"]


def read_exactly(fd: int, target: memoryview, offset: int, *, where: str) -> None:
    """Fill `target` from byte `offset` of an open file.

    Args:
        fd: open for reading.
        target: writable bytes.
        offset: from the start of the file.
        where: file and what is read from it, for messages.

    Raises LoadError where the file ends early or cannot be read.
    """
    done = 0
    try:
        while done < len(target):
            n = os.preadv(fd, [target[done:]], offset + done)
            if n == 0:
                raise LoadError(
                    f"{where}: the file ends at byte {offset + done}, expected {offset + len(target)}: it "
                    "was truncated. Copy it again or convert the model again"
                )
            done += n
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(
            f"{where}: cannot read at byte {offset + done}: {error.strerror}", errno=error.errno
        ) from error

"""The error tree: every failure Endor reports on purpose is an `EndorError`.

EndorError
├── FormatError (ValueError)      bytes that break a rule of docs/format.md
│   └── ChecksumError             a section's bytes are not the bytes that were written
├── LoadError (OSError)           reading weights failed: missing or short file, I/O error, replaced file
├── PlanError (ValueError)        the request cannot be met: a budget too small, an unknown device or reader
├── ConvertError (ValueError)     a source checkpoint or a conversion cannot go on
└── KernelError (RuntimeError)    a kernel was asked for something it cannot do, or failed

A message names the file and the entry, says what was expected and what was found, and what to do next.
This module imports nothing.
"""

from __future__ import annotations

__all__ = [
    "ChecksumError",
    "ConvertError",
    "EndorError",
    "FormatError",
    "KernelError",
    "LoadError",
    "PlanError",
]


class EndorError(Exception):
    """Base of every error Endor raises on purpose."""


class FormatError(EndorError, ValueError):
    """Bytes that break a rule of docs/format.md."""


class ChecksumError(FormatError):
    """A section's bytes are not the bytes that were written."""


class LoadError(EndorError, OSError):
    """Reading weights failed; `errno` is the operating system's number where it gave one."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class PlanError(EndorError, ValueError):
    """The request cannot be met, and the message says what could be."""


class ConvertError(EndorError, ValueError):
    """A source checkpoint cannot be read, or a conversion cannot go on."""


class KernelError(EndorError, RuntimeError):
    """A kernel was asked for something it cannot do, or failed."""

"""Section checksums: xxh3-64, fast enough (tens of GB/s) to check every section on its first read."""

from __future__ import annotations

import torch
import xxhash

from endor.errors import ChecksumError
from endor.formats.entries import Block, Section, TensorEntry
from endor.formats.files import read_exactly

__all__ = ["checksum", "section_digest", "tensor_bytes", "verify_block", "verify_digest", "verify_section"]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def checksum(data: memoryview | bytes) -> int:
    """xxh3-64 of `data`."""
    return xxhash.xxh3_64_intdigest(data)


_BUFFER_BYTES = 1 << 24


def section_digest(fd: int, section: Section, payload_begin: int, *, where: str) -> int:
    """xxh3-64 of a section of an open file, whatever its size, through one buffer. Raises LoadError."""
    buffer = memoryview(bytearray(min(section.nbytes, _BUFFER_BYTES)))
    hasher = xxhash.xxh3_64()
    for begin in range(section.begin, section.end, _BUFFER_BYTES):
        part = buffer[: min(_BUFFER_BYTES, section.end - begin)]
        read_exactly(fd, part, payload_begin + begin, where=where)
        hasher.update(part)
    return hasher.intdigest()


def verify_section(entry: TensorEntry, section: Section, data: memoryview, *, file: str) -> None:
    """Compare `data` with its checksum. Raises ChecksumError that names file, entry and section."""
    verify_digest(entry, section, checksum(data), file=file)


def verify_digest(entry: TensorEntry, section: Section, found: int, *, file: str) -> None:
    """Compare a checksum that was `found` with the header's. Raises ChecksumError."""
    if found != section.checksum:
        raise ChecksumError(
            f"{file}: entry {entry.name!r}, section {section.name} (payload bytes {section.begin} to "
            f"{section.end}): expected checksum {section.checksum:016x}, found {found:016x}. The file is "
            "damaged: copy it again or convert the model again [F16]"
        )


def verify_block(block: Block, data: memoryview, *, file: str) -> None:
    """Check every section of a block whose bytes are `data`. Raises ChecksumError."""
    for entry in block.entries:
        for section in entry.sections:
            part = data[section.begin - block.begin : section.end - block.begin]
            verify_section(entry, section, part, file=file)

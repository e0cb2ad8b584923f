"""Checks a checkpoint against every rule of docs/format.md and goes on after an error, to report all of them.

Memory is bounded by the largest packed entry: plain entries go through one buffer, and no file is read whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from endor.errors import FormatError, LoadError
from endor.formats.checksums import section_digest, verify_digest, verify_section
from endor.formats.entries import Block, Header, TensorEntry
from endor.formats.files import read_exactly
from endor.formats.header import read_header
from endor.formats.index import Index, check_record, check_shards, read_config, read_index, shard_numbers
from endor.formats.packed import PackedTensor

__all__ = ["Progress", "verify_checkpoint"]

Progress = Callable[[int, int], None]
"""Called with the bytes checked so far and the bytes of all payloads."""


def verify_checkpoint(directory: str | os.PathLike[str], *, progress: Progress | None = None) -> list[str]:
    """Check every file of a checkpoint: structure, checksums, contents and padding.

    Args:
        directory: of the checkpoint.
        progress: called now and then, in this thread.

    Returns one message per error, none for a whole checkpoint. Damage is never raised.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return [f"{directory}: no such model directory"]
    errors: list[str] = []
    index: Index | None = None
    with _noted(errors):
        read_config(directory)
    with _noted(errors):
        index = read_index(directory)
    headers = _read_headers(directory, index, errors)
    errors += _left_overs(directory, index)
    total_bytes = sum(header.payload_bytes for header in headers.values())
    done_bytes = 0
    for path, header in headers.items():
        for checked_bytes in _check_payload(path, header, errors):
            done_bytes += checked_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return errors


@contextmanager
def _noted(errors: list[str]) -> Iterator[None]:
    """Turn an exception about damage into a message."""
    try:
        yield
    except (FormatError, LoadError) as error:
        errors.append(str(error))


def _read_headers(directory: Path, index: Index | None, errors: list[str]) -> dict[Path, Header]:
    """The headers that can be read, compared with the index; without one, those of all shards there are."""
    records = {record.path: record for record in index.shards} if index else {}
    paths = list(records) or sorted(p for p in directory.iterdir() if shard_numbers(p.name))
    headers: dict[Path, Header] = {}
    for path in paths:
        with _noted(errors):
            header, data = read_header(path)
            headers[path] = header
            if path in records:
                check_record(records[path], header, data)
    if index and len(headers) == len(index.shards):
        with _noted(errors):
            check_shards(index, headers)
    return headers


def _left_overs(directory: Path, index: Index | None) -> Iterator[str]:
    """Files that a conversion left behind: nobody reads them, and they take space [F24]."""
    known = {record.path.name for record in index.shards} if index else None
    for path in sorted(directory.iterdir()):
        if path.name.endswith(".part"):
            yield f"{path}: an unfinished file; delete it [F24]"
        elif known is not None and shard_numbers(path.name) and path.name not in known:
            yield f"{path}: a shard that the index does not name; delete it, or convert the model again [F24]"


def _check_payload(path: Path, header: Header, errors: list[str]) -> Iterator[int]:
    """Check all sections and padding of a shard; yields the number of bytes after each."""
    with _noted(errors), _opened(path) as fd:
        for block in header.blocks:
            for entry in block.entries:
                with _noted(errors):
                    _check_entry(fd, path, header.payload_begin, entry)
                yield entry.nbytes
            with _noted(errors):
                _check_padding(fd, path, header.payload_begin, block)
            yield sum(end - begin for begin, end in block.padding())


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise LoadError(f"cannot open {path}: {error.strerror}", errno=error.errno) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _check_entry(fd: int, path: Path, payload_begin: int, entry: TensorEntry) -> None:
    """Checksums, then contents: what is damaged is reported as damaged, not as the nonsense it became."""
    if entry.layout.is_plain:
        (section,) = entry.sections
        verify_digest(
            entry, section, section_digest(fd, section, payload_begin, where=str(path)), file=str(path)
        )
        return
    sections = {}
    for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
        raw = torch.empty(section.nbytes, dtype=torch.uint8)
        read_exactly(fd, raw.numpy().data, payload_begin + section.begin, where=str(path))
        verify_section(entry, section, raw.numpy().data, file=str(path))
        sections[spec.name] = raw.view(spec.dtype).view(spec.shape)
    try:
        PackedTensor(entry.layout, sections).check()
    except FormatError as error:
        raise FormatError(f"{path}: entry {entry.name!r}: {error}") from None


def _check_padding(fd: int, path: Path, payload_begin: int, block: Block) -> None:
    for begin, end in block.padding():
        data = bytearray(end - begin)
        read_exactly(fd, memoryview(data), payload_begin + begin, where=str(path))
        if any(data):
            raise FormatError(
                f"{path}: block {block.name!r}: padding at payload bytes {begin} to {end} is not zero. The "
                "file is damaged: copy it again or convert the model again [F15]"
            )

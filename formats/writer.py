"""Writes an Endor checkpoint shard by shard, one tensor in memory at a time.

A shard is written as `NAME.part`: first its sections, behind a reserve for the header, then the header, then
fsync and a rename. A file under its final name is therefore whole. The index is written last, so a directory
without one is visibly unfinished.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from endor.errors import ConvertError, FormatError
from endor.formats.checksums import checksum, tensor_bytes
from endor.formats.entries import Block, Section, TensorEntry, section_tensor_name
from endor.formats.header import header_json, parse_header, read_header
from endor.formats.index import INDEX_NAME, index_json, shard_name
from endor.formats.layout import (
    BLOCK_ALIGNMENT_BYTES,
    PADDING_PREFIX,
    PREFIX_BYTES,
    SECTION_ALIGNMENT_BYTES,
    align_up,
)
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout

__all__ = [
    "INDEX_NAME",
    "CheckpointWriter",
    "ShardWriter",
    "atomic_write",
    "header_bytes_bound",
    "shard_name",
]

_ENTRY_OVERHEAD_BYTES = 2560
"""Eight sections at up to 250 bytes each (table row, checksum, padding) and 500 for the entry itself."""
_NAME_REPEATS = 12
_MOVE_BYTES = 1 << 24
_FLUSH_BYTES = 1 << 25
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def header_bytes_bound(names: Sequence[str]) -> int:
    """Room for the header of a shard that will hold entries, aliases and blocks with these names.

    Names full of characters that JSON escapes may need more; the writer then moves the payload when it
    finishes.
    """
    text = sum(_ENTRY_OVERHEAD_BYTES + _NAME_REPEATS * len(name.encode()) for name in names)
    return align_up(BLOCK_ALIGNMENT_BYTES + text, BLOCK_ALIGNMENT_BYTES)


def plain(tensor: torch.Tensor) -> PackedTensor:
    """A tensor as an entry that is stored as it is."""
    tensor = tensor.detach().contiguous()
    layout = TensorLayout(tuple(tensor.shape), tensor.dtype, "dense", "raw", tensor.numel())
    return PackedTensor(layout, {DENSE_SECTION: tensor})


class ShardWriter:
    """One shard in the making; a context manager that leaves either the whole file or none.

    Once a block or a write has failed the shard cannot be finished, whoever catches the error.

    Args:
        path: final path of the shard.
        header_reserve_bytes: room for the header, e.g. from `header_bytes_bound`.

    Raises:
        FormatError: a name is used twice, or an entry is added outside a block.
        ConvertError: the file cannot be written (the message has the operating system's reason).
    """

    def __init__(self, path: Path, *, header_reserve_bytes: int) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._payload_begin = align_up(max(header_reserve_bytes, 1), BLOCK_ALIGNMENT_BYTES)
        self._position = 0
        self._blocks: list[Block] = []
        self._entries: list[TensorEntry] | None = None
        self._padding: dict[str, tuple[int, int]] = {}
        self._names: set[str] = set()
        self._file: FileIO | None = None
        self._failed = False
        self._flushed = 0

    def __enter__(self) -> Self:
        with _write_errors(self._part):
            # Unbuffered: closing after a failed write must not try to write once more.
            self._file = FileIO(self._part, "w+")
            self._file.seek(self._payload_begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if kind is None:
                self._finish(file)
        finally:
            with suppress(OSError):  # what matters was checked by fsync; the .part has to go in any case
                file.close()
            with suppress(OSError):
                self._part.unlink(missing_ok=True)

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Start a block; entries added inside belong to it."""
        if self._entries is not None:
            raise FormatError(f"{self._path}: block {name!r} starts inside another block")
        if any(block.name == name for block in self._blocks):
            raise FormatError(f"{self._path}: block {name!r} is written twice [F14]")
        begin, self._entries = self._position, []
        failed, self._failed = self._failed, True  # until the block is whole
        yield
        self._pad_to(BLOCK_ALIGNMENT_BYTES, at_least=begin + 1)
        self._blocks.append(Block(name, begin, self._position, tuple(self._entries)))
        self._entries, self._failed = None, failed

    def add(
        self, name: str, tensor: PackedTensor | torch.Tensor, *, aliases: Sequence[str] = ()
    ) -> TensorEntry:
        """Append an entry to the open block; a torch.Tensor is stored as it is. Returns what was recorded."""
        if self._entries is None:
            raise FormatError(f"{self._path}: entry {name!r} is added outside a block")
        packed = plain(tensor) if isinstance(tensor, torch.Tensor) else tensor
        specs = packed.layout.sections
        self._claim(name, aliases, [section_tensor_name(name, spec.name) for spec in specs])
        sections = tuple(self._write_section(spec.name, packed.sections[spec.name]) for spec in specs)
        entry = TensorEntry(name, tuple(aliases), packed.layout, sections)
        self._entries.append(entry)
        return entry

    def _claim(self, name: str, aliases: Sequence[str], tensors: Sequence[str]) -> None:
        names = [*{name, *tensors}, *aliases]
        for i, claimed in enumerate(names):
            if claimed in self._names or claimed in names[:i]:
                raise FormatError(f"{self._path}: the name {claimed!r} is used twice [F14]")
        self._names.update(names)

    def _write_section(self, name: str, tensor: torch.Tensor) -> Section:
        self._pad_to(SECTION_ALIGNMENT_BYTES)
        data = tensor_bytes(tensor.cpu())
        begin = self._position
        self._write(data)
        return Section(name, begin, self._position, checksum(data))

    def _pad_to(self, alignment: int, *, at_least: int = 0) -> None:
        begin = self._position
        self._write(bytes(align_up(max(begin, at_least), alignment) - begin))
        if self._position > begin:
            self._padding[f"{PADDING_PREFIX}{len(self._padding)}"] = (begin, self._position)

    def _write(self, data: memoryview | bytes) -> None:
        if self._file is None:
            raise FormatError(f"{self._path}: a shard is written inside its with statement")
        with _write_errors(self._part):
            _write_all(self._file, data)
        self._position += len(data)
        if self._position - self._flushed >= _FLUSH_BYTES:
            _start_writeback(self._file, self._payload_begin + self._flushed, self._position - self._flushed)
            self._flushed = self._position

    def _finish(self, file: FileIO) -> None:
        if self._failed or self._entries is not None:
            raise FormatError(f"{self._path}: a block failed, so the shard cannot be finished")
        body = header_json(tuple(self._blocks), self._padding)
        with _write_errors(self._part):
            self._make_room(file, align_up(PREFIX_BYTES + len(body), BLOCK_ALIGNMENT_BYTES))
            length = self._payload_begin - PREFIX_BYTES
            data = length.to_bytes(PREFIX_BYTES, "little") + body.ljust(length, b" ")
            file.seek(0)
            _write_all(file, data)
            parse_header(data, file_bytes=os.fstat(file.fileno()).st_size, file=str(self._path))
            os.fsync(file.fileno())
            self._part.replace(self._path)
            _sync_directory(self._path.parent)

    def _make_room(self, file: FileIO, needed: int) -> None:
        """Move the payload towards the end if the header outgrew its reserve, last bytes first: no byte is
        overwritten
        before it has moved, and no second copy needs space. A crash leaves a .part, as everywhere."""
        shift = needed - self._payload_begin
        if shift <= 0:
            return
        end = self._payload_begin + self._position
        while end > self._payload_begin:
            begin = max(self._payload_begin, end - _MOVE_BYTES)
            file.seek(begin)
            data = _read_all(file, end - begin)
            file.seek(begin + shift)
            _write_all(file, data)
            end = begin
        self._payload_begin = needed


def _write_all(file: FileIO, data: memoryview | bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _start_writeback(file: FileIO, offset: int, length: int) -> None:
    """Let the disk work while the next tensor is encoded: fsync of 0.3 GB took 0.04 s, not 0.12 s."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError):  # advice
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def _read_all(file: FileIO, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(errno.EIO, "the file became shorter while it was written")
        view = view[count:]
    return data


class CheckpointWriter:
    """A checkpoint directory in the making.

    Shards may be written in any order and over several processes' lives: `has_shard` tells which are
    finished, and `finish` writes the index, which makes the directory a checkpoint.

    Args:
        directory: created if missing.
        shards: how many files there will be.
    """

    def __init__(self, directory: Path, *, shards: int) -> None:
        if not 1 <= shards <= 99_999:
            raise FormatError(f"{directory}: a checkpoint has 1 to 99999 shards, asked for {shards} [F19]")
        self.directory = directory
        self.shards = shards
        with _write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def shard_path(self, number: int) -> Path:
        """Path of shard `number`, from 0."""
        if not 0 <= number < self.shards:
            raise FormatError(f"{self.directory}: there is no shard {number} of {self.shards}")
        return self.directory / shard_name(number, self.shards)

    def has_shard(self, number: int) -> bool:
        """Whether shard `number` is finished, that is, under its final name. Its header is checked."""
        path = self.shard_path(number)
        if not path.exists():
            return False
        read_header(path)
        return True

    def shard(self, number: int, *, header_reserve_bytes: int) -> ShardWriter:
        """The writer of shard `number`."""
        return ShardWriter(self.shard_path(number), header_reserve_bytes=header_reserve_bytes)

    def finish(self) -> None:
        """Write the index over all shards.

        Raises:
            FormatError: a name stands in two shards, or a shard is damaged.
            LoadError: a shard is missing.
        """
        paths = [self.shard_path(number) for number in range(self.shards)]
        atomic_write(self.directory / INDEX_NAME, index_json({path: read_header(path) for path in paths}))


def atomic_write(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all. Raises ConvertError."""
    part = path.with_name(path.name + ".part")
    with _write_errors(path):
        try:
            with FileIO(part, "w") as file:
                _write_all(file, data)
                os.fsync(file.fileno())
            part.replace(path)
            _sync_directory(path.parent)
        finally:
            part.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = (
            "; make room there, then run the conversion again with --resume"
            if error.errno in _OUT_OF_SPACE
            else ""
        )
        raise ConvertError(f"cannot write {path}: {error.strerror or error}{hint}") from error

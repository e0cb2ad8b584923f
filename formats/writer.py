"""Writes an Endor checkpoint shard by shard, one tensor in memory at a time.

A shard is written as `NAME.part`: first its sections, behind a reserve for the header, then the header, then fsync
and a rename. A file under its final name is therefore whole. The index is written last, so a directory without one is
visibly unfinished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from endor.errors import ConvertError, FormatError
from endor.formats.checksums import checksum, tensor_bytes
from endor.formats.header import Block, Header, Section, TensorEntry, header_json, parse_header, read_header
from endor.formats.layout import (
    BLOCK_ALIGNMENT_BYTES,
    FORMAT_VERSION,
    PADDING_PREFIX,
    SECTION_ALIGNMENT_BYTES,
    align_up,
)
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout

__all__ = ["INDEX_NAME", "CheckpointWriter", "ShardWriter", "atomic_write", "header_bytes_bound", "shard_name"]

INDEX_NAME = "model.safetensors.index.json"
_ENTRY_OVERHEAD_BYTES = 1536
_NAME_REPEATS = 10


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` (from 0) of `count`."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def header_bytes_bound(names: Sequence[str]) -> int:
    """An upper bound of the header's size for a shard that will hold entries, aliases and blocks with these names."""
    text = sum(_ENTRY_OVERHEAD_BYTES + _NAME_REPEATS * len(name.encode()) for name in names)
    return align_up(4096 + text, BLOCK_ALIGNMENT_BYTES)


def plain(tensor: torch.Tensor) -> PackedTensor:
    """A tensor as an entry that is stored as it is."""
    tensor = tensor.detach().contiguous()
    layout = TensorLayout(tuple(tensor.shape), tensor.dtype, "dense", "raw", tensor.numel())
    return PackedTensor(layout, {DENSE_SECTION: tensor})


class ShardWriter:
    """One shard in the making; a context manager that leaves either the whole file or none.

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
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        with _write_errors(self._part):
            self._file = self._part.open("wb")
            self._file.seek(self._payload_begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if kind is None:
                with _write_errors(self._part):
                    self._finish(file)
        finally:
            file.close()
            self._part.unlink(missing_ok=True)

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Start a block; entries added inside belong to it."""
        if self._entries is not None or any(block.name == name for block in self._blocks):
            raise FormatError(f"{self._path}: block {name!r} is nested or written twice")
        begin, self._entries = self._position, []
        yield
        self._pad_to(BLOCK_ALIGNMENT_BYTES)
        self._blocks.append(Block(name, begin, self._position, tuple(self._entries)))
        self._entries = None

    def add(self, name: str, tensor: PackedTensor | torch.Tensor, *, aliases: Sequence[str] = ()) -> TensorEntry:
        """Append an entry to the open block; a torch.Tensor is stored as it is. Returns the entry as recorded."""
        if self._entries is None:
            raise FormatError(f"{self._path}: entry {name!r} is added outside a block")
        packed = plain(tensor) if isinstance(tensor, torch.Tensor) else tensor
        entry = TensorEntry(name, tuple(aliases), packed.layout, ())
        self._claim([name, *aliases], [entry.section_tensor_name(s.name) for s in packed.layout.sections])
        sections = tuple(self._write_section(s.name, packed.sections[s.name]) for s in packed.layout.sections)
        entry = TensorEntry(name, tuple(aliases), packed.layout, sections)
        self._entries.append(entry)
        return entry

    def _claim(self, names: Sequence[str], tensors: Sequence[str]) -> None:
        for name in {*names, *tensors}:
            if name in self._names or name.startswith(PADDING_PREFIX):
                raise FormatError(f"{self._path}: the name {name!r} is used twice or reserved")
            self._names.add(name)

    def _write_section(self, name: str, tensor: torch.Tensor) -> Section:
        self._pad_to(SECTION_ALIGNMENT_BYTES)
        data = tensor_bytes(tensor.cpu())
        begin = self._position
        self._write(data)
        return Section(name, begin, self._position, checksum(data))

    def _pad_to(self, alignment: int) -> None:
        begin = self._position
        self._write(bytes(align_up(begin, alignment) - begin))
        if self._position > begin:
            self._padding[f"{PADDING_PREFIX}{len(self._padding)}"] = (begin, self._position)

    def _write(self, data: memoryview | bytes) -> None:
        assert self._file is not None, "ShardWriter is used outside its with statement"
        with _write_errors(self._part):
            self._file.write(data)
        self._position += len(data)

    def _finish(self, file: BinaryIO) -> None:
        body = header_json(tuple(self._blocks), self._padding)
        if 8 + len(body) > self._payload_begin:
            self._make_room(file, align_up(8 + len(body), BLOCK_ALIGNMENT_BYTES))
        length = self._payload_begin - 8
        data = length.to_bytes(8, "little") + body.ljust(length, b" ")
        file.seek(0)
        file.write(data)
        file.flush()
        parse_header(data, file_bytes=self._payload_begin + self._position, file=str(self._part))
        os.fsync(file.fileno())
        self._part.replace(self._path)
        _sync_directory(self._path.parent)

    def _make_room(self, file: BinaryIO, payload_begin: int) -> None:
        """Move the payload back because the header outgrew its reserve (the bound makes this rare)."""
        file.flush()
        with self._part.open("rb") as source:
            source.seek(self._payload_begin)
            moved = self._part.with_name(self._part.name + ".moved")
            with moved.open("wb") as target:
                target.seek(payload_begin)
                shutil.copyfileobj(source, target, 1 << 24)
        shutil.copyfile(moved, self._part)
        moved.unlink()
        file.truncate(payload_begin + self._position)
        self._payload_begin = payload_begin


class CheckpointWriter:
    """A checkpoint directory in the making.

    Shards may be written in any order and over several processes' lives: `has_shard` tells which are finished, and
    `finish` writes the index, which makes the directory a checkpoint.

    Args:
        directory: created if missing.
        shards: how many files there will be.
    """

    def __init__(self, directory: Path, *, shards: int) -> None:
        self.directory = directory
        self.shards = shards
        with _write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def shard_path(self, number: int) -> Path:
        return self.directory / shard_name(number, self.shards)

    def has_shard(self, number: int) -> bool:
        """Whether shard `number` is finished: its file is there under its final name. Its header is checked."""
        path = self.shard_path(number)
        if not path.exists():
            return False
        read_header(path)
        return True

    def shard(self, number: int, *, header_reserve_bytes: int) -> ShardWriter:
        """The writer of shard `number`."""
        return ShardWriter(self.shard_path(number), header_reserve_bytes=header_reserve_bytes)

    def finish(self) -> None:
        """Write the index over all shards. Raises FormatError if a name stands in two shards or a shard is missing."""
        weight_map: dict[str, str] = {}
        files: dict[str, dict[str, Any]] = {}
        total = 0
        for number in range(self.shards):
            path = self.shard_path(number)
            header, data = read_header(path)
            for name in _tensor_names(header):
                if name in weight_map:
                    raise FormatError(f"{path}: tensor {name!r} is also in {weight_map[name]}")
                weight_map[name] = path.name
            total += header.payload_bytes
            files[path.name] = {"bytes": header.file_bytes, "header_checksum": f"{checksum(data):016x}"}
        metadata = {"total_size": total, "endor": {"format_version": FORMAT_VERSION, "files": files}}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        atomic_write(self.directory / INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")


def _tensor_names(header: Header) -> Iterator[str]:
    for entry in header.entries.values():
        for section in entry.sections:
            yield entry.section_tensor_name(section.name)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with _write_errors(path):
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
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
        raise ConvertError(f"cannot write {path}: {error.strerror or error}") from error


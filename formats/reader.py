"""Reads an Endor checkpoint: opens and checks every header at once, then reads entries or gives byte ranges
of blocks.

Files are read with pread, never mapped: a file that is truncated while it is open then gives an error, not
SIGBUS.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from endor.errors import FormatError, LoadError
from endor.formats.checksums import section_digest, verify_digest, verify_section
from endor.formats.codecs import SectionSpec
from endor.formats.entries import Block, Header, Section, TensorEntry
from endor.formats.files import read_exactly
from endor.formats.index import (
    CONFIG_NAME,
    QUANT_METHOD,
    check_shards,
    load_json_file,
    read_config,
    read_index,
    read_shard,
)
from endor.formats.packed import PackedTensor

__all__ = ["CONFIG_NAME", "QUANT_METHOD", "BlockRange", "CheckpointReader", "is_endor_checkpoint"]

_Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class BlockRange:
    """Where a block lies on disk: bytes [offset, offset + nbytes) of `file`."""

    block: Block
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return self.block.nbytes


def is_endor_checkpoint(directory: Path) -> bool:
    """Whether config.json in `directory` says that its weights are Endor's. Never raises for bad files."""
    try:
        config = load_json_file(directory / CONFIG_NAME, missing="", constants=True)
    except (LoadError, FormatError):
        return False
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


class CheckpointReader:
    """An open checkpoint; a context manager.

    Attributes:
        directory: of the checkpoint.
        config: contents of config.json.
        blocks: every block with its place on disk, in execution order.
        entries: every entry by name, in execution order.
        aliases: other names of entries (tied weights) -> the entry's name.

    Raises:
        LoadError: a file is missing or cannot be read.
        FormatError: a file breaks a rule of docs/format.md.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        index = read_index(self.directory)
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        # Taken before the headers are read: a file that is replaced in between is noticed when it is opened.
        self._identities = {record.path: _identity_of(record.path) for record in index.shards}
        self._headers: dict[Path, Header] = {record.path: read_shard(record) for record in index.shards}
        check_shards(index, self._headers)
        self.blocks = tuple(
            BlockRange(block, path, header.payload_begin + block.begin)
            for path, header in self._headers.items()
            for block in header.blocks
        )
        self._homes = {entry.name: home for home in self.blocks for entry in home.block.entries}
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(
            {entry.name: entry for home in self.blocks for entry in home.block.entries}
        )
        self.aliases: Mapping[str, str] = MappingProxyType(
            {alias: entry.name for entry in self.entries.values() for alias in entry.aliases}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    @property
    def file_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(header.file_bytes for header in self._headers.values())

    def names(self) -> tuple[str, ...]:
        """Names of all entries, in execution order, without aliases."""
        return tuple(self.entries)

    def entry(self, name: str) -> TensorEntry:
        """The entry called `name`, or that has it as an alias. Raises KeyError with near names."""
        name = self.aliases.get(name, name)
        if name not in self.entries:
            known = [n for n in self.entries if n.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]][:3]
            hint = f"; did you mean {', '.join(known)}?" if known else ""
            raise KeyError(f"{self.directory} has no tensor {name!r}{hint}")
        return self.entries[name]

    def home(self, name: str) -> BlockRange:
        """The block that holds the entry called `name`, or that has it as an alias. Raises KeyError."""
        return self._homes[self.entry(name).name]

    def read(self, name: str, *, verify: bool = True) -> PackedTensor:
        """Read one entry into fresh memory.

        Args:
            name: of an entry or an alias.
            verify: compare each section with its checksum.

        Raises:
            KeyError: there is no such entry.
            LoadError: the file ends early, was replaced or cannot be read.
            ChecksumError: the bytes are not those that were written.
        """
        entry = self.entry(name)
        pairs = zip(entry.layout.sections, entry.sections, strict=True)
        sections = {
            spec.name: self._read_section(entry, spec, section, verify=verify) for spec, section in pairs
        }
        return PackedTensor(entry.layout, sections)

    def read_sections(self, name: str, sections: Iterable[str]) -> dict[str, torch.Tensor]:
        """Some sections of an entry, checked, in fresh memory. Raises as `read` does."""
        entry, wanted = self.entry(name), set(sections)
        found = {}
        for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
            if spec.name in wanted:
                found[spec.name] = self._read_section(entry, spec, section, verify=True)
        return found

    def verify(self, name: str) -> None:
        """Compare an entry's sections with their checksums, through a small buffer. Raises as `read` does."""
        entry = self.entry(name)
        home = self._homes[entry.name]
        fd, payload_begin = self._descriptor(home.file), home.offset - home.block.begin
        for section in entry.sections:
            found = section_digest(fd, section, payload_begin, where=f"{home.file}: entry {entry.name!r}")
            verify_digest(entry, section, found, file=str(home.file))

    def read_block(self, home: BlockRange) -> torch.Tensor:
        """Read a block into a fresh uint8 tensor [nbytes]; checksums are the caller's business."""
        raw = torch.empty(home.nbytes, dtype=torch.uint8)
        self._read_into(home, 0, raw.numpy().data)
        return raw

    def _read_section(
        self, entry: TensorEntry, spec: SectionSpec, section: Section, *, verify: bool
    ) -> torch.Tensor:
        home = self._homes[entry.name]
        raw = torch.empty(section.nbytes, dtype=torch.uint8)
        self._read_into(home, section.begin - home.block.begin, raw.numpy().data)
        if verify:
            verify_section(entry, section, raw.numpy().data, file=str(home.file))
        return raw.view(spec.dtype).view(spec.shape)

    def _read_into(self, home: BlockRange, begin: int, target: memoryview) -> None:
        where = f"{home.file}: block {home.block.name!r}"
        read_exactly(self._descriptor(home.file), target, home.offset + begin, where=where)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                self._fds[path] = self._open(path)
            return self._fds[path]

    def _open(self, path: Path) -> int:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise LoadError(f"cannot open {path}: {error.strerror}", errno=error.errno) from error
        if _identity(os.fstat(fd)) != self._identities[path]:
            os.close(fd)
            raise LoadError(f"{path} was replaced or changed since the checkpoint was opened; open it again")
        return fd


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _identity_of(path: Path) -> _Identity:
    try:
        return _identity(path.stat())
    except OSError as error:
        hint = "the index names this shard; copy it again, or convert the model again"
        raise LoadError(f"cannot read {path}: {error.strerror}; {hint}", errno=error.errno) from error

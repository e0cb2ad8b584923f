"""Reads an Endor checkpoint: opens and checks every header at once, then reads entries or gives byte ranges of blocks.

Files are read with pread, never mapped: a file that is truncated while it is open then gives an error, not SIGBUS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from endor.errors import ChecksumError, FormatError, LoadError
from endor.formats.checksums import checksum, verify_section
from endor.formats.header import Block, Header, TensorEntry, read_header
from endor.formats.layout import FORMAT_VERSION
from endor.formats.packed import PackedTensor
from endor.formats.writer import INDEX_NAME

__all__ = ["CONFIG_NAME", "QUANT_METHOD", "BlockRange", "CheckpointReader", "is_endor_checkpoint"]

CONFIG_NAME = "config.json"
QUANT_METHOD = "endor"


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
    """Whether the config.json in `directory` says that its weights are Endor's. Never raises for bad files."""
    try:
        config = json.loads((directory / CONFIG_NAME).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and _quantization(config).get("quant_method") == QUANT_METHOD


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
        self.config = _read_config(self.directory)
        self._headers = _read_headers(self.directory, _read_index(self.directory))
        self.blocks = tuple(
            BlockRange(block, self.directory / name, header.payload_begin + block.begin)
            for name, header in self._headers.items()
            for block in header.blocks
        )
        self._homes = {entry.name: home for home in self.blocks for entry in home.block.entries}
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(
            {entry.name: entry for home in self.blocks for entry in home.block.entries}
        )
        self.aliases: Mapping[str, str] = MappingProxyType(
            {alias: entry.name for entry in self.entries.values() for alias in entry.aliases}
        )
        _check_unique(self.blocks)
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading again opens them again."""
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

    def read(self, name: str, *, verify: bool = True) -> PackedTensor:
        """Read one entry into fresh memory.

        Args:
            name: of an entry or an alias.
            verify: compare each section with its checksum.

        Raises:
            KeyError: there is no such entry.
            LoadError: the file ends early or cannot be read.
            ChecksumError: the bytes are not those that were written.
        """
        entry = self.entry(name)
        home = self._homes[entry.name]
        sections = {}
        for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
            raw = torch.empty(section.nbytes, dtype=torch.uint8)
            self._read_into(home, section.begin - home.block.begin, raw.numpy().data)
            if verify:
                verify_section(entry, section, raw.numpy().data, file=str(home.file))
            sections[spec.name] = raw.view(spec.dtype).view(spec.shape)
        return PackedTensor(entry.layout, sections)

    def read_block(self, home: BlockRange) -> torch.Tensor:
        """Read the bytes of a block into a fresh uint8 tensor [nbytes]; checksums are the caller's business."""
        raw = torch.empty(home.nbytes, dtype=torch.uint8)
        self._read_into(home, 0, raw.numpy().data)
        return raw

    def _read_into(self, home: BlockRange, begin: int, target: memoryview) -> None:
        try:
            fd = self._fds.get(home.file)
            if fd is None:
                fd = self._fds[home.file] = os.open(home.file, os.O_RDONLY | os.O_CLOEXEC)
            done = 0
            while done < len(target):
                n = os.preadv(fd, [target[done:]], home.offset + begin + done)
                if n == 0:
                    raise LoadError(
                        f"{home.file}: the file ends at byte {home.offset + begin + done} inside block "
                        f"{home.block.name!r}; it was truncated"
                    )
                done += n
        except LoadError:
            raise
        except OSError as error:
            message = f"{home.file}: cannot read block {home.block.name!r}: {error.strerror}"
            raise LoadError(message, errno=error.errno) from error


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get("quantization_config")
    return value if isinstance(value, dict) else {}


def _load_json_file(path: Path, *, missing: str) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent}: {missing}", errno=error.errno) from error
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", errno=error.errno) from error
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(loaded).__name__}")
    return loaded


def _read_config(directory: Path) -> dict[str, Any]:
    config = _load_json_file(directory / CONFIG_NAME, missing=_missing_config(directory))
    quantization = _quantization(config)
    if quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{directory / CONFIG_NAME}: this is not an Endor checkpoint (quantization_config.quant_method is "
            f"{quantization.get('quant_method')!r}); convert it first: convert-model {directory} OUT"
        )
    if quantization.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{directory / CONFIG_NAME}: format_version {quantization.get('format_version')!r} is unknown; "
            f"this Endor reads version {FORMAT_VERSION}"
        )
    return config


def _missing_config(directory: Path) -> str:
    if not directory.exists():
        return "no such model directory"
    if list(directory.glob("model-*.safetensors*")):
        return "no config.json: the conversion that wrote this directory did not finish; run it again with --resume"
    return "no config.json: not a model directory"


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_NAME
    index = _load_json_file(path, missing="no index: the conversion did not finish; run it again with --resume")
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    files = metadata.get("endor", {}).get("files") if isinstance(metadata, dict) else None
    if not isinstance(weight_map, dict) or not isinstance(files, dict) or not files:
        raise FormatError(f"{path}: expected weight_map and metadata.endor.files")
    for name in {*files, *weight_map.values()}:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise FormatError(f"{path}: {name!r} is not the name of a shard in this directory")
        if name not in files:
            raise FormatError(f"{path}: weight_map names {name!r}, which metadata.endor.files does not have")
    return index


def _read_headers(directory: Path, index: Mapping[str, Any]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    weight_map = dict(index["weight_map"])
    for name, record in sorted(index["metadata"]["endor"]["files"].items()):
        path = directory / name
        header, data = read_header(path)
        _check_record(path, record, data, header)
        for entry in header.entries.values():
            for section in entry.sections:
                if weight_map.pop(entry.section_tensor_name(section.name), None) != name:
                    raise FormatError(f"{path}: entry {entry.name!r} is not where {INDEX_NAME} says")
        headers[name] = header
    if weight_map:
        missing = next(iter(weight_map))
        raise FormatError(f"{directory / INDEX_NAME}: {weight_map[missing]} does not have tensor {missing!r}")
    return headers


def _check_record(path: Path, record: object, data: bytes, header: Header) -> None:
    if not isinstance(record, dict) or set(record) != {"bytes", "header_checksum"}:
        raise FormatError(f"{path.parent / INDEX_NAME}: {path.name} needs bytes and header_checksum")
    if record["bytes"] != header.file_bytes:
        raise FormatError(f"{path}: expected {record['bytes']} bytes (from {INDEX_NAME}), found {header.file_bytes}")
    found = f"{checksum(data):016x}"
    if record["header_checksum"] != found:
        raise ChecksumError(
            f"{path}: expected header checksum {record['header_checksum']} (from {INDEX_NAME}), found {found}. "
            "The file is damaged, or belongs to another conversion"
        )


def _check_unique(blocks: tuple[BlockRange, ...]) -> None:
    seen: dict[str, Path] = {}
    for home in blocks:
        names = [f"block {home.block.name}"]
        names += [n for entry in home.block.entries for n in (entry.name, *entry.aliases)]
        for name in names:
            if name in seen:
                raise FormatError(f"{home.file}: {name!r} also stands in {seen[name]}")
            seen[name] = home.file

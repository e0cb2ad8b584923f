"""The header of one shard: parsed from bytes that may lie, or built for bytes that are about to be written.

A `Header` that exists is valid: every tensor of the file belongs to exactly one entry or is padding, the tensors
tile the file, blocks tile it on 4096-byte boundaries, and every section has the size its entry's layout demands.
The rules are numbered in docs/format.md; the message of a FormatError starts with the file and cites what broke.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from endor.errors import FormatError, LoadError
from endor.formats.dtypes import dtype_name, parse_dtype
from endor.formats.layout import (
    BLOCK_ALIGNMENT_BYTES,
    FORMAT_VERSION,
    HEADER_LIMIT_BYTES,
    METADATA_KEY,
    PADDING_PREFIX,
    SECTION_ALIGNMENT_BYTES,
)
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout

__all__ = ["Block", "Header", "Section", "TensorEntry", "header_json", "parse_header", "read_header"]

_ENTRY_KEYS = {"name", "shape", "dtype", "mask", "codec", "nnz", "params", "aliases", "checksums"}
_BLOCK_KEYS = {"name", "begin", "end", "entries"}
_MAX_SIZE = 2**62


@dataclass(frozen=True)
class Section:
    """Where one section lies: bytes [begin, end) counted from the start of the payload, and its xxh3-64."""

    name: str
    begin: int
    end: int
    checksum: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its name, the other names it goes by (tied weights), its layout and its sections."""

    name: str
    aliases: tuple[str, ...]
    layout: TensorLayout
    sections: tuple[Section, ...]

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def section_tensor_name(self, section: str) -> str:
        """The name the section has in the safetensors file."""
        return self.name if section == DENSE_SECTION else f"{self.name}.{section}"


@dataclass(frozen=True)
class Block:
    """A contiguous range of the payload that is streamed as a unit: [begin, end), both multiples of 4096."""

    name: str
    begin: int
    end: int
    entries: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def unpack(self, memory: torch.Tensor) -> dict[str, PackedTensor]:
        """The block's tensors as views of `memory`, uint8 [nbytes], that holds the block's bytes.

        Raises FormatError if `memory` has another size.
        """
        if memory.dtype != torch.uint8 or memory.numel() != self.nbytes:
            raise FormatError(f"block {self.name} has {self.nbytes} bytes, the buffer {memory.numel()}")
        return {entry.name: self._unpack_entry(entry, memory) for entry in self.entries}

    def _unpack_entry(self, entry: TensorEntry, memory: torch.Tensor) -> PackedTensor:
        tensors = {}
        for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
            raw = memory[section.begin - self.begin : section.end - self.begin]
            tensors[spec.name] = raw.view(spec.dtype).view(spec.shape)
        return PackedTensor(entry.layout, tensors)


@dataclass(frozen=True)
class Header:
    """A valid header.

    Attributes:
        payload_begin: file offset of the payload, a multiple of 4096.
        payload_bytes: size of the payload; the file ends behind it.
        blocks: in file order, which is execution order.
    """

    payload_begin: int
    payload_bytes: int
    blocks: tuple[Block, ...]

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        return MappingProxyType({entry.name: entry for block in self.blocks for entry in block.entries})

    @property
    def file_bytes(self) -> int:
        return self.payload_begin + self.payload_bytes


@dataclass(frozen=True)
class _Span:
    """A row of the safetensors table."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(data: bytes, *, file_bytes: int, file: str) -> Header:
    """Parse the first bytes of a shard.

    Args:
        data: the 8 length bytes and the whole JSON header.
        file_bytes: size of the file.
        file: its name, for messages.

    Raises:
        FormatError: a rule of docs/format.md is broken; the message says which.
    """
    try:
        return _parse(data, file_bytes)
    except FormatError as error:
        raise type(error)(f"{file}: {error}") from None


def read_header(path: Path) -> tuple[Header, bytes]:
    """Read and parse the header of the shard at `path`; returns it with its bytes.

    Raises:
        LoadError: the file cannot be read.
        FormatError: the header breaks a rule of docs/format.md.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            data = prefix + file.read(_header_length(prefix, file_bytes=file_bytes, file=str(path)))
    except OSError as error:
        raise LoadError(f"cannot read the header of {path}: {error.strerror}", errno=error.errno) from error
    return parse_header(data, file_bytes=file_bytes, file=str(path)), data


def _header_length(prefix: bytes, *, file_bytes: int, file: str) -> int:
    """Length of the JSON header that the first 8 bytes announce. Raises FormatError for an impossible one."""
    if len(prefix) < 8:
        raise FormatError(f"{file}: {file_bytes} bytes are too few for a safetensors file; the file is truncated")
    length = int.from_bytes(prefix[:8], "little")
    if length > HEADER_LIMIT_BYTES:
        raise FormatError(f"{file}: header of {length} bytes is above the limit of {HEADER_LIMIT_BYTES}")
    if 8 + length > file_bytes:
        raise FormatError(f"{file}: header ends at byte {8 + length} but the file has {file_bytes}; it is truncated")
    return length


def _parse(data: bytes, file_bytes: int) -> Header:
    table = _load_json(data[8:])
    metadata = table.pop("__metadata__", None)
    endor = _endor_metadata(metadata)
    payload_begin = len(data)
    if payload_begin % BLOCK_ALIGNMENT_BYTES:
        raise FormatError(f"payload starts at byte {payload_begin}, not on a multiple of {BLOCK_ALIGNMENT_BYTES}")
    spans = {name: _span(name, row) for name, row in table.items()}
    payload_bytes = _check_tiling(spans)
    if payload_begin + payload_bytes != file_bytes:
        raise FormatError(f"expected a file of {payload_begin + payload_bytes} bytes, found {file_bytes}")
    blocks = tuple(_parse_blocks(endor, spans))
    _check_blocks_tile(blocks, payload_bytes)
    _check_names(blocks)
    unowned = sorted(name for name in spans if not name.startswith(PADDING_PREFIX))
    if unowned:
        raise FormatError(f"tensor {unowned[0]!r} belongs to no entry")
    return Header(payload_begin, payload_bytes, blocks)


def _load_json(raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise FormatError(f"duplicate name {key!r} in the header")
            seen[key] = value
        return seen

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"the header is not UTF-8 JSON ({error})") from None
    if not isinstance(table, dict):
        raise FormatError(f"the header is a JSON {type(table).__name__}, not an object")
    return table


def _endor_metadata(metadata: object) -> dict[str, Any]:
    if not isinstance(metadata, dict) or not isinstance(metadata.get(METADATA_KEY), str):
        raise FormatError(
            f"the header has no __metadata__[{METADATA_KEY!r}]: this is not an Endor shard. "
            "Convert the checkpoint with convert-model first"
        )
    endor = _load_json(metadata[METADATA_KEY].encode())
    version = endor.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(f"format_version {version!r} is unknown; this Endor reads version {FORMAT_VERSION}")
    if set(endor) != {"format_version", "blocks"} or not isinstance(endor["blocks"], list):
        raise FormatError(f"expected keys format_version and blocks, found {sorted(endor)}")
    return endor


def _span(name: str, row: object) -> _Span:
    where = f"tensor {name!r}"
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets")
    dtype = parse_dtype(row["dtype"], where=where)
    shape = _integers(row["shape"], where=f"{where}: shape")
    offsets = _integers(row["data_offsets"], where=f"{where}: data_offsets")
    if len(offsets) != 2:
        raise FormatError(f"{where}: data_offsets must be two integers, found {list(offsets)}")
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if nbytes > _MAX_SIZE:
        raise FormatError(f"{where}: shape {list(shape)} overflows")
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(f"{where}: {row['dtype']}{list(shape)} needs {nbytes} bytes, data_offsets give {offsets}")
    return _Span(dtype, shape, *offsets)


def _integers(value: object, *, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(n) is not int or not 0 <= n <= _MAX_SIZE for n in value):
        raise FormatError(f"{where} must be a list of non-negative integers, found {value!r}")
    return tuple(value)


def _check_tiling(spans: Mapping[str, _Span]) -> int:
    """Check that the tensors cover the payload without hole or overlap; return its size."""
    position = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            what = "overlaps the tensor before it" if span.begin < position else "leaves a hole before it"
            raise FormatError(f"tensor {name!r} starts at {span.begin} and {what}, which ends at {position}")
        position = span.end
    return position


def _parse_blocks(endor: Mapping[str, Any], spans: dict[str, _Span]) -> Iterator[Block]:
    for number, raw in enumerate(endor["blocks"]):
        if not isinstance(raw, dict) or set(raw) != _BLOCK_KEYS or not isinstance(raw["name"], str):
            raise FormatError(f"block {number}: expected keys {sorted(_BLOCK_KEYS)}")
        begin, end = _integers([raw["begin"], raw["end"]], where=f"block {raw['name']!r}: begin and end")
        if not isinstance(raw["entries"], list):
            raise FormatError(f"block {raw['name']!r}: entries must be a list")
        entries = tuple(_parse_entry(entry, spans) for entry in raw["entries"])
        for entry in entries:
            if any(not begin <= s.begin <= s.end <= end for s in entry.sections):
                raise FormatError(f"entry {entry.name!r} lies outside its block {raw['name']!r}")
        yield Block(raw["name"], begin, end, entries)


def _parse_entry(raw: object, spans: dict[str, _Span]) -> TensorEntry:
    if not isinstance(raw, dict) or set(raw) != _ENTRY_KEYS or not isinstance(raw["name"], str):
        found = sorted(raw) if isinstance(raw, dict) else raw
        raise FormatError(f"an entry needs the keys {sorted(_ENTRY_KEYS)}, found {found}")
    where = f"entry {raw['name']!r}"
    try:
        layout = _parse_layout(raw, where)
    except FormatError as error:
        raise FormatError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    aliases = raw["aliases"]
    if not isinstance(aliases, list) or any(not isinstance(a, str) for a in aliases):
        raise FormatError(f"{where}: aliases must be a list of names")
    entry = TensorEntry(raw["name"], tuple(aliases), layout, ())
    return TensorEntry(entry.name, entry.aliases, layout, _claim_sections(entry, raw["checksums"], spans))


def _parse_layout(raw: Mapping[str, Any], where: str) -> TensorLayout:
    params = raw["params"]
    if not isinstance(params, dict) or any(type(v) is not int for v in params.values()):
        raise FormatError(f"{where}: params must be a map of names to integers")
    if type(raw["nnz"]) is not int or not isinstance(raw["mask"], str) or not isinstance(raw["codec"], str):
        raise FormatError(f"{where}: nnz must be an integer, mask and codec strings")
    return TensorLayout(
        shape=_integers(raw["shape"], where=f"{where}: shape"),
        dtype=parse_dtype(raw["dtype"], where=where),
        mask=raw["mask"],
        codec=raw["codec"],
        nnz=raw["nnz"],
        params=MappingProxyType(params),
    )


def _claim_sections(entry: TensorEntry, checksums: object, spans: dict[str, _Span]) -> tuple[Section, ...]:
    """Take the entry's sections out of `spans`, checking each against the layout."""
    specs = entry.layout.sections
    if not isinstance(checksums, dict) or set(checksums) != {spec.name for spec in specs}:
        raise FormatError(f"entry {entry.name!r}: expected a checksum for each of {[s.name for s in specs]}")
    sections = []
    for spec in specs:
        name = entry.section_tensor_name(spec.name)
        span = spans.pop(name, None)
        if span is None:
            raise FormatError(f"entry {entry.name!r}: tensor {name!r} is missing or belongs to two entries")
        if (span.dtype, span.shape) != (spec.dtype, spec.shape):
            raise FormatError(
                f"tensor {name!r}: expected {dtype_name(spec.dtype)}{list(spec.shape)}, "
                f"found {dtype_name(span.dtype)}{list(span.shape)}"
            )
        if span.begin % SECTION_ALIGNMENT_BYTES and span.begin != span.end:
            raise FormatError(f"tensor {name!r} starts at {span.begin}, not on {SECTION_ALIGNMENT_BYTES} bytes")
        checksum = _parse_checksum(checksums[spec.name], where=f"tensor {name!r}")
        sections.append(Section(spec.name, span.begin, span.end, checksum))
    return tuple(sections)


def _parse_checksum(value: object, *, where: str) -> int:
    if not isinstance(value, str) or len(value) != 16 or set(value) - set("0123456789abcdef"):
        raise FormatError(f"{where}: checksum must be 16 lower-case hexadecimal digits, found {value!r}")
    return int(value, 16)


def _check_blocks_tile(blocks: tuple[Block, ...], payload_bytes: int) -> None:
    position = 0
    for block in blocks:
        if block.begin != position or block.end < block.begin:
            raise FormatError(f"block {block.name!r} covers [{block.begin}, {block.end}), expected it at {position}")
        if block.begin % BLOCK_ALIGNMENT_BYTES or block.end % BLOCK_ALIGNMENT_BYTES:
            raise FormatError(f"block {block.name!r} is not aligned to {BLOCK_ALIGNMENT_BYTES} bytes")
        position = block.end
    if position != payload_bytes:
        raise FormatError(f"the blocks end at {position}, the payload at {payload_bytes}")


def _check_names(blocks: tuple[Block, ...]) -> None:
    seen: set[str] = set()
    for name in (n for b in blocks for e in b.entries for n in (e.name, *e.aliases)):
        if name in seen:
            raise FormatError(f"two entries or aliases are called {name!r}")
        seen.add(name)
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise FormatError("two blocks have the same name")


def header_json(blocks: tuple[Block, ...], padding: Mapping[str, tuple[int, int]]) -> bytes:
    """The JSON header for `blocks` and the filler tensors `padding` (name -> [begin, end)), not padded."""
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(_endor_json(blocks), separators=(",", ":"))}}
    for block in blocks:
        for entry in block.entries:
            for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
                table[entry.section_tensor_name(spec.name)] = _row(
                    dtype_name(spec.dtype), spec.shape, section.begin, section.end
                )
    for name, (begin, end) in padding.items():
        table[name] = _row("U8", (end - begin,), begin, end)
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()


def _row(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _endor_json(blocks: tuple[Block, ...]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "blocks": [
            {"name": b.name, "begin": b.begin, "end": b.end, "entries": [_entry_json(e) for e in b.entries]}
            for b in blocks
        ],
    }


def _entry_json(entry: TensorEntry) -> dict[str, Any]:
    layout = entry.layout
    return {
        "name": entry.name,
        "shape": list(layout.shape),
        "dtype": dtype_name(layout.dtype),
        "mask": layout.mask,
        "codec": layout.codec,
        "nnz": layout.nnz,
        "params": dict(layout.params),
        "aliases": list(entry.aliases),
        "checksums": {section.name: f"{section.checksum:016x}" for section in entry.sections},
    }



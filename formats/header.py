"""The header of one shard: parsed from bytes that may lie, or built for bytes that are about to be written.

A `Header` that exists is valid: every tensor of the file belongs to exactly one entry or is padding, the
tensors tile the file, blocks tile it on 4096-byte boundaries, and every section has the size its entry's
layout demands. The rules are numbered in docs/format.md; a FormatError starts with the file and ends with the
rule, as in [F5].
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from endor.errors import FormatError, LoadError
from endor.formats.dtypes import dtype_name, parse_dtype
from endor.formats.entries import Block, Header, Section, TensorEntry, section_tensor_name
from endor.formats.layout import (
    FORMAT_VERSION,
    HEADER_LIMIT_BYTES,
    METADATA_KEY,
    PADDING_PREFIX,
    PREFIX_BYTES,
    check_shape,
)
from endor.formats.packed import TensorLayout
from endor.formats.strict_json import integer, integers, load_object, mapping, short, strings

__all__ = [
    "Block",
    "Header",
    "Section",
    "TensorEntry",
    "check_version",
    "header_json",
    "parse_header",
    "read_header",
]

_ENTRY_KEYS = {"name", "shape", "dtype", "mask", "codec", "nnz", "params", "aliases", "checksums"}
_BLOCK_KEYS = {"name", "begin", "end", "entries"}
_HEX = frozenset("0123456789abcdef")


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
        expected = PREFIX_BYTES + _header_length(data[:PREFIX_BYTES], file_bytes)
        if len(data) != expected:
            raise FormatError(
                f"expected {expected} bytes of header, found {len(data)}; the file is truncated [F1]"
            )
        return _parse(data, file_bytes)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from None


def read_header(path: Path) -> tuple[Header, bytes]:
    """Read and parse the header of the shard at `path`; returns it with its bytes.

    Raises:
        LoadError: the file cannot be read.
        FormatError: the header breaks a rule of docs/format.md.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise LoadError(f"{path} is not a regular file")
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(PREFIX_BYTES)
            data = prefix + file.read(_length_in(path, prefix, file_bytes))
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(f"cannot read the header of {path}: {error.strerror}", errno=error.errno) from error
    return parse_header(data, file_bytes=file_bytes, file=str(path)), data


def _length_in(path: Path, prefix: bytes, file_bytes: int) -> int:
    try:
        return _header_length(prefix, file_bytes)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the JSON header that the first 8 bytes announce. Raises FormatError for an impossible one."""
    if len(prefix) < PREFIX_BYTES:
        raise FormatError(
            f"{file_bytes} bytes are too few for a safetensors file; the file is truncated [F1]"
        )
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT_BYTES:
        raise FormatError(f"a header of {length} bytes is above the limit of {HEADER_LIMIT_BYTES} [F1]")
    if PREFIX_BYTES + length > file_bytes:
        raise FormatError(
            f"the header ends at byte {PREFIX_BYTES + length} but the file has {file_bytes}; it is truncated "
            "[F1]"
        )
    return length


def _parse(data: bytes, file_bytes: int) -> Header:
    text = data[PREFIX_BYTES:]
    table = load_object(text, where="the header")
    if text[:1] != b"{" or text.rstrip(b" ")[-1:] != b"}":
        raise FormatError("the header must start with '{' and be followed by spaces only [F2]")
    endor = _endor_metadata(table.pop("__metadata__", None))
    spans = {name: _span(name, row) for name, row in table.items()}
    payload_bytes = _check_tiling(spans)
    if len(data) + payload_bytes != file_bytes:
        raise FormatError(f"expected a file of {len(data) + payload_bytes} bytes, found {file_bytes} [F6]")
    blocks = tuple(_parse_block(raw, spans, number) for number, raw in enumerate(endor["blocks"]))
    for name, span in spans.items():  # the sections are taken out; what is left must be padding
        _check_padding(name, span)
    return Header(len(data), payload_bytes, blocks)


def _endor_metadata(metadata: object) -> dict[str, Any]:
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        raise FormatError(
            f"the header has no __metadata__[{METADATA_KEY!r}]: this is not an Endor shard. "
            "Convert the checkpoint with convert-model first [F7]"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise FormatError(f"__metadata__[{short(key)}] must be a string, found {short(value)} [F7]")
    where = f"__metadata__[{METADATA_KEY!r}]"
    endor = load_object(metadata[METADATA_KEY], where=where)
    check_version(endor.get("format_version"), where=where)  # before the keys: another version has others
    mapping(endor, {"format_version", "blocks"}, where=where, rule="F8")
    if not isinstance(endor["blocks"], list):
        raise FormatError(f"{where}: blocks must be a list, found {short(endor['blocks'])} [F8]")
    return endor


def check_version(version: object, *, where: str) -> None:
    """Raises FormatError unless `version` is the one this Endor reads."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version {short(version)} is unknown; this Endor reads version "
            f"{FORMAT_VERSION}. "
            "A newer Endor may have written it: upgrade to read it [F8]"
        )


def _span(name: str, row: object) -> _Span:
    where = f"tensor {short(name)}"
    row = mapping(row, {"dtype", "shape", "data_offsets"}, where=where, rule="F4")
    dtype = parse_dtype(row["dtype"], where=where)
    shape = integers(row["shape"], where=f"{where}: shape")
    offsets = integers(row["data_offsets"], where=f"{where}: data_offsets")
    if len(offsets) != 2:
        raise FormatError(f"{where}: data_offsets must be two integers, found {short(list(offsets))} [F4]")
    check_shape(shape, where=where)
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(
            f"{where}: {row['dtype']} {list(shape)} needs {nbytes} bytes, data_offsets are {list(offsets)} "
            "[F4]"
        )
    return _Span(dtype, shape, *offsets)


def _check_tiling(spans: Mapping[str, _Span]) -> int:
    """Check that the tensors cover the payload without hole or overlap; return its size."""
    position = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            what = (
                "overlaps the tensor before it"
                if span.begin < position
                else "leaves a hole behind the one before it"
            )
            raise FormatError(
                f"tensor {short(name)} starts at {span.begin} and {what}, which ends at {position} [F5]"
            )
        position = span.end
    return position


def _check_padding(name: str, span: _Span) -> None:
    if not name.startswith(PADDING_PREFIX):
        raise FormatError(
            f"tensor {short(name)} belongs to no entry and is not called {PADDING_PREFIX}N [F15]"
        )
    if span.dtype != torch.uint8 or len(span.shape) != 1:
        raise FormatError(
            f"padding {short(name)}: expected U8 [n], found {dtype_name(span.dtype)} {list(span.shape)} [F15]"
        )


def _parse_block(raw: object, spans: dict[str, _Span], number: int) -> Block:
    raw = mapping(raw, _BLOCK_KEYS, where=f"block {number}", rule="F9")
    if not isinstance(raw["name"], str) or not isinstance(raw["entries"], list):
        raise FormatError(f"block {number}: name must be a string and entries a list [F9]")
    where = f"block {short(raw['name'])}"
    begin, end = (integer(raw[key], where=f"{where}: {key}") for key in ("begin", "end"))
    return Block(
        raw["name"], begin, end, tuple(_parse_entry(entry, spans, where) for entry in raw["entries"])
    )


def _parse_entry(raw: object, spans: dict[str, _Span], block: str) -> TensorEntry:
    name = raw.get("name") if isinstance(raw, dict) else None
    where = f"entry {short(name)}" if isinstance(name, str) else f"an entry of {block}"
    raw = mapping(raw, _ENTRY_KEYS, where=where, rule="F10")
    if not isinstance(name, str):
        raise FormatError(f"{where}: name must be a string, found {short(name)} [F10]")
    layout = _parse_layout(raw, where)
    return TensorEntry(
        name,
        strings(raw["aliases"], where=f"{where}: aliases"),
        layout,
        _claim_sections(name, layout, raw["checksums"], spans),
    )


def _parse_layout(raw: Mapping[str, Any], where: str) -> TensorLayout:
    params = raw["params"]
    if not isinstance(params, dict):
        raise FormatError(f"{where}: params must be an object, found {short(params)} [F10]")
    for key, value in params.items():
        integer(value, where=f"{where}: params[{short(key)}]")
    if not isinstance(raw["mask"], str) or not isinstance(raw["codec"], str):
        raise FormatError(f"{where}: mask and codec must be strings [F10]")
    shape = integers(raw["shape"], where=f"{where}: shape")
    dtype = parse_dtype(raw["dtype"], where=where)
    nnz = integer(raw["nnz"], where=f"{where}: nnz")
    try:
        return TensorLayout(shape, dtype, raw["mask"], raw["codec"], nnz, MappingProxyType(params))
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def _claim_sections(
    entry: str, layout: TensorLayout, checksums: object, spans: dict[str, _Span]
) -> tuple[Section, ...]:
    """Take the entry's sections out of `spans`, checking each against the layout."""
    keys = {spec.name for spec in layout.sections}
    checksums = mapping(checksums, keys, where=f"entry {short(entry)}: checksums", rule="F13")
    sections = []
    for spec in layout.sections:
        name = section_tensor_name(entry, spec.name)
        where = f"tensor {short(name)}"
        span = spans.pop(name, None)
        if span is None:
            raise FormatError(f"entry {short(entry)}: {where} is missing or belongs to two entries [F12]")
        if (span.dtype, span.shape) != (spec.dtype, spec.shape):
            raise FormatError(
                f"{where}: expected {dtype_name(spec.dtype)} {list(spec.shape)}, "
                f"found {dtype_name(span.dtype)} {list(span.shape)} [F12]"
            )
        checksum = _parse_checksum(checksums[spec.name], where=where)
        try:
            sections.append(Section(spec.name, span.begin, span.end, checksum))
        except FormatError as error:
            raise FormatError(f"entry {short(entry)}: {error}") from None
    return tuple(sections)


def _parse_checksum(value: object, *, where: str) -> int:
    if not isinstance(value, str) or len(value) != 16 or not _HEX.issuperset(value):
        raise FormatError(
            f"{where}: a checksum has 16 lower-case hexadecimal digits, found {short(value)} [F13]"
        )
    return int(value, 16)


def header_json(blocks: tuple[Block, ...], padding: Mapping[str, tuple[int, int]]) -> bytes:
    """The JSON header for `blocks` and the filler tensors `padding` (name -> [begin, end)), not padded."""
    endor = json.dumps(_endor_json(blocks), separators=(",", ":"), ensure_ascii=False)
    # transformers and accelerate want to be told that the tensors are PyTorch's.
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: endor, "format": "pt"}}
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

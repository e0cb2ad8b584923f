"""The two files that make shards a checkpoint: model.safetensors.index.json, and the mark in config.json.

The index names every shard with its size and the checksum of its header; the header has the checksum of every
section. So whoever trusts the index can trust every byte of every entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endor.errors import ChecksumError, FormatError, LoadError
from endor.formats.checksums import checksum
from endor.formats.entries import Header, check_unique_names
from endor.formats.header import check_version, read_header
from endor.formats.layout import FORMAT_VERSION
from endor.formats.strict_json import integer, load_object, mapping, short

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "QUANT_METHOD",
    "Index",
    "ShardRecord",
    "check_record",
    "check_shards",
    "index_json",
    "load_json_file",
    "read_config",
    "read_index",
    "read_shard",
    "shard_name",
    "shard_numbers",
]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
QUANT_METHOD = "endor"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_UNFINISHED = "the conversion that wrote this directory did not finish; run it again with --resume"


def shard_name(number: int, count: int) -> str:
    """File name of shard `number` (from 0) of `count`."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def shard_numbers(name: str) -> tuple[int, int] | None:
    """Number (from 0) and count in the file name of a shard; None for any other name."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]) - 1, int(match[2])) if match else None


@dataclass(frozen=True)
class ShardRecord:
    """What the index says of one shard: size of the file, xxh3-64 of its header, names of its tensors."""

    path: Path
    nbytes: int
    header_checksum: str
    tensors: frozenset[str]


@dataclass(frozen=True)
class Index:
    """The index: one record per shard, in execution order, and the size of all payloads."""

    path: Path
    shards: tuple[ShardRecord, ...]
    total_size: int


def load_json_file(path: Path, *, missing: str, constants: bool = False) -> dict[str, Any]:
    """The JSON object in `path`. Raises LoadError (saying `missing` if there is none) or FormatError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise LoadError(f"{path.parent}: {missing}", errno=error.errno) from error
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", errno=error.errno) from error
    return load_object(raw, where=str(path), constants=constants)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, once it has said that the weights are Endor's and of a version this Endor reads.

    Raises LoadError where it cannot be read, FormatError otherwise.
    """
    path = directory / CONFIG_NAME
    # transformers writes Infinity into some configurations (Mamba's time_step_limit).
    config = load_json_file(path, missing=_missing_config(directory), constants=True)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or method != QUANT_METHOD:
        raise FormatError(
            f"{path}: this is not an Endor checkpoint (quantization_config.quant_method is {short(method)}, "
            f"expected {QUANT_METHOD!r}); convert it first: convert-model {directory} OUT [F23]"
        )
    check_version(quantization.get("format_version"), where=f"{path}: quantization_config")
    return config


def _missing_config(directory: Path) -> str:
    if not directory.exists():
        return "no such model directory"
    if list(directory.glob("model-*.safetensors*")):
        return f"no {CONFIG_NAME}: {_UNFINISHED}"
    return f"no {CONFIG_NAME}: not a model directory"


def read_index(directory: Path) -> Index:
    """The index of a checkpoint.

    Raises LoadError where it cannot be read, FormatError where it breaks a rule.
    """
    path = directory / INDEX_NAME
    index = load_json_file(path, missing=f"no {INDEX_NAME}: {_UNFINISHED}")
    try:
        return _parse_index(index, path)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _parse_index(index: Mapping[str, Any], path: Path) -> Index:
    metadata, weight_map = index.get("metadata"), index.get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(weight_map, dict):
        raise FormatError("expected the objects metadata and weight_map [F19]")
    endor = metadata.get("endor")
    if isinstance(endor, dict):
        check_version(endor.get("format_version"), where="metadata.endor")
    endor = mapping(endor, {"format_version", "files"}, where="metadata.endor", rule="F19")
    files = endor["files"]
    _check_shard_names(files)
    tensors: dict[str, set[str]] = {name: set() for name in files}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in files:
            raise FormatError(
                f"weight_map puts {short(tensor)} into {short(name)}, which is not a shard [F21]"
            )
        tensors[name].add(tensor)
    shards = tuple(
        _record(path.with_name(name), files[name], frozenset(tensors[name])) for name in sorted(files)
    )
    return Index(path, shards, integer(metadata.get("total_size"), where="metadata.total_size"))


def _check_shard_names(files: object) -> None:
    if not isinstance(files, dict) or not files:
        raise FormatError(f"metadata.endor.files must name at least one shard, found {short(files)} [F19]")
    expected = {shard_name(number, len(files)) for number in range(len(files))}
    for name in sorted(files.keys() - expected):
        raise FormatError(
            f"metadata.endor.files names {short(name)}; {len(files)} shards are called "
            f"{shard_name(0, len(files))} and so on [F19]"
        )


def _record(path: Path, raw: object, tensors: frozenset[str]) -> ShardRecord:
    raw = mapping(raw, {"bytes", "header_checksum"}, where=path.name, rule="F19")
    nbytes = integer(raw["bytes"], where=f"{path.name}: bytes")
    if not isinstance(raw["header_checksum"], str):
        raise FormatError(f"{path.name}: header_checksum must be a string [F19]")
    return ShardRecord(path, nbytes, raw["header_checksum"], tensors)


def read_shard(record: ShardRecord) -> Header:
    """The header of a shard, once it is known to be the one the index means.

    Raises LoadError, FormatError, ChecksumError.
    """
    header, data = read_header(record.path)
    check_record(record, header, data)
    return header


def check_record(record: ShardRecord, header: Header, data: bytes) -> None:
    """Compare a shard's header, whose bytes are `data`, with the index. Raises FormatError."""
    path, found = record.path, f"{checksum(data):016x}"
    if header.file_bytes != record.nbytes:
        raise FormatError(
            f"{path}: expected {record.nbytes} bytes (from {INDEX_NAME}), found {header.file_bytes} [F20]"
        )
    if record.header_checksum != found:
        raise ChecksumError(
            f"{path}: expected header checksum {short(record.header_checksum)} (from {INDEX_NAME}), found "
            f"{found!r}. The file is damaged, or belongs to another conversion: copy it again or convert the "
            "model again [F20]"
        )
    _check_tensors(record, {name for entry in header.entries.values() for name in entry.tensor_names()})


def _check_tensors(record: ShardRecord, found: set[str]) -> None:
    for name in sorted(record.tensors - found):
        raise FormatError(f"{record.path}: tensor {short(name)} (from {INDEX_NAME}) is missing [F21]")
    for name in sorted(found - record.tensors):
        raise FormatError(
            f"{record.path}: tensor {short(name)} is not in the weight_map of {INDEX_NAME} [F21]"
        )


def check_shards(index: Index, headers: Mapping[Path, Header]) -> None:
    """Check what no shard can alone: names across shards and their total size. Raises FormatError."""
    _check_names(headers)
    total = sum(header.payload_bytes for header in headers.values())
    if index.total_size != total:
        raise FormatError(
            f"{index.path}: expected a total_size of {total} bytes, found {index.total_size} [F22]"
        )


def _check_names(headers: Mapping[Path, Header]) -> None:
    check_unique_names({str(path): header.blocks for path, header in headers.items()})


def index_json(shards: Mapping[Path, tuple[Header, bytes]]) -> bytes:
    """The index of finished shards, given as parsed headers and their bytes. Raises FormatError."""
    _check_names({path: header for path, (header, _) in shards.items()})
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = {}
    for path, (header, data) in shards.items():
        for entry in header.entries.values():
            weight_map.update(dict.fromkeys(entry.tensor_names(), path.name))
        files[path.name] = {"bytes": header.file_bytes, "header_checksum": f"{checksum(data):016x}"}
    total = sum(header.payload_bytes for header, _ in shards.values())
    metadata = {"total_size": total, "endor": {"format_version": FORMAT_VERSION, "files": files}}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"

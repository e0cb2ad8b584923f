"""Endor shards and checkpoints for tests: whole ones, and ones that lie in exactly one place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from endor.formats import CheckpointWriter, PackedTensor, header_bytes_bound
from endor.kernels import encode

CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "endor", "format_version": 1}}
INDEX = "model.safetensors.index.json"

Entries = Mapping[str, torch.Tensor | PackedTensor]


def pruned(
    *shape: int, dtype: torch.dtype = torch.bfloat16, density: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """A random tensor whose elements are zero with probability 1 - density."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * keep).to(dtype)


def example_blocks() -> dict[str, Entries]:
    """Two blocks: one with a packed and a plain entry, one with a plain entry."""
    return {
        "layers.0": {"layers.0.w": encode(pruned(5, 70)), "layers.0.norm": torch.arange(5.0)},
        "head": {"head.w": pruned(4, 8, density=1.0, seed=1)},
    }


def write_checkpoint(
    directory: Path,
    shards: Sequence[Mapping[str, Entries]] | None = None,
    *,
    aliases: Mapping[str, list[str]] | None = None,
    header_reserve_bytes: int | None = None,
) -> Path:
    """Write a whole checkpoint, one dict of blocks per shard; the example, tied to `embed.w`, by default."""
    if shards is None:
        shards, aliases = [example_blocks()], {"head.w": ["embed.w"]}
    aliases = aliases or {}
    writer = CheckpointWriter(directory, shards=len(shards))
    for number, blocks in enumerate(shards):
        names = [*blocks, *(name for entries in blocks.values() for name in entries)]
        names += [alias for name in names for alias in aliases.get(name, [])]
        reserve = header_bytes_bound(names) if header_reserve_bytes is None else header_reserve_bytes
        with writer.shard(number, header_reserve_bytes=reserve) as shard:
            for block, entries in blocks.items():
                with shard.block(block):
                    for name, tensor in entries.items():
                        shard.add(name, tensor, aliases=aliases.get(name, []))
    writer.finish()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@dataclass
class ShardParts:
    """A shard taken apart. Change one thing, then `write` it: nothing else is repaired on the way."""

    table: dict[str, Any]
    metadata: dict[str, Any]
    endor: dict[str, Any]
    payload: bytearray

    @classmethod
    def read(cls, path: Path) -> ShardParts:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        metadata = table.pop("__metadata__")
        return cls(table, metadata, json.loads(metadata.pop("endor")), bytearray(raw[8 + length :]))

    def entry(self, name: str) -> dict[str, Any]:
        """The JSON of an entry."""
        return next(e for block in self.endor["blocks"] for e in block["entries"] if e["name"] == name)

    def block(self, name: str) -> dict[str, Any]:
        """The JSON of a block."""
        return next(block for block in self.endor["blocks"] if block["name"] == name)

    def section(self, tensor: str) -> memoryview:
        """The bytes of a tensor of the table, writable."""
        begin, end = self.table[tensor]["data_offsets"]
        return memoryview(self.payload)[begin:end]

    def sign(self, entry: str) -> None:
        """Make the checksums of an entry those of the payload."""
        for section in self.entry(entry)["checksums"]:
            data = self.section(entry if section == "dense" else f"{entry}.{section}")
            self.entry(entry)["checksums"][section] = f"{xxhash.xxh3_64_intdigest(data):016x}"

    def header(self) -> str:
        """The header as JSON text."""
        return json.dumps({"__metadata__": {**self.metadata, "endor": json.dumps(self.endor)}, **self.table})

    def write(self, path: Path, *, header: str | None = None) -> None:
        """Write the parts, with `header` in the place of the table and the metadata if it is given."""
        write_raw(path, (self.header() if header is None else header).encode(), bytes(self.payload))


def write_raw(path: Path, header: bytes, payload: bytes = b"") -> None:
    """A file with this header, padded with spaces to whole pages, and this payload."""
    length = -(-(8 + len(header)) // 4096) * 4096 - 8
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length, b" ") + payload)


def repair_index(directory: Path) -> None:
    """Make sizes and header checksums in the index those of the shards, so that only the shards lie."""
    index = json.loads((directory / INDEX).read_text())
    for name, record in index["metadata"]["endor"]["files"].items():
        raw = (directory / name).read_bytes()
        record["bytes"] = len(raw)
        record["header_checksum"] = (
            f"{xxhash.xxh3_64_intdigest(raw[: 8 + int.from_bytes(raw[:8], 'little')]):016x}"
        )
    (directory / INDEX).write_text(json.dumps(index))


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: what losslessness is decided on."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

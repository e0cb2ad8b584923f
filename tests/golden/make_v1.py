"""Writes the golden checkpoint of format version 1; run once, kept to show what went in (see README.md).

    python -m tests.golden.make_v1 DIRECTORY

Contents come from SHA-256 and bit patterns: torch's random numbers may change between versions.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

import torch

from endor.formats import CheckpointWriter, PackedTensor
from endor.kernels import encode

__all__ = ["ALIASES", "CONFIG", "SHARDS", "dense_tensors", "write"]

CONFIG = {
    "model_type": "golden",
    "quantization_config": {"quant_method": "endor", "format_version": 1, "method": "none"},
    "time_step_limit": [0.0, math.inf],
}
ALIASES = {"embed.weight": ("lm_head.weight", "größe.ω"), "layers.0.bf16": ("layers.0.tied",)}
SHARDS: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "embed": ("embed.weight",),
        "layers.0": ("layers.0.bf16", "layers.0.fp16", "layers.0.fp32", "layers.0.fp8", "layers.0.norm"),
    },
    {
        "layers.1": (
            "layers.1.experts",
            "layers.1.wide",
            "layers.1.vector",
            "layers.1.full",
            "layers.1.empty",
        ),
        "rest": ("scalar", "no_rows", "no_columns", "flags", "ids", "f64", "e5m2"),
    },
)
PLAIN = {"embed.weight", "layers.0.norm", *SHARDS[1]["rest"]}

# Signs, zeros, the smallest and largest subnormal and normal numbers, infinities, NaNs with payloads.
SPECIAL = {
    torch.bfloat16: (0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x3F80),
    torch.float16: (0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0x3C00),
    torch.float32: (
        *(0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0xFFC00001, 0x7F800001, 0x3F800000),
    ),
    torch.float8_e4m3fn: (0x80, 0x01, 0x87, 0x08, 0x7E, 0x7F, 0xFF, 0x38),
}


def noise(label: str, count: int) -> bytes:
    """`count` bytes that only depend on `label`."""
    parts = (hashlib.sha256(f"{label}/{i}".encode()).digest() for i in range(-(-count // 32)))
    return b"".join(parts)[:count]


def from_bits(words: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor from the bits of its elements."""
    raw = b"".join(word.to_bytes(dtype.itemsize, "little") for word in words)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def pruned(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, kept: int = 128) -> torch.Tensor:
    """Arbitrary bits of which about `kept` in 256 elements are not zero, the special values first."""
    count, size = math.prod(shape), dtype.itemsize
    raw, chance = noise(name, count * size), noise(name + "/mask", count)
    words = [
        int.from_bytes(raw[i * size : (i + 1) * size], "little") * (chance[i] < kept) for i in range(count)
    ]
    special = SPECIAL[dtype][:count]
    words[: 2 * len(special)] = [word for pair in special for word in (pair, 0)][: len(words)]
    return from_bits(words[:count], shape, dtype)


def dense_tensors() -> dict[str, torch.Tensor]:
    """What the golden checkpoint stands for, by name."""
    bf16, fp16, fp32, fp8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
    return {
        "embed.weight": pruned("embed", (7, 16), bf16, kept=256),
        "layers.0.bf16": pruned("bf16", (66, 65), bf16),
        "layers.0.fp16": pruned("fp16", (5, 64), fp16),
        "layers.0.fp32": pruned("fp32", (3, 63), fp32),
        "layers.0.fp8": pruned("fp8", (4, 129), fp8),
        "layers.0.norm": torch.arange(1, 8, dtype=fp32) / 4,
        "layers.1.experts": pruned("experts", (3, 6, 33), bf16, kept=64),
        "layers.1.wide": pruned("wide", (2, 1500), bf16, kept=100),
        "layers.1.vector": pruned("vector", (70,), fp16),
        "layers.1.full": from_bits(list(range(0x38, 0x48)), (2, 8), fp8),
        "layers.1.empty": torch.zeros(3, 5, dtype=bf16),
        "scalar": torch.tensor(-0.0, dtype=fp32),
        "no_rows": torch.empty(0, 5, dtype=bf16),
        "no_columns": torch.empty(4, 0, dtype=fp16),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.tensor([[-1, 2**62], [0, -(2**63)]], dtype=torch.int64),
        "f64": torch.tensor([1e300, -0.0, 5e-324], dtype=torch.float64),
        "e5m2": torch.tensor([1.5, -0.0, 57344.0], dtype=torch.float32).to(torch.float8_e5m2),
    }


def write(directory: Path, *, backend: str | None = None) -> None:
    """Write the checkpoint, packed by one of the kernel backends."""
    tensors = dense_tensors()
    writer = CheckpointWriter(directory, shards=len(SHARDS))
    for number, blocks in enumerate(SHARDS):
        with writer.shard(number, header_reserve_bytes=1) as shard:
            for block, names in blocks.items():
                with shard.block(block):
                    for name in names:
                        stored: torch.Tensor | PackedTensor = tensors[name]
                        if name not in PLAIN:
                            stored = encode(tensors[name], backend=backend)
                        shard.add(name, stored, aliases=ALIASES.get(name, ()))
    writer.finish()
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def expected(tensors: dict[str, torch.Tensor]) -> str:
    """Shape, dtype and bits of every tensor as JSON, so that reading never depends on this script."""
    table = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bits": tensor.reshape(-1).view(torch.uint8).numpy().tobytes().hex(),
        }
        for name, tensor in tensors.items()
    }
    return json.dumps(table, indent=1) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write(target, backend="reference")
    (target / "expected.json").write_text(expected(dense_tensors()))

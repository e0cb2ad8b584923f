"""Writes the golden checkpoint of codecs `exponent`, `int8` and `int4`; run once, kept to show what went in.

python -m tests.golden.make_v1_codecs DIRECTORY
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from endor.formats import CheckpointWriter, PackedTensor
from endor.kernels import decode, encode
from tests.golden.make_v1 import SPECIAL, expected, from_bits, noise

__all__ = ["LOSSLESS", "dense_tensors", "packed_tensors", "write"]

LOSSLESS = {
    "exponent.bf16": ("exponent", "bitmap"),
    "exponent.fp16": ("exponent", "bitmap"),
    "exponent.experts": ("exponent", "bitmap"),
    "exponent.any_bits": ("exponent", "bitmap"),
    "exponent.nothing": ("exponent", "bitmap"),
    "exponent.unpruned": ("exponent", "dense"),
    "exponent.unpruned_fp16": ("exponent", "dense"),
}
"""Entry -> codec and mask."""
LOSSY = {
    f"{codec}.{name}": (codec, mask)
    for codec in ("int8", "int4")
    for name, mask in (("pruned", "bitmap"), ("fp16", "bitmap"), ("fp32", "bitmap"), ("unpruned", "dense"))
}
CONFIG = {
    "model_type": "golden",
    "quantization_config": {"quant_method": "endor", "format_version": 1, "method": "none"},
}


RANKS = {
    True: [0] * 158 + [1] * 62 + [2] * 32 + [3, 4, 5, 9],
    False: [0] * 81 + [1] * 67 + [2] * 38 + [3] * 30 + [4] * 20 + [5] * 10 + [6] * 5 + [7] * 3 + [8, 9],
}
"""Share in 256 of each exponent, counted down from the largest, of pruned and unpruned weights."""


def weights(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, pruned: bool = True) -> torch.Tensor:
    """Like weights: a few common exponents, arbitrary signs and mantissas; every other one zero if pruned."""
    count = math.prod(shape)
    ranks, mask, head = noise(name + "/rank", count), noise(name + "/mask", count), noise(name, count * 4)
    words = []
    for i in range(count):
        below = RANKS[pruned][ranks[i]]
        raw = int.from_bytes(head[4 * i : 4 * i + 4], "little")
        if dtype == torch.bfloat16:
            word = raw & 0x807F | (121 - below) << 7
        elif dtype == torch.float16:
            word = raw & 0x83FF | (10 - below) << 10
        else:
            word = raw & 0x807FFFFF | (121 - below) << 23
        words.append(0 if pruned and mask[i] & 1 else word)
    return from_bits(words, shape, dtype)


def dense_tensors() -> dict[str, torch.Tensor]:
    """What was encoded, by name."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    tensors = {
        "exponent.bf16": weights("bf16", (70, 300), bf16),
        "exponent.fp16": weights("fp16", (20, 333), fp16),
        "exponent.experts": weights("experts", (3, 6, 200), bf16),
        "exponent.any_bits": from_bits(
            [int.from_bytes(noise("any", 3000)[2 * i : 2 * i + 2], "little") for i in range(1500)],
            (5, 300),
            bf16,
        ),
        "exponent.nothing": torch.zeros(20, 300, dtype=bf16),
        "exponent.unpruned": weights("unpruned", (40, 256), bf16, pruned=False),
        "exponent.unpruned_fp16": weights("unpruned16", (9, 129), fp16, pruned=False),
    }
    tensors["exponent.bf16"][14:34] = 0  # a whole row block
    for name, special in (("exponent.bf16", SPECIAL[bf16]), ("exponent.fp16", SPECIAL[fp16])):
        words = from_bits(list(special), (len(special),), tensors[name].dtype)
        tensors[name][5, : len(special)] = words
    for codec in ("int8", "int4"):
        tensors[f"{codec}.pruned"] = weights("q/bf16", (21, 301), bf16)
        tensors[f"{codec}.fp16"] = weights("q/fp16", (5, 130), fp16)
        tensors[f"{codec}.fp32"] = weights("q/fp32", (5, 64), fp32)
        tensors[f"{codec}.unpruned"] = weights("q/unpruned", (3, 200), bf16, pruned=False)
    return tensors


def packed_tensors(forms: Mapping[str, tuple[str, str]], *, backend: str) -> dict[str, PackedTensor]:
    """Entries in the form of their codec and mask, packed by one of the kernel backends."""
    tensors = dense_tensors()
    return {
        name: encode(tensors[name], values=codec, mask=mask, backend=backend)
        for name, (codec, mask) in forms.items()
    }


def write(directory: Path) -> None:
    """Write the checkpoint, and what its tensors decode to."""
    packed = packed_tensors(LOSSLESS | LOSSY, backend="reference")
    writer = CheckpointWriter(directory, shards=1)
    with writer.shard(0, header_reserve_bytes=1) as shard, shard.block("layers.0"):
        for name, tensor in packed.items():
            shard.add(name, tensor)
    writer.finish()
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    decoded = {name: decode(tensor, backend="reference") for name, tensor in packed.items()}
    (directory / "expected.json").write_text(expected(decoded))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""Bits per weight of every codec beside the order-0 entropy bound, and its speed beside memcpy.

    python scripts/bench_codecs.py [--threads 1 2] [--json FILE]

The bound is what an ideal coder needs that knows how often each thing occurs but not where: the entropy of
the mask, and for every value that is kept the entropies of its exponent and of its sign and mantissa. Nothing
lossless that treats elements alike stays below it; `int8` and `int4` are not lossless.

First table: the weights that the converter prunes in the demo model. Second table: random matrices, pruned
by magnitude, by magnitude times column norms that vary as activations do (`wanda`), and not at all (`none`).
Speeds are of the dense bytes against memcpy in the same run; the matrices take turns, so that none is in a
cache, and so do the contenders. Encoding is measured once. zstd and lz4 compress the dense bytes where their
packages (zstandard, lz4) are installed. No speed is shown before the bits are checked.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import endor
from bench_common import environment, environment_line, print_table, rotated, write_json
from bench_decode import Turn, as_bytes, call_next, quiet_median_s, take_turn
from endor.formats import CODECS, CheckpointReader, PackedTensor
from endor.kernels import backends, decode, encode

DEMO_MODEL = Path(__file__).resolve().parent.parent / "endor" / "assets" / "demo_model"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


def random_weights(args: argparse.Namespace, kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normally distributed weights, half of every row pruned."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(args.rows, args.cols, generator=generator) * 0.02
    if kind == "none":
        return weight.to(dtype)
    importance = weight.abs()
    if kind == "wanda":
        importance *= torch.randn(args.cols, generator=generator).mul(0.5).exp()
    median = importance.median(dim=1, keepdim=True).values
    return torch.where(importance > median, weight, 0).to(dtype)


def demo_weights(method: str) -> list[torch.Tensor]:
    """The weights of the demo model that the converter has pruned to 50 %."""
    with tempfile.TemporaryDirectory() as folder:
        endor.convert(DEMO_MODEL, Path(folder) / "out", method=method, sparsity=0.5, values="raw", samples=16)
        with CheckpointReader(Path(folder) / "out") as reader:
            packed = [reader.read(name) for name in reader.names()]
            return [decode(p) for p in packed if p.layout.mask == "bitmap"]


def entropy_bits(counts: torch.Tensor) -> float:
    """Bits per symbol."""
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def bound_bits_per_weight(weights: list[torch.Tensor]) -> float:
    """The order-0 bound of all weights together."""
    bits = torch.cat([w.reshape(-1).view(torch.int16) for w in weights])
    kept = bits[bits != 0].to(torch.int32) & 0xFFFF
    mantissa = MANTISSA_BITS[weights[0].dtype]
    exponent = kept >> mantissa & ((1 << (15 - mantissa)) - 1)
    rest = (kept & ((1 << mantissa) - 1)) | (kept >> 15 << mantissa)
    mask = entropy_bits(torch.tensor([len(kept), len(bits) - len(kept)]))
    value = entropy_bits(exponent.bincount()) + entropy_bits(rest.bincount())
    return mask + value * len(kept) / max(len(bits), 1)


# ── size ────────────────────────────────────────────────────────────────────────────────────────────────────


def forms(kind: str) -> list[tuple[str, str]]:
    """Codec and mask of everything that is measured."""
    mask = "dense" if kind == "none" else "bitmap"
    return [(codec, mask) for codec in CODECS if (codec, mask) != ("raw", "dense")]


def sizes(weights: list[torch.Tensor], kind: str) -> dict[str, float]:
    """Bits per weight, all sections included."""
    numel = sum(w.numel() for w in weights)
    found = {"bound": bound_bits_per_weight(weights)}
    for codec, mask in forms(kind):
        nbytes = sum(encode(w, values=codec, mask=mask).layout.nbytes for w in weights)
        found[codec] = 8 * nbytes / numel
    return found


def bench_demo() -> list[dict[str, Any]]:
    rows = []
    for method in ("magnitude", "wanda"):
        weights = demo_weights(method)
        rows.append({"weights": f"demo model, {method}", **sizes(weights, method)})
    return rows


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────────────


def check(dense: torch.Tensor, packed: PackedTensor) -> None:
    """Refuse to measure what is wrong: bits where they are kept, the reference's where they are not."""
    codec = packed.layout.codec
    expected = dense if CODECS[codec].lossless else decode(packed, backend="reference")
    for name in backends():
        assert torch.equal(as_bytes(decode(packed, backend=name)), as_bytes(expected)), (codec, name)


def compressors(dense: list[torch.Tensor]) -> dict[str, tuple[float, Callable[[int], object]]]:
    """General-purpose compressors that are installed: bits per weight, and decompression."""
    found: dict[str, tuple[float, Callable[[int], object]]] = {}
    raw = [as_bytes(w.view(-1)).numpy().tobytes() for w in dense]
    numel = dense[0].numel()
    try:
        zstandard: Any = importlib.import_module("zstandard")
        packed = [zstandard.ZstdCompressor(level=1).compress(b) for b in raw]
        found["zstd -1"] = (
            8 * len(packed[0]) / numel,
            lambda i: zstandard.ZstdDecompressor().decompress(packed[i]),
        )
    except ImportError:
        pass
    try:
        lz4: Any = importlib.import_module("lz4.block")
        small = [lz4.compress(b) for b in raw]
        found["lz4"] = 8 * len(small[0]) / numel, lambda i: lz4.decompress(small[i])
    except ImportError:
        pass
    return found


def bench_random(args: argparse.Namespace, kind: str, dtype: str) -> list[dict[str, Any]]:
    """Size and speed of everything on random matrices of one kind."""
    dense = [random_weights(args, kind, DTYPES[dtype], seed) for seed in range(args.copies)]
    outs = [torch.zeros_like(w) for w in dense]
    nbytes = dense[0].nbytes

    def memcpy(i: int) -> None:
        ctypes.memmove(outs[i].data_ptr(), dense[(i + 1) % len(dense)].data_ptr(), nbytes)

    runs: dict[str, Callable[[int], object]] = {"memcpy": memcpy}
    bits: dict[str, float] = {"memcpy": 16.0}
    encode_mb_per_s: dict[str, float] = {}
    for codec, mask in forms(kind):
        torch.set_num_threads(1)
        began = perf_counter()
        packed = [encode(w, values=codec, mask=mask) for w in dense]
        speed = nbytes * len(dense) / (perf_counter() - began) / 1e6
        check(dense[0], packed[0])
        for name in (name for name in backends() if name != "reference"):
            run = f"{codec} {name}"
            runs[run] = partial(decode_one, packed, outs, name)
            bits[run], encode_mb_per_s[run] = packed[0].layout.bits_per_weight, speed
    for name, (size, decompress) in compressors(dense).items():
        runs[name], bits[name] = decompress, size
    bound = bound_bits_per_weight(dense)
    rows = []
    for threads in args.threads:
        turns = measure(runs, args, threads)
        for name, taken in turns.items():
            rows.append({
                "weights": f"{kind} {dtype}",
                "what": name,
                "threads": threads,
                "bits_per_weight": bits[name],
                "bound": bound,
                "times_memcpy": quiet_median_s(turns["memcpy"]) / quiet_median_s(taken),
                "gb_per_s": nbytes / quiet_median_s(taken) / 1e9,
                "encode_mb_per_s": encode_mb_per_s.get(name),
            })  # fmt: skip
    return rows


def decode_one(packed: list[PackedTensor], outs: list[torch.Tensor], backend: str, i: int) -> None:
    decode(packed[i], out=outs[i], backend=backend)


def measure(
    runs: dict[str, Callable[[int], object]], args: argparse.Namespace, threads: int
) -> dict[str, list[Turn]]:
    """Turns of every contender, interleaved."""
    torch.set_num_threads(threads)
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    numbers = itertools.cycle(range(args.copies))
    for round_number in range(args.rounds):
        for name in rotated(list(runs), round_number):
            turns[name].append(take_turn(partial(call_next, runs[name], numbers), args, threads))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=11008)
    parser.add_argument(
        "--kinds", nargs="+", choices=("magnitude", "wanda", "none"), default=["magnitude", "wanda", "none"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-ms", type=float, default=60, help="how long a contender runs in each round")
    parser.add_argument("--copies", type=int, default=2, help="matrices that take turns")
    parser.add_argument("--no-demo", action="store_true", help="leave the demo model out")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    print(environment_line(), flush=True)
    demo = [] if args.no_demo else bench_demo()
    if demo:
        columns = [name for name in demo[0] if name != "weights"]
        print_table(
            ["bits per weight", *columns], [(r["weights"], *(f"{r[c]:.3f}" for c in columns)) for r in demo]
        )
        print(flush=True)
    speed = [row for kind in args.kinds for dtype in args.dtypes for row in bench_random(args, kind, dtype)]
    print_table(
        ["", "weights", "threads", "b/w", "bound", "x memcpy", "GB/s", "encode MB/s"],
        [
            (
                r["what"],
                r["weights"],
                str(r["threads"]),
                f"{r['bits_per_weight']:.3f}",
                f"{r['bound']:.3f}",
                f"{r['times_memcpy']:.2f}",
                f"{r['gb_per_s']:.1f}",
                f"{r['encode_mb_per_s']:.0f}" if r["encode_mb_per_s"] else "",
            )
            for r in speed
        ],
    )
    if args.json:
        write_json(args.json, {"environment": environment(), "demo": demo, "speed": speed})


if __name__ == "__main__":
    main()

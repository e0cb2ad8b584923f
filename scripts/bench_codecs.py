"""Bits per weight of every codec beside the order-0 entropy bound, and its speed beside memcpy.

    python scripts/bench_codecs.py [--parts demo sizes speed] [--threads 1 2] [--json FILE]

The bound is what an ideal coder needs that knows how often each thing occurs but not where: the entropy of
the mask, and for every value that is kept the entropies of its exponent and of its sign and mantissa. Nothing
lossless that treats elements alike stays below it; `int8` and `int4` are not lossless.

Parts:

- `demo`: sizes of the weights that the converter prunes in the demo model;
- `sizes`: sizes of random matrices, Gaussian and Student-t (5 degrees of freedom), pruned by magnitude, by
  magnitude times column norms that vary as activations do (`wanda`), and not at all (`none`);
- `speed`: of decoding and encoding larger Gaussian ones, in dense bytes, against memcpy in the same run. The
  matrices take turns, so that none is in a cache, and so do the contenders. No speed is shown before the bits
  are checked.

Codecs use mask `bitmap` where weights are pruned, `dense` where not. zstd and lz4 compress the dense bytes,
and zstd those of `raw` (mask and kept values), where their packages are installed: `pip install -e .[bench]`.
They work in pieces of 1 MiB, which stay in the cache; what is decompressed is not copied anywhere.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import endor
from bench_common import (
    MIB,
    as_bytes,
    environment,
    environment_line,
    median,
    print_table,
    quiet_median_s,
    take_turns,
    write_json,
)
from endor.formats import CODECS, CheckpointReader, PackedTensor
from endor.kernels import backends, decode, encode

DEMO_MODEL = Path(__file__).resolve().parent.parent / "endor" / "assets" / "demo_model"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
KINDS = ("magnitude", "wanda", "none")
DISTRIBUTIONS = ("gaussian", "student-t")
PARTS = ("demo", "sizes", "speed")
SIZES_SHAPE = (1024, 5632)


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────


def random_weights(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, *, distribution: str = "gaussian", seed: int = 0
) -> torch.Tensor:
    """Random weights; unless the kind is `none`, half of every row is pruned."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    if distribution == "student-t":
        weight *= torch.randn(5, *shape, generator=generator).square().mean(dim=0).rsqrt()
    if kind == "none":
        return weight.to(dtype)
    importance = weight.abs()
    if kind == "wanda":
        importance *= torch.randn(shape[1], generator=generator).mul(0.5).exp()
    threshold = importance.median(dim=1, keepdim=True).values
    return torch.where(importance > threshold, weight, 0).to(dtype)


def demo_weights(method: str) -> list[torch.Tensor]:
    """The Linear weights of the demo model's blocks, of which the converter has pruned 50 % unless `none`."""
    pruned = _demo_entries("magnitude")
    return [decode(p) for name, p in _demo_entries(method).items() if pruned[name].layout.mask == "bitmap"]


def _demo_entries(method: str) -> dict[str, PackedTensor]:
    sparsity = 0.0 if method == "none" else 0.5
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        endor.convert(DEMO_MODEL, out, method=method, sparsity=sparsity, values="raw", samples=16)
        with CheckpointReader(out) as reader:
            return {name: reader.read(name) for name in reader.names()}


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


# ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────


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
    for compressor in compressors():
        pieces = [piece for w in weights for piece in compressor.compressed_weight(w)]
        found[compressor.name] = 8 * sum(map(len, pieces)) / numel
    return found


def bench_demo(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for kind in args.kinds:
        yield {
            "weights": f"demo model, {kind}",
            "kind": kind,
            "dtype": "bf16",
            **sizes(demo_weights(kind), kind),
        }


def bench_sizes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in args.dtypes:
        for distribution in DISTRIBUTIONS:
            for kind in args.kinds:
                weight = random_weights(SIZES_SHAPE, kind, DTYPES[dtype], distribution=distribution)
                names = {"weights": f"{distribution}, {kind}, {dtype}", "kind": kind, "dtype": dtype}
                yield {**names, **sizes([weight], kind)}


# ── general-purpose compressors ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Compressor:
    """A general-purpose compressor whose package is installed."""

    name: str
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]

    def compressed(self, data: bytes) -> list[bytes]:
        """In pieces of 1 MiB."""
        return [self.compress(data[begin : begin + MIB]) for begin in range(0, len(data), MIB)]

    def compressed_weight(self, weight: torch.Tensor) -> list[bytes]:
        return self.compressed(dense_bytes(weight))

    def decompress_all(self, copies: list[list[bytes]], i: int) -> None:
        for piece in copies[i]:
            self.decompress(piece)


def compressors() -> Iterator[Compressor]:
    """Those that are installed."""
    try:
        zstandard: Any = importlib.import_module("zstandard")
        for level in (1, 9):
            compress = zstandard.ZstdCompressor(level=level).compress
            yield Compressor(f"zstd -{level}", compress, zstandard.ZstdDecompressor().decompress)
    except ImportError:
        pass
    try:
        lz4: Any = importlib.import_module("lz4.block")
        yield Compressor("lz4", lz4.compress, lz4.decompress)
    except ImportError:
        pass


def dense_bytes(weight: torch.Tensor) -> bytes:
    return as_bytes(weight.reshape(-1)).numpy().tobytes()


def packed_bytes(packed: PackedTensor) -> bytes:
    return b"".join(as_bytes(section.reshape(-1)).numpy().tobytes() for section in packed.sections.values())


# ── speed ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Contender:
    """What decodes: how small it makes the weights, and how fast it did; MB/s are of dense bytes."""

    run: Callable[[int], object]
    bits_per_weight: float
    encode_mb_per_s: float | None = None


def check(dense: torch.Tensor, packed: PackedTensor) -> None:
    """Refuse to measure what is wrong: bits where they are kept, the reference's where they are not."""
    codec = packed.layout.codec
    expected = dense if CODECS[codec].lossless else decode(packed, backend="reference")
    for name in backends():
        if CODECS[codec].lossless or name != "reference":
            assert torch.equal(as_bytes(decode(packed, backend=name)), as_bytes(expected)), (codec, name)


def encode_timed(dense: list[torch.Tensor], work: Callable[[torch.Tensor], Any]) -> tuple[list[Any], float]:
    """What the work gives for each matrix, and its speed: the best, since the first meets cold memory."""
    done, taken_s = [], []
    for weight in dense:
        began = perf_counter()
        done.append(work(weight))
        taken_s.append(perf_counter() - began)
    return done, dense[0].nbytes / min(taken_s) / 1e6


def codec_contenders(
    dense: list[torch.Tensor], outs: list[torch.Tensor], kind: str
) -> Iterator[tuple[str, Contender]]:
    """Every codec on every backend. Encoding is by the fastest backend."""
    for codec, mask in forms(kind):
        packed, speed = encode_timed(dense, partial(encode, values=codec, mask=mask))
        check(dense[0], packed[0])
        for backend in (name for name in backends() if name != "reference"):
            run = partial(decode_one, packed, outs, backend)
            yield f"{codec} {backend}", Contender(run, packed[0].layout.bits_per_weight, speed)


def decode_one(packed: list[PackedTensor], outs: list[torch.Tensor], backend: str, i: int) -> None:
    decode(packed[i], out=outs[i], backend=backend)


def compressor_contenders(dense: list[torch.Tensor], kind: str) -> Iterator[tuple[str, Contender]]:
    numel = dense[0].numel()
    raw = [packed_bytes(encode(w, values="raw", mask="bitmap")) for w in dense] if kind != "none" else []
    for compressor in compressors():
        copies, speed = encode_timed(dense, compressor.compressed_weight)
        run = partial(compressor.decompress_all, copies)
        yield f"{compressor.name}", Contender(run, 8 * sum(map(len, copies[0])) / numel, speed)
        if raw and compressor.name == "zstd -1":
            pieces = [compressor.compressed(data) for data in raw]
            run = partial(compressor.decompress_all, pieces)
            yield f"{compressor.name} of raw", Contender(run, 8 * sum(map(len, pieces[0])) / numel)


def bench_speed(args: argparse.Namespace, kind: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Size and speed of everything on random matrices of one kind."""
    torch.set_num_threads(1)
    shape = (args.rows, args.cols)
    dense = [random_weights(shape, kind, DTYPES[dtype], seed=seed) for seed in range(args.copies)]
    outs = [torch.zeros_like(w) for w in dense]
    nbytes, bound = dense[0].nbytes, bound_bits_per_weight(dense)

    def memcpy(i: int) -> None:
        ctypes.memmove(outs[i].data_ptr(), dense[(i + 1) % len(dense)].data_ptr(), nbytes)

    contenders = {"memcpy": Contender(memcpy, 16.0), **dict(codec_contenders(dense, outs, kind))}
    single = dict(compressor_contenders(dense, kind))  # they know one thread only
    for threads in args.threads:
        taking_part = contenders | (single if threads == 1 else {})
        timings = take_turns(
            {name: contender.run for name, contender in taking_part.items()},
            copies=args.copies,
            rounds=args.rounds,
            turn_s=args.turn_ms / 1e3,
            threads=threads,
        )
        memcpy_s = quiet_median_s(timings["memcpy"])
        for name, taken in timings.items():
            yield {
                "weights": f"{kind} {dtype}",
                "what": name,
                "threads": threads,
                "bits_per_weight": taking_part[name].bits_per_weight,
                "bound": bound,
                "times_memcpy": memcpy_s / quiet_median_s(taken),
                "gb_per_s": nbytes / quiet_median_s(taken) / 1e9,
                "encode_mb_per_s": taking_part[name].encode_mb_per_s if threads == 1 else None,
                "others": median(timing.others for timing in taken),
            }


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────


def print_sizes(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if name not in {"weights", "kind", "dtype"}]
    print_table(
        ["bits per weight", *columns],
        [(row["weights"], *(f"{row[c]:.3f}" if c in row else "" for c in columns)) for row in rows],
    )
    print(flush=True)


def print_speeds(rows: list[dict[str, Any]]) -> None:
    print_table(
        ["", "weights", "threads", "b/w", "bound", "x memcpy", "GB/s", "encode MB/s", "others"],
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
                f"{r['others']:.0%}",
            )
            for r in rows
        ],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=4096, help="of the matrices whose speed is measured")
    parser.add_argument("--cols", type=int, default=11008, help="of the matrices whose speed is measured")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-ms", type=float, default=60, help="how long a contender runs in each round")
    parser.add_argument("--copies", type=int, default=2, help="matrices that take turns")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    print(environment_line(), flush=True)
    report: dict[str, Any] = {"environment": environment()}
    for part, bench in (("demo", bench_demo), ("sizes", bench_sizes)):
        if part in args.parts:
            report[part] = list(bench(args))
            print_sizes(report[part])
    if "speed" in args.parts:
        report["speed"] = [
            row for kind in args.kinds for dtype in args.dtypes for row in bench_speed(args, kind, dtype)
        ]
        print_speeds(report["speed"])
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()

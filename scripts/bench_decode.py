"""Speed of encoding and decoding, per backend and element size, beside what memory allows in the same run.

    python scripts/bench_decode.py [--threads 1 2] [--json FILE]

GB/s are bytes of the dense tensor. The matrices take turns, so that none is in a cache; contenders take
turns too. Bounds measured in the same run: memcpy (of the C library) of the dense bytes, and the
streaming-store limit: decoding a matrix of zeros, which reads one bit per element and writes everything.
With one thread the thread's own CPU time is counted, which other processes disturb less; with more, wall
time. The column `others` says how much of the machine other processes used; medians are over the quieter half
of the turns. No speed is shown before the bits are checked.

The last table is the work of a streamed model: decode a weight into scratch, multiply it with one row, and
so on with the next weight.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench_common import (
    Timing,
    as_bytes,
    clock_of,
    environment,
    environment_line,
    median,
    print_table,
    quiet_median_s,
    random_pruned,
    take_turn,
    take_turns,
    write_json,
)
from endor.formats.packed import PackedTensor
from endor.kernels import backends, decode, encode, native_backend
from endor.kernels.openmp import parallel_address
from endor.kernels.registry import choose

CPU = torch.device("cpu")
DTYPES = {"f8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "f32": torch.float32}
SCRATCH_SHAPE = (5632, 2048)  # the largest weights of the 1.1 B model of bench_stream.py


@dataclass(frozen=True)
class Matrices:
    """Matrices that take turns, packed and dense, and memory to write to."""

    dense: list[torch.Tensor]
    packed: list[PackedTensor]
    zeros: list[PackedTensor]
    out: list[torch.Tensor]
    bitmap: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], dtype: torch.dtype, density: float, copies: int) -> Matrices:
        dense = [random_pruned(shape, dtype=dtype, density=density, seed=seed) for seed in range(copies)]
        packed = [encode(weight) for weight in dense]
        zeros = [encode(torch.zeros(shape, dtype=dtype)) for _ in range(copies)]
        out = [torch.zeros(shape, dtype=dtype) for _ in range(copies)]
        g = packed[0].layout.geometry
        bitmap = torch.zeros(g.rows, g.bitmap_row_bytes, dtype=torch.uint8)
        return cls(dense, packed, zeros, out, bitmap, torch.zeros(g.row_blocks + 1, dtype=torch.int64))


def check_bits(m: Matrices) -> None:
    """Refuse to measure what is wrong."""
    for name in backends():
        packed = encode(m.dense[0], backend=name)
        for section, expected in m.packed[0].sections.items():
            assert torch.equal(as_bytes(packed.sections[section]), as_bytes(expected)), (name, section)
        decode(packed, out=m.out[0], backend=name)
        assert torch.equal(as_bytes(m.out[0]), as_bytes(m.dense[0])), name


def contenders(m: Matrices) -> dict[str, Callable[[int], object]]:
    """What is measured, each a function of the number of the matrix whose turn it is."""
    n = len(m.dense)
    nbytes = m.dense[0].nbytes

    def memcpy(i: int) -> None:
        ctypes.memmove(m.out[i].data_ptr(), m.dense[(i + 1) % n].data_ptr(), nbytes)

    runs: dict[str, Callable[[int], object]] = {
        "memcpy": memcpy,
        "streaming-store limit": lambda i: decode(m.zeros[i], out=m.out[i]),
    }
    for name in backends():
        runs[f"decode {name}"] = partial(decode_again, m, name)
        runs[f"encode {name}"] = partial(encode_again, m, name)
    runs["encode, new memory each time"] = lambda i: encode(m.dense[i])
    runs["clone, new memory each time"] = lambda i: m.dense[i].clone()
    return runs


def decode_again(m: Matrices, name: str, i: int) -> None:
    decode(m.packed[i], out=m.out[i], backend=name)


def encode_again(m: Matrices, name: str, i: int) -> None:
    """Encode into memory that is there, as memcpy copies, where the backend can."""
    backend = choose(name, "raw", CPU)
    if isinstance(backend, native_backend.NativeBackend):
        backend.encode_into(m.dense[i], m.bitmap, m.offsets, m.out[i])
    else:
        backend.encode(m.dense[i], "raw")


def bench_codec(args: argparse.Namespace, dtype: str, threads: int) -> list[dict[str, Any]]:
    """Medians over the rounds for one element size."""
    m = Matrices.random((args.rows, args.cols), DTYPES[dtype], args.density, args.copies)
    check_bits(m)
    turns = take_turns(
        contenders(m), copies=args.copies, rounds=args.rounds, turn_s=args.turn_ms / 1e3, threads=threads
    )
    memcpy, nbytes = quiet_median_s(turns["memcpy"]), m.dense[0].nbytes
    return [
        {
            "what": name,
            "dtype": dtype,
            "threads": threads,
            "gb_per_s": nbytes / quiet_median_s(taken) / 1e9,
            "times_memcpy": memcpy / quiet_median_s(taken),
            "others": median(turn.others for turn in taken),
        }
        for name, taken in turns.items()
    ]


@contextmanager
def variant(*, own_threads: bool, streaming: bool) -> Iterator[None]:
    """Decode with other threads or other stores than the default."""
    extension = importlib.import_module("endor.kernels._native")
    before = native_backend.STREAMING_BYTES
    native_backend.STREAMING_BYTES = 0 if streaming else 1 << 60
    extension.set_openmp(0 if own_threads else parallel_address())
    try:
        yield
    finally:
        native_backend.STREAMING_BYTES = before
        extension.set_openmp(parallel_address())


def bench_scratch(args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Decode into scratch and multiply, weight after weight: milliseconds per weight."""
    torch.set_num_threads(threads)
    weights = [
        encode(random_pruned(SCRATCH_SHAPE, dtype=torch.bfloat16, density=args.density, seed=seed))
        for seed in range(8)
    ]
    scratch = torch.zeros(SCRATCH_SHAPE, dtype=torch.bfloat16)
    x = torch.randn(1, SCRATCH_SHAPE[1]).to(torch.bfloat16)
    kinds = [(own, streaming) for own in (False, True) for streaming in (False, True)]
    turns: dict[tuple[bool, bool], list[tuple[Timing, float]]] = {kind: [] for kind in kinds}
    for round_number in range(args.rounds):
        for own, streaming in kinds[round_number % 4 :] + kinds[: round_number % 4]:
            with variant(own_threads=own, streaming=streaming):
                split = Split(clock_of(threads))
                work = partial(decode_and_multiply, weights, scratch, x, split)
                both = take_turn(work, turn_s=args.turn_ms / 1e3, threads=threads)
                turns[own, streaming].append((both, split.decode_s / split.calls))
    return [
        {
            "threads_of": "own pool" if own else "torch's OpenMP",
            "stores": "streaming" if streaming else "cached",
            "threads": threads,
            "decode_ms": 1e3 * quiet_median_s([Timing(decoding, both.others) for both, decoding in taken]),
            "both_ms": 1e3 * quiet_median_s([both for both, _ in taken]) / len(weights),
            "others": median(both.others for both, _ in taken),
        }
        for (own, streaming), taken in turns.items()
    ]


@dataclass
class Split:
    """How much of the time went into decoding."""

    clock: Callable[[], float]
    calls: int = 0
    decode_s: float = 0.0


def decode_and_multiply(
    weights: list[PackedTensor], scratch: torch.Tensor, x: torch.Tensor, split: Split
) -> None:
    for packed in weights:
        began = split.clock()
        decode(packed, out=scratch)
        split.decode_s += split.clock() - began
        split.calls += 1
        F.linear(x, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=11008)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn-ms", type=float, default=60, help="how long a contender runs in each round")
    parser.add_argument("--copies", type=int, default=3, help="matrices that take turns")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    print(environment_line(), flush=True)
    codec = [row for n in args.threads for dtype in args.dtypes for row in bench_codec(args, dtype, n)]
    print_table(
        ["", "dtype", "threads", "GB/s", "x memcpy", "others"],
        [
            (
                r["what"],
                r["dtype"],
                str(r["threads"]),
                f"{r['gb_per_s']:.1f}",
                f"{r['times_memcpy']:.2f}",
                f"{r['others']:.0%}",
            )
            for r in codec
        ],
    )
    scratch = [row for n in args.threads for row in bench_scratch(args, n)] if len(backends()) > 1 else []
    print()
    print_table(
        ["threads of", "stores", "threads", "decode ms", "both ms", "others"],
        [
            (
                r["threads_of"],
                r["stores"],
                str(r["threads"]),
                f"{r['decode_ms']:.3f}",
                f"{r['both_ms']:.3f}",
                f"{r['others']:.0%}",
            )
            for r in scratch
        ],
    )
    if args.json:
        write_json(args.json, {"environment": environment(), "codec": codec, "scratch": scratch})


if __name__ == "__main__":
    main()

"""Speed of y = x W^T for few rows of x: from the packed weight, from the dense one, and decoded first.

    python scripts/bench_matmul.py [--codecs raw int4] [--threads 1 2] [--json FILE]

Contenders, on the same bf16 weights with half of the values pruned:

- `dense`: torch's F.linear on the dense weight, which is what a model that fits in memory costs;
- `CODEC, decoded`: the whole weight decoded to scratch memory, then F.linear;
- `CODEC ISA`: `endor.kernels.matmul.linear`, for every codec and instruction set for which there is code;
- `CODEC, as run`: what a model does, which is the latter for few rows of x and, for more, tiles that are
  decoded and multiplied while they are in the cache.

Copies of the weight take turns, so many that they do not fit in a cache; contenders take turns too. Shown are
medians over the quieter half of the turns, and how many times faster than dense, a median of ratios within a
round. With one thread the thread's own CPU time is counted, which other processes disturb less; with more,
wall time. `others` says how much of the machine other processes used. No speed is shown before every
contender is within its rounding of float64, for lossy codecs with the weights that they stand for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench_common import (
    Timing,
    clones,
    copies_beyond_cache,
    environment,
    environment_line,
    median,
    print_table,
    quiet_median_s,
    random_pruned,
    take_turns,
    write_json,
)
from endor.formats import CODECS
from endor.formats.packed import PackedTensor
from endor.kernels import decode, decode_rows, encode, matmul
from endor.kernels.backend import rows_of
from endor.kernels.linear import packed_linear

# 4096 x 11008 is a 7 B model's; the others are those of the 1.1 B model of bench_stream.py, the head last.
SHAPES = ((4096, 11008), (2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048))

Run = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Copies of a weight that take turns, dense and packed by each codec, and memory to decode to."""

    dense: list[torch.Tensor]
    packed: dict[str, list[PackedTensor]]
    decoded: dict[str, torch.Tensor]
    scratch: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], density: float, codecs: list[str]) -> Weights:
        weight = random_pruned(shape, dtype=torch.bfloat16, density=density)
        packed = {codec: encode(weight, values=codec, mask="bitmap") for codec in codecs}
        copies = copies_beyond_cache(min(p.layout.nbytes for p in packed.values()))
        return cls(
            [weight.clone() for _ in range(copies)],
            {codec: clones(p, copies) for codec, p in packed.items()},
            {codec: decode(p) for codec, p in packed.items()},
            torch.zeros_like(weight),
        )


def contenders(w: Weights, x: torch.Tensor, isas: list[str]) -> dict[str, tuple[str, Run]]:
    """What is measured: the codec whose weights it multiplies, and a function of the number of the copy."""
    runs: dict[str, tuple[str, Run]] = {"dense": ("", lambda i: F.linear(x, w.dense[i]))}
    for codec, packed in w.packed.items():
        runs[f"{codec}, decoded"] = codec, partial(_decode_first, x, packed, w.scratch)
        for isa in isas:
            if matmul.linear(x, packed[0], isa=isa) is not None:
                runs[f"{codec} {isa}"] = codec, partial(_fused, x, packed, isa)
        runs[f"{codec}, as run"] = codec, partial(_as_run, x, packed, TileScratch(w.scratch))
    return runs


def _decode_first(x: torch.Tensor, packed: list[PackedTensor], scratch: torch.Tensor, i: int) -> torch.Tensor:
    return F.linear(x, decode(packed[i], out=scratch))


@dataclass(frozen=True)
class TileScratch:
    """Memory that every tile is decoded into."""

    memory: torch.Tensor
    status: None = None

    def decode_rows(
        self, packed: PackedTensor, start_block: int, stop_block: int, dtype: torch.dtype
    ) -> torch.Tensor:
        rows = rows_of(packed.layout, start_block, stop_block)
        return decode_rows(packed, start_block, stop_block, self.memory[: len(rows)]).to(dtype)


def _as_run(x: torch.Tensor, packed: list[PackedTensor], scratch: TileScratch, i: int) -> torch.Tensor:
    y = packed_linear(x, packed[i], None, dtype=x.dtype, scratch=scratch)
    assert y is not None
    return y


def _fused(x: torch.Tensor, packed: list[PackedTensor], isa: str, i: int) -> torch.Tensor:
    y = matmul.linear(x, packed[i], isa=isa)
    assert y is not None
    return y


def check(runs: dict[str, tuple[str, Run]], w: Weights, x: torch.Tensor) -> None:
    """Refuse to measure what is wrong: float32 sums, rounded to bf16 once."""
    for codec in ("", *w.packed):
        weight = w.decoded[codec].double() if codec else w.dense[0].double()
        exact = x.double() @ weight.T
        size = (x.double().square() @ weight.square().T).sqrt()
        bound = 8 * 2**-23 * x.shape[1] ** 0.5 * size + 2**-8 * exact.abs()
        for name, (multiplies, run) in runs.items():
            if multiplies == codec:
                assert ((run(0).double() - exact).abs() <= bound).all(), name


def bench(w: Weights, rows: int, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per contender for a number of rows of x."""
    torch.set_num_threads(threads)
    shape = tuple(w.scratch.shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    runs = contenders(w, x, args.isas)
    check(runs, w, x)
    timings = take_turns(
        {name: run for name, (_, run) in runs.items()},
        copies=len(w.dense),
        rounds=args.rounds,
        turn_s=args.turn_ms / 1e3,
        threads=threads,
    )
    return [
        {
            "shape": list(shape),
            "batch": rows,
            "threads": threads,
            "what": name,
            "codec": runs[name][0],
            "ms": 1e3 * quiet_median_s(taken),
            "times_dense": times_faster(taken, timings["dense"]),
            "others": median(timing.others for timing in taken),
        }
        for name, taken in timings.items()
    ]


def times_faster(taken: list[Timing], dense: list[Timing]) -> float:
    """Median of the ratios within a round."""
    return median(theirs.call_s / ours.call_s for theirs, ours in zip(dense, taken, strict=True))


def show(results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["what"] for r in results))
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in results:
        lines.setdefault((*r["shape"], r["batch"], r["threads"]), {})[r["what"]] = r
    print_table(
        ["shape", "batch", "threads", "dense ms", *names[1:], "others"],
        [
            (
                f"{key[0]} x {key[1]}",
                str(key[2]),
                str(key[3]),
                f"{cells['dense']['ms']:.3f}",
                *(f"{cells[name]['times_dense']:.2f}x" if name in cells else "" for name in names[1:]),
                f"{median(cell['others'] for cell in cells.values()):.0%}",
            )
            for key, cells in lines.items()
        ],
    )


def parse_shape(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = matmul.instruction_sets()
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument(
        "--isas", nargs="+", choices=known, default=list(known[:1]), help="default: the fastest"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-ms", type=float, default=20, help="how long a contender runs in each round")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if not known:
        parser.error("the native extension is not installed, and nothing else multiplies packed weights")
    print(environment_line(), flush=True)
    results = []
    for shape in args.shapes:
        weights = Weights.random(shape, args.density, args.codecs)
        results += [
            line for n in args.threads for rows in args.batch for line in bench(weights, rows, n, args)
        ]
    show(results)
    if args.json:
        write_json(args.json, {"environment": environment(), "matmul": results})


if __name__ == "__main__":
    main()

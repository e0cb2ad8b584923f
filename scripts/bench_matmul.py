"""Speed of y = x W^T for few rows of x: from the packed weight, from the dense one, and decoded first.

    python scripts/bench_matmul.py [--threads 1 2] [--json FILE]

Contenders, on the same bf16 weights with half of the values pruned:

- `dense`: torch's F.linear on the dense weight, which is what a model that fits in memory costs;
- `decode`: the weight decoded to scratch memory, then F.linear, which is what Endor does without this kernel;
- one per instruction set: `endor.kernels.matmul.linear`.

Weights take turns, so many that they do not fit in a cache; contenders take turns too. Shown are medians over
the quieter half of the turns, and how many times faster than dense, a median of ratios within a round. With
one thread the thread's own CPU time is counted, which other processes disturb less; with more, wall time. The
column `others` says how much of the machine other processes used. No speed is shown before every contender
is within its rounding of float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench_common import environment, environment_line, median, print_table, rotated, write_json
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode, matmul

# 4096 x 11008 is a 7 B model's; the others are those of the 1.1 B model of bench_stream.py, the head last.
SHAPES = ((4096, 11008), (2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048))
CACHE_BYTES = 160_000_000


@dataclass(frozen=True)
class Weights:
    """Copies of a weight that take turns, dense and packed, and memory to decode to."""

    dense: list[torch.Tensor]
    packed: list[PackedTensor]
    scratch: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], density: float) -> Weights:
        generator = torch.Generator().manual_seed(0)
        keep = torch.rand(shape, generator=generator) < density
        # Not times `keep`: that would leave -0.0 behind, whose bits are kept.
        weight = torch.where(keep, torch.randn(shape, generator=generator), 0.0).bfloat16()
        packed = encode(weight, values="raw", mask="bitmap")
        copies = max(3, math.ceil(CACHE_BYTES / packed.layout.nbytes))
        sections = packed.sections.items()
        return cls(
            [weight.clone() for _ in range(copies)],
            [PackedTensor(packed.layout, {k: v.clone() for k, v in sections}) for _ in range(copies)],
            torch.zeros_like(weight),
        )


def contenders(w: Weights, x: torch.Tensor, isas: list[str]) -> dict[str, Callable[[int], torch.Tensor]]:
    """What is measured, each a function of the number of the weight whose turn it is."""

    def fused(isa: str, i: int) -> torch.Tensor:
        y = matmul.linear(x, w.packed[i], isa=isa)
        assert y is not None
        return y

    runs: dict[str, Callable[[int], torch.Tensor]] = {
        "dense": lambda i: F.linear(x, w.dense[i]),
        "decode": lambda i: F.linear(x, decode(w.packed[i], out=w.scratch)),
    }
    return runs | {isa: partial(fused, isa) for isa in isas}


def check(runs: dict[str, Callable[[int], torch.Tensor]], w: Weights, x: torch.Tensor) -> None:
    """Refuse to measure what is wrong: float32 sums, rounded to bf16 once."""
    exact = x.double() @ w.dense[0].double().T
    size = (x.double().square() @ w.dense[0].double().square().T).sqrt()
    bound = 8 * 2**-23 * x.shape[1] ** 0.5 * size + 2**-8 * exact.abs()
    for name, run in runs.items():
        assert ((run(0).double() - exact).abs() <= bound).all(), name


@dataclass(frozen=True)
class Turn:
    """One turn of a contender: seconds per call, and the share of the machine that others used meanwhile."""

    call_s: float
    others: float


def busy_s() -> float:
    """CPU time of the whole machine so far."""
    user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def take_turn(run: Callable[[int], object], numbers: Iterator[int], turn_s: float, threads: int) -> Turn:
    """Call `run` until the turn's time is over. The first call, with cold address caches, does not count."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    run(next(numbers))
    calls, busy, own, wall = 0, busy_s(), time.process_time(), time.perf_counter()
    began = clock()
    while calls < 2 or time.perf_counter() - wall < turn_s:
        run(next(numbers))
        calls += 1
    taken = clock() - began
    others = busy_s() - busy - (time.process_time() - own)
    return Turn(taken / calls, max(0.0, others / (time.perf_counter() - wall) / (os.cpu_count() or 1)))


def quiet_half(turns: list[Turn]) -> list[Turn]:
    return sorted(turns, key=lambda turn: turn.others)[: -(-len(turns) // 2)]


def bench(w: Weights, rows: int, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per contender for a number of rows of x."""
    torch.set_num_threads(threads)
    shape = tuple(w.scratch.shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    runs = contenders(w, x, args.isas)
    check(runs, w, x)
    turns: dict[str, list[Turn]] = {name: [] for name in runs}
    numbers = itertools.cycle(range(len(w.dense)))
    for round_number in range(args.rounds):
        for name in rotated(list(runs), round_number):
            turns[name].append(take_turn(runs[name], numbers, args.turn_ms / 1e3, threads))
    return [
        {
            "shape": list(shape),
            "batch": rows,
            "threads": threads,
            "what": name,
            "ms": 1e3 * median(turn.call_s for turn in quiet_half(taken)),
            "times_dense": median(
                dense.call_s / turn.call_s for dense, turn in zip(turns["dense"], taken, strict=True)
            ),
            "others": median(turn.others for turn in taken),
        }
        for name, taken in turns.items()
    ]


def show(results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(r["what"] for r in results))
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in results:
        lines.setdefault((*r["shape"], r["batch"], r["threads"]), {})[r["what"]] = r
    print_table(
        ["shape", "batch", "threads", *(f"{name} ms" for name in names), "others"],
        [
            (
                f"{key[0]} x {key[1]}",
                str(key[2]),
                str(key[3]),
                *(
                    f"{cells[name]['ms']:.3f}"
                    + ("" if name == "dense" else f" ({cells[name]['times_dense']:.2f}x)")
                    for name in names
                ),
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
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument(
        "--isas", nargs="+", choices=known, default=[name for name in known if name != "scalar"]
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
        weights = Weights.random(shape, args.density)
        results += [
            line for n in args.threads for rows in args.batch for line in bench(weights, rows, n, args)
        ]
    show(results)
    if args.json:
        write_json(args.json, {"environment": environment(), "matmul": results})


if __name__ == "__main__":
    main()

"""Compares what `endor plan` predicts with what happens: bytes and tokens/s for some budgets.

    python scripts/bench_plan.py MODEL --tokens 16

Tokens are drawn at random and stand alone, so that a Mixture-of-Experts routes to different experts; files
leave the page cache first. Bandwidths are measured in the same run, since disks drift.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

import endor
from endor.loaders import drop_from_page_cache
from endor.runtime import RunStats, runtime_of
from endor.runtime.bandwidth import measure_bandwidths
from endor.runtime.planner import USUAL, Budgets, Plan, Rates, plan
from endor.runtime.survey import Parts, survey
from endor.runtime.work import measure_work

_SHARES = (0, 25, 50, 75, 100)
_WARM_UP = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an Endor checkpoint")
    parser.add_argument("--tokens", type=int, default=16, help="to make for each budget")
    parser.add_argument("--depth", type=int, default=2)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    parts = survey(arguments.model, dtype=None, matmul="auto")
    rates = measured_rates(arguments.model, parts)
    print("| kept | from disk per token, predicted / real | tokens/s, predicted / real | bound |")
    print("| --- | --- | --- | --- |")
    for share in _SHARES:
        budget = parts.sizes.nbytes * share // 100
        expected = plan(parts.sizes, Budgets(budget), rates, depth=arguments.depth)
        moved, taken_s = run(arguments.model, budget, depth=arguments.depth, tokens=arguments.tokens)
        print(row(share, expected, moved, taken_s), flush=True)


def measured_rates(model: Path, parts: Parts) -> Rates:
    """As `endor plan` takes them, but for a disk that is measured now."""
    disk = measure_bandwidths(model).disk.bytes_per_s
    kinds = measure_work(parts, matmul="auto")
    named = ", ".join(f"{kind} {rate / 1e9:.1f}" for kind, rate in kinds.items())
    print(f"GB/s: disk {disk / 1e9:.2f}, {named}\n")
    return Rates(disk, min(kinds.values()), kinds=kinds, overheads=USUAL)


def run(model: Path, budget: int, *, depth: int, tokens: int) -> tuple[RunStats, float]:
    """What so many tokens moved, and the seconds they took."""
    loaded = endor.load(model, host_memory=budget, depth=depth, verify="never")
    torch.manual_seed(0)
    with runtime_of(loaded) as runtime, torch.inference_mode():
        _forwards(loaded, _WARM_UP)
        for file in model.glob("*.safetensors"):
            drop_from_page_cache(file)
        before, began_s = runtime.stats(), perf_counter()
        _forwards(loaded, tokens)
        return runtime.stats() - before, perf_counter() - began_s


def _forwards(model: Any, count: int) -> None:
    """Of one token each, drawn among all."""
    for _ in range(count):
        model(torch.randint(model.config.get_text_config().vocab_size, (1, 1)))


def row(share: int, expected: Plan, moved: RunStats, taken_s: float) -> str:
    real = moved.disk_bytes / moved.forwards / 1e6
    speeds = f"{expected.timing.tokens_per_s:.2f} / {moved.forwards / taken_s:.2f}"
    bytes_mb = f"{expected.traffic.disk / 1e6:.1f} / {real:.1f} MB"
    return f"| {share} % | {bytes_mb} | {speeds} | {expected.timing.bound} |"


if __name__ == "__main__":
    main()

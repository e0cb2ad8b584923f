#!/usr/bin/env python3
"""Tokens per second by how much of a converted model may stay in memory, every streamed byte from disk.

    python scripts/bench_budgets.py out --rounds 3

Budgets of 0 to 100 % of the compressed model take turns. Before each token the model's files are dropped from
the page cache. The gate: all budgets give the same greedy tokens. The bound is the disk's bandwidth, measured
beside each turn, over the bytes that a token reads; where nothing is read there is none.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import endor
from bench_common import (
    DiskProbe,
    environment_line,
    files_of,
    greedy_from_disk,
    hush_transformers,
    median,
    print_table,
    rotated,
    write_json,
)
from endor.runtime import runtime_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def run(directory: Path, *, host_memory: int, tokens: int, probe: DiskProbe) -> dict[str, Any]:
    """Generate greedily; the first token, which reads the prompt, is not counted."""
    model = endor.load(directory, host_memory=host_memory)
    runtime, files = runtime_of(model), files_of(directory, ".safetensors")
    bandwidth = [probe.bytes_per_s()]
    found, seconds = greedy_from_disk(model, torch.arange(3, 35), files, tokens=tokens + 1)
    bandwidth.append(probe.bytes_per_s())
    forwards = runtime.per_forward()[1:]
    result = {
        "tokens": found,
        "seconds": median(seconds[1:]),
        "disk_bytes": median([f.disk_bytes for f in forwards]),
        "stall": median([f.stall_s for f in forwards]),
        "compute": median([f.compute_s + f.decode_s for f in forwards]),
        "bytes_per_s": median(bandwidth),
        "resident_bytes": runtime.resident_bytes,
    }
    runtime.close()
    return result


def report(directory: Path, options: argparse.Namespace) -> None:
    files = files_of(directory, ".safetensors")
    everything = sum(path.stat().st_size for path in files)
    results: dict[float, list[dict[str, Any]]] = {share: [] for share in SHARES}
    names = [str(share) for share in SHARES]
    with DiskProbe(files) as probe:
        for number in range(options.rounds):
            for name in rotated(names, number):
                budget = int(1.02 * float(name) * everything)
                results[float(name)].append(
                    run(directory, host_memory=budget, tokens=options.tokens, probe=probe)
                )
    tokens = {tuple(r["tokens"]) for each in results.values() for r in each}
    if len(tokens) > 1:
        raise SystemExit(f"the budgets do not agree about the tokens: {tokens}")
    middle = {
        share: {key: median([r[key] for r in each]) for key in each[0] if key != "tokens"}
        for share, each in results.items()
    }
    print_table(
        [
            "in memory",
            "MB from disk / token",
            "tokens/s",
            "x nothing",
            "bound",
            "ms: stall",
            "decode + compute",
        ],
        [_row(share, mid, middle[0.0]) for share, mid in middle.items()],
    )
    if options.json:
        write_json(options.json, {"results": {str(share): each for share, each in results.items()}})


def _row(share: float, mid: dict[str, float], nothing: dict[str, float]) -> list[str]:
    # What embeddings need, a few rows, is not worth a bound.
    bound = mid["bytes_per_s"] / mid["disk_bytes"] if mid["disk_bytes"] > 1e6 else 0.0
    return [
        f"{share:.0%}",
        f"{mid['disk_bytes'] / 1e6:.0f}",
        f"{1 / mid['seconds']:.2f}",
        f"{nothing['seconds'] / mid['seconds']:.2f}",
        f"{bound:.2f}" if bound else "-",
        f"{1e3 * mid['stall']:.0f}",
        f"{1e3 * mid['compute']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an Endor checkpoint")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hush_transformers()
    print(environment_line())
    report(options.model, options)


if __name__ == "__main__":
    main()

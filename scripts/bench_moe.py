#!/usr/bin/env python3
"""Mixture-of-Experts: bytes from disk and tokens per second by how much of the experts may stay in memory.

    python scripts/bench_moe.py --workdir /path/on/the/disk

A random OLMoE (64 experts a layer, 8 routed) is made and converted once. Before each token its files are
dropped from the page cache. The gate: all budgets give the same greedy tokens. The bound is the disk's
bandwidth, measured beside each turn, over the bytes that the token read.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import endor
from bench_common import (
    DiskProbe,
    environment_line,
    files_of,
    greedy_from_disk,
    hush_transformers,
    median,
    print_table,
    write_json,
)
from endor.runtime import runtime_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def shape(*, tiny: bool) -> transformers.OlmoeConfig:
    """64 experts, 8 routed: 1.7 billion parameters, 1.6 of them in experts; or a model for tests."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "vocab_size": 32000,
    }
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 200}
    return transformers.OlmoeConfig(
        num_attention_heads=8, num_key_value_heads=4, num_experts=64, num_experts_per_tok=8, **sizes
    )


def checkpoint(workdir: Path, values: str, *, tiny: bool) -> Path:
    """The converted model, made on first use."""
    out = workdir / f"moe-{'tiny-' if tiny else ''}{values}"
    if not (out / "config.json").exists():
        dense = workdir / f"moe-{'tiny-' if tiny else ''}dense"
        if not (dense / "config.json").exists():
            torch.manual_seed(0)
            model = transformers.OlmoeForCausalLM._from_config(shape(tiny=tiny), dtype=torch.bfloat16)
            model.save_pretrained(dense)
        endor.convert(dense, out, method="magnitude", sparsity=0.5, values=values)
    return out


def expert_bytes(directory: Path) -> int:
    with endor.open(directory) as opened:
        return sum(entry.nbytes for entry in opened.entries.values() if len(entry.layout.shape) == 3)


def run(directory: Path, *, host_memory: int, tokens: int, probe: DiskProbe) -> dict[str, Any]:
    """Generate greedily, every token's bytes from disk; the first, which reads the prompt, is not counted."""
    model = endor.load(directory, host_memory=host_memory, verify="never")
    runtime, files = runtime_of(model), files_of(directory, ".safetensors")
    bandwidth = [probe.bytes_per_s()]
    found, seconds = greedy_from_disk(model, torch.tensor([5, 17, 3, 99]), files, tokens=tokens + 1)
    bandwidth.append(probe.bytes_per_s())
    forwards = runtime.per_forward()[1:]
    runtime.close()
    read = median([f.disk_bytes for f in forwards])
    return {
        "tokens": found,
        "tokens_per_second": 1 / median(seconds[1:]),
        "disk_bytes": read,
        "host_bytes": median([f.host_bytes for f in forwards]),
        "stall_share": sum(f.stall_s for f in forwards) / sum(f.wall_s for f in forwards),
        "bound": median(bandwidth) / read if read else float("inf"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="where models are kept; a temporary folder by default")
    parser.add_argument("--values", default="auto")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the script")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hush_transformers()
    with tempfile.TemporaryDirectory(prefix="endor-bench-") as temporary:
        workdir = options.workdir or Path(temporary)
        report(checkpoint(workdir, options.values, tiny=options.tiny), options)


def report(directory: Path, options: argparse.Namespace) -> None:
    print(environment_line())
    experts = expert_bytes(directory)
    everything = sum(path.stat().st_size for path in files_of(directory, ".safetensors"))
    rest = everything - experts
    print(
        f"experts {experts / 1e6:.0f} MB, the rest {rest / 1e6:.0f} MB; "
        f"8 of 64 experts are {experts / 8e6:.1f} MB"
    )
    results: dict[float, list[dict[str, Any]]] = {share: [] for share in SHARES}
    probe = DiskProbe(files_of(directory, ".safetensors"))
    for _ in range(options.rounds):
        for share in SHARES:
            # Slots are as large as the largest expert: a little more than the experts' bytes.
            budget = 0 if not share else int(rest + 1.05 * share * experts)
            results[share].append(run(directory, host_memory=budget, tokens=options.tokens, probe=probe))
    tokens = {tuple(r["tokens"]) for each in results.values() for r in each}
    if len(tokens) > 1:
        raise SystemExit(f"the budgets do not agree about the tokens: {tokens}")
    rows = []
    for share, each in results.items():
        mid = {key: median([r[key] for r in each]) for key in each[0] if key != "tokens"}
        bound = f"{mid['bound']:.2f}" if mid["disk_bytes"] else "-"
        rows.append(
            [
                "nothing in memory" if not share else f"all else and {share:.0%} of the experts",
                f"{mid['disk_bytes'] / 1e6:.1f}",
                f"{mid['disk_bytes'] / everything:.0%}",
                f"{mid['tokens_per_second']:.2f}",
                bound,
                f"{mid['stall_share']:.0%}",
            ]
        )
    print_table(["budget", "MB from disk / token", "of the file", "tokens/s", "bound", "stall"], rows)
    if options.json:
        write_json(
            options.json, {"results": {str(k): v for k, v in results.items()}, "expert_bytes": experts}
        )


if __name__ == "__main__":
    main()

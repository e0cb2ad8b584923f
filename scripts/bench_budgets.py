#!/usr/bin/env python3
"""Tokens per second by how much of a converted model may stay in memory, every streamed byte from disk.

    python scripts/bench_budgets.py out --rounds 3 --dense DENSE
    python scripts/bench_budgets.py out --unstreamed

Budgets of 0 to 100 % of the compressed model take turns. Before each token the model's files are dropped from
the page cache. The gate: all budgets give the same greedy tokens. The bound is the disk's bandwidth, measured
beside each turn, over the bytes that a token reads; where nothing is read there is none.

With `--dense`, a plain checkpoint of the same (pruned) weights, accelerate takes turns with the same memory:
its own device map for as many bytes as Endor got, the rest offloaded to files. Its weights are not compressed
and add up in another order, so its tokens are compared among themselves, and its logits after the prompt with
Endor's.

With `--unstreamed` everything is in memory instead: `endor.load(host_memory=None)` against the same packed
weights in a model that no streaming machinery has touched.
"""

from __future__ import annotations

import argparse
import copy
import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import endor
from bench_common import (
    DiskProbe,
    environment,
    environment_line,
    files_of,
    greedy_from_disk,
    hush_transformers,
    median,
    print_table,
    read_from_disk_bytes,
    rotated,
    write_json,
)
from endor.runtime import runtime_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPT = torch.arange(3, 35)
TOLERANCE = 0.05
"""Of the norm of the logits: sums in another order give around 2 %, wrong weights 100 %."""
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The model as Endor and as accelerate has it, and where accelerate keeps what it offloads."""

    packed: Path
    dense: Path | None
    offload: Path | None


# ── contenders ──────────────────────────────────────────────────────────────────────────────────────────────


def run_endor(paths: Paths, probe: DiskProbe, *, budget_bytes: int, tokens: int) -> Result:
    """Generate greedily; the first token, which reads the prompt, is not counted."""
    model = endor.load(paths.packed, host_memory=budget_bytes)
    runtime, files = runtime_of(model), files_of(paths.packed, ".safetensors")
    bandwidth = [probe.bytes_per_s()]
    result = _generate(model, files, tokens=tokens)
    bandwidth.append(probe.bytes_per_s())
    forwards = runtime.per_forward()[1:]
    result |= {
        "disk_bytes": median([f.disk_bytes for f in forwards]),
        "stall": median([f.stall_s for f in forwards]),
        "compute": median([f.compute_s + f.decode_s for f in forwards]),
        "bytes_per_s": median(bandwidth),
        "resident_bytes": runtime.resident_bytes,
    }
    runtime.close()
    return result


def run_accelerate(paths: Paths, _probe: DiskProbe, *, budget_bytes: int, tokens: int) -> Result:
    """The same with accelerate's dispatch of the dense weights, those in memory that it puts there."""
    assert paths.dense is not None
    assert paths.offload is not None
    model, resident_bytes = _dispatched(paths.dense, paths.offload, budget_bytes)
    before = read_from_disk_bytes()
    result = _generate(model, files_of(paths.offload, ".dat"), tokens=tokens)
    disk_bytes = (read_from_disk_bytes() - before) / (tokens + 1)
    return result | {"disk_bytes": disk_bytes, "resident_bytes": resident_bytes}


def _dispatched(dense: Path, offload: Path, budget_bytes: int) -> tuple[Any, int]:
    from accelerate import disk_offload, dispatch_model, infer_auto_device_map

    model = _plain(dense)
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": budget_bytes}, no_split_module_classes=model._no_split_modules
    )
    kept = [name for name, place in device_map.items() if place == "cpu"]
    if not kept:  # dispatch_model does not take a map that is all disk
        return disk_offload(model, offload), 0
    own = [parameter for name in kept for parameter in model.get_submodule(name).parameters()]
    for parameter in own:
        parameter.data = parameter.data.clone()  # not pages of the file
    model = dispatch_model(model, device_map, offload_dir=offload)
    return model, sum(parameter.nbytes for parameter in own)


def _plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def _generate(model: Any, files: Sequence[Path], *, tokens: int) -> Result:
    logits: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _model, _args, out: logits.append(out.logits[0, -1].float()))
    found, seconds = greedy_from_disk(model, PROMPT, files, tokens=tokens + 1)
    hook.remove()
    return {"tokens": found, "seconds": median(seconds[1:]), "logits": logits[0]}


def offloaded(dense: Path) -> Path:
    """The folder with accelerate's files of the dense weights, beside them; written if it is missing."""
    from accelerate.utils import offload_state_dict

    folder = dense.with_name(f"{dense.name}-offload")
    if not (folder / "index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        offload_state_dict(folder, _plain(dense).state_dict())
    return folder


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────────


def measure(paths: Paths, options: argparse.Namespace) -> dict[str, dict[float, list[Result]]]:
    """All rounds, by contender and share."""
    files = files_of(paths.packed, ".safetensors")
    everything = sum(path.stat().st_size for path in files)
    runners: dict[str, Callable[..., Result]] = {"endor": run_endor}
    if paths.dense:
        runners["accelerate"] = run_accelerate
    turns = {f"{name} {share}": (name, share) for share in options.shares for name in runners}
    results: dict[str, dict[float, list[Result]]] = {n: {s: [] for s in options.shares} for n in runners}
    with DiskProbe(files) as probe:
        for number in range(options.rounds):
            for turn in rotated(list(turns), number):
                name, share = turns[turn]
                budget_bytes = int(1.02 * share * everything)
                result = runners[name](paths, probe, budget_bytes=budget_bytes, tokens=options.tokens)
                results[name][share].append(result)
                gc.collect()  # hooks and modules refer to each other: the weights would stay
    return results


def gate(results: Mapping[str, Mapping[float, Sequence[Result]]]) -> None:
    """Leave unless a contender's budgets agree about the tokens, and all about the prompt's logits."""
    for name, by_share in results.items():
        found = {tuple(r["tokens"]) for each in by_share.values() for r in each}
        if len(found) > 1:
            raise SystemExit(f"the budgets of {name} do not agree about the tokens: {found}")
    logits = [r["logits"] for by_share in results.values() for each in by_share.values() for r in each]
    error = max(float((each - logits[0]).norm() / logits[0].norm()) for each in logits)
    if not error <= TOLERANCE:  # NaN is not
        raise SystemExit(f"the logits are {error:.1%} apart, {TOLERANCE:.0%} are allowed")


def report(paths: Paths, options: argparse.Namespace) -> None:
    """Measure, then the tables and the JSON report."""
    results = measure(paths, options)
    gate(results)
    for by_share in results.values():
        for result in (r for each in by_share.values() for r in each):
            del result["logits"]
    middle = {
        name: {
            share: {key: median([r[key] for r in each]) for key in each[0] if key != "tokens"}
            for share, each in by_share.items()
        }
        for name, by_share in results.items()
    }
    _print_endor(middle["endor"])
    if "accelerate" in middle:
        print()
        _print_accelerate(middle["accelerate"], results)
    if options.json:
        keyed = {n: {str(share): each for share, each in by.items()} for n, by in results.items()}
        write_json(
            options.json,
            {
                "environment": environment(),
                "results": keyed["endor"],
                "accelerate": keyed.get("accelerate", {}),
            },
        )


def _print_endor(middle: Mapping[float, Mapping[str, float]]) -> None:
    print_table(
        [
            "Endor, in memory",
            "MB",
            "MB from disk / token",
            "tokens/s",
            f"x {min(middle):.0%}",
            "bound",
            "ms: stall",
            "decode + compute",
        ],
        [_row(share, mid, middle[min(middle)]) for share, mid in middle.items()],
    )


def _row(share: float, mid: Mapping[str, float], least: Mapping[str, float]) -> list[str]:
    # What embeddings need, a few rows, is not worth a bound.
    bound = mid["bytes_per_s"] / mid["disk_bytes"] if mid["disk_bytes"] > 1e6 else 0.0
    return [
        f"{share:.0%}",
        f"{mid['resident_bytes'] / 1e6:.0f}",
        f"{mid['disk_bytes'] / 1e6:.0f}",
        f"{1 / mid['seconds']:.2f}",
        f"{least['seconds'] / mid['seconds']:.2f}",
        f"{bound:.2f}" if bound else "-",
        f"{1e3 * mid['stall']:.0f}",
        f"{1e3 * mid['compute']:.0f}",
    ]


def _print_accelerate(
    middle: Mapping[float, Mapping[str, float]], results: Mapping[str, Mapping[float, Sequence[Result]]]
) -> None:
    def times(share: float) -> float:
        pairs = zip(results["endor"][share], results["accelerate"][share], strict=True)
        return median([theirs["seconds"] / ours["seconds"] for ours, theirs in pairs])

    print_table(
        ["accelerate, same memory", "MB", "MB from disk / token", "tokens/s", "Endor is x"],
        [
            [
                f"{share:.0%}",
                f"{mid['resident_bytes'] / 1e6:.0f}",
                f"{mid['disk_bytes'] / 1e6:.0f}",
                f"{1 / mid['seconds']:.2f}",
                f"{times(share):.1f}",
            ]
            for share, mid in middle.items()
        ],
    )


# ── everything in memory ────────────────────────────────────────────────────────────────────────────────────


def compare_unstreamed(directory: Path, options: argparse.Namespace) -> None:
    """Tokens/s with everything resident, with and without the streaming machinery; the same products.

    The model without it is `from_pretrained`'s, copied out of the mapped files into the process's own memory.
    """
    streamed = endor.load(directory, host_memory=None)
    models = {"with": streamed, "without": copy.deepcopy(_plain(directory))}
    found = {name: _timed(model, options.tokens)[0] for name, model in models.items()}  # also warms up
    if found["with"] != found["without"]:
        raise SystemExit(f"the tokens are not the same: {found}")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds):
        for name in rotated(list(models), number):
            seconds[name].append(_timed(models[name], options.tokens)[1])
    ratio = median([b / a for a, b in zip(seconds["with"], seconds["without"], strict=True)])
    rates = {name: 1 / median(each) for name, each in seconds.items()}
    print(
        f"all in memory: {rates['with']:.2f} tokens/s,"
        f" without machinery {rates['without']:.2f}: x {ratio:.3f}"
    )
    if options.json:
        write_json(options.json, {"environment": environment(), "unstreamed": seconds})
    runtime_of(streamed).close()


def _timed(model: Any, tokens: int) -> tuple[list[int], float]:
    """Greedy tokens, and the median seconds of those after the prompt's."""
    ids, cache, found, seconds = PROMPT.unsqueeze(0), None, [], []
    with torch.inference_mode():
        for _ in range(tokens + 1):
            began = perf_counter()
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
            seconds.append(perf_counter() - began)
    return found, median(seconds[1:])


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="an Endor checkpoint")
    add("--tokens", type=int, default=6)
    add("--rounds", type=int, default=3)
    add("--shares", type=_shares, default=SHARES, help="of the checkpoint's bytes, such as 0,0.5,1")
    add("--dense", type=Path, help="plain checkpoint of the same weights: accelerate takes turns with it")
    add("--unstreamed", action="store_true", help="compare with no streaming machinery, all in memory")
    add("--json", type=Path)
    options = parser.parse_args()
    hush_transformers()
    print(environment_line(), flush=True)
    if options.unstreamed:
        compare_unstreamed(options.model, options)
        return
    offload = offloaded(options.dense) if options.dense else None
    report(Paths(packed=options.model, dense=options.dense, offload=offload), options)


if __name__ == "__main__":
    main()

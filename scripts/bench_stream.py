#!/usr/bin/env python3
"""Tokens per second of a model that is streamed, against accelerate, transformers and the speed of the disk.

    python scripts/bench_stream.py --workdir /path/on/the/disk

Builds, once, a random Llama of 1.1 billion parameters, prunes half of its weights and keeps that as an Endor
checkpoint per codec (`--values`) and as a plain dense one with the same weights. Each contender runs these in
its own process; they take turns, so that all see the same drift of the machine, and in each round the disk's
sequential bandwidth is measured beside Endor's turn: bandwidth / bytes per token is the rate the link allows.

First comes the gate. Every contender reads the tokens that the dense weights generate and must find the same
ones likeliest. Those of a lossy codec are compared with its own decoded weights. Products straight from
packed weights add in another order than torch: their logits must lie within 5 % of the reference's. Without
that no speed is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import operator
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench_common import (
    LLAMA_1B,
    LLAMA_TINY,
    DiskProbe,
    LlamaShape,
    build_random_llama,
    environment,
    environment_line,
    files_of,
    hush_transformers,
    median,
    print_table,
    rotated,
    save_whole,
    wait_for_quiet,
    write_json,
)
from bench_stream_worker import CONTENDERS, DISTURBED, MODES, VALUES, Models, Turn, Worker, decoded

STREAMED = ("accelerate", "transformers", "mapped", "endor")
DEFAULT_CONTENDERS = {
    "disk": STREAMED,
    "warm": STREAMED,
    "resident": ("dense", "dense-huge", "endor-resident-decode", "endor-resident"),
}
TITLES = {"disk": "Every token from disk", "warm": "Warm page cache", "resident": "Everything in memory"}
BASELINES = ("accelerate", "mapped", "dense")
TOLERANCE = 0.05
"""Of the norm of the logits: sums in another order give around 2 % after 22 layers, wrong weights 100 %."""
ALLOWANCE_BYTES = 200_000_000
_DISK_SPACE = 3.0
_DISK_SPACE_PER_CODEC = 0.6


class GateError(Exception):
    """A contender's results are not those of its reference: its speed means nothing."""


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────


def build_models(workdir: Path, shape: LlamaShape, values: Sequence[str]) -> Models:
    """All forms of one pruned model, made where they are missing."""
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(workdir, shape)
    packed = {name: workdir / name for name in dict.fromkeys(("auto", *values))}
    models = Models(dense=workdir / "dense", offload=workdir / "offload", packed=packed)
    for name, out in packed.items():
        if not (out / "model.safetensors.index.json").exists():
            _build_endor(workdir / "source", out, shape, name, codecs=len(packed))
    if not models.dense.exists():
        save_whole(decoded(packed["auto"]), models.dense, shard_size="500MB")
    if not (models.offload / "index.json").exists():
        _build_offload(models)
    gc.collect()
    os.sync()  # writing back must not run beside the measurements
    return models


def _claim(workdir: Path, shape: LlamaShape) -> None:
    """Remember what the models in `workdir` are, so that another shape is never measured by mistake."""
    mark = workdir / "shape.json"
    text = json.dumps(dataclasses.asdict(shape))
    if mark.exists() and mark.read_text() != text:
        raise SystemExit(
            f"{workdir} holds a model of another shape, {mark.read_text()}: give another --workdir"
        )
    mark.write_text(text)


def _build_endor(source: Path, out: Path, shape: LlamaShape, values: str, *, codecs: int) -> None:
    import endor

    if not source.exists():
        build_random_llama(source, shape)
        dense_bytes = sum(path.stat().st_size for path in files_of(source, ".safetensors"))
        needed_bytes = int((_DISK_SPACE - 1 + _DISK_SPACE_PER_CODEC * codecs) * dense_bytes)
        free_bytes = shutil.disk_usage(source).free
        if free_bytes < needed_bytes:
            raise SystemExit(f"{source.parent}: {needed_bytes} bytes are needed, {free_bytes} are free")
    shutil.rmtree(out, ignore_errors=True)
    endor.convert(source, out, method="magnitude", sparsity=0.5, values=values)


def _build_offload(models: Models) -> None:
    from accelerate.utils import offload_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models.dense, dtype="auto")
    offload_state_dict(models.offload, model.state_dict())


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Series:
    """One contender in one mode: its turns, and the disk's bandwidth beside each where it was measured."""

    turns: list[Turn] = field(default_factory=list)
    disk_bytes_per_s: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each turn."""
        return [turn.tokens_per_s for turn in self.turns]

    def ratio_to(self, other: Series) -> float:
        """How many times faster, from turns of the same round."""
        return median(mine / theirs for mine, theirs in zip(self.rates, other.rates, strict=True))

    def bounds(self, streamed_bytes: int) -> list[float]:
        """Tokens per second that the link allowed in each round."""
        return [bandwidth / streamed_bytes for bandwidth in self.disk_bytes_per_s]


def check_tokens(expected: Turn, turn: Turn, *, name: str, source: str) -> None:
    """Raise GateError unless both turns found the same tokens."""
    if turn.token_ids != expected.token_ids:
        raise GateError(
            f"{name} generated {list(turn.token_ids)}, {source} {list(expected.token_ids)}:"
            " no speed is worth showing"
        )


def logits_error(reference: Turn, turn: Turn) -> float:
    """The largest difference of a token's logits, relative to their norm."""
    assert reference.logits is not None
    assert turn.logits is not None
    differences = np.linalg.norm(turn.logits - reference.logits, axis=1)
    return float((differences / np.linalg.norm(reference.logits, axis=1)).max())


def check_logits(reference: Turn, turn: Turn, *, name: str) -> float:
    """Raise GateError unless the logits are the reference's but for rounding; returns the difference."""
    error = logits_error(reference, turn)
    if not error <= TOLERANCE:  # NaN is not
        raise GateError(
            f"the logits of {name} are {error:.1%} from the reference's, {TOLERANCE:.0%} are allowed:"
            " no speed is worth showing"
        )
    return error


@dataclass
class Entrant:
    """A contender that has passed the gate: its process, and what it found there and must find each time."""

    worker: Worker
    gate: Turn
    follow: tuple[int, ...]
    error: float


def start(
    stack: ExitStack, names: Sequence[str], models: Models, arguments: argparse.Namespace
) -> dict[str, Entrant]:
    """Pass the gate; the contenders by name."""
    references = {
        name: _reference(name, models, arguments) for name in {CONTENDERS[n].reference for n in names}
    }
    entrants = {}
    for name in names:
        worker = stack.enter_context(Worker(name, models, threads=arguments.threads))
        reference = references[CONTENDERS[name].reference]
        turn = worker.run("warm", arguments.tokens, follow=reference.token_ids, keep_logits=True)
        if CONTENDERS[name].is_exact:
            check_tokens(reference, turn, name=name, source="the decoded weights in plain transformers")
        error = check_logits(reference, turn, name=name)
        same = sum(map(operator.eq, turn.token_ids, reference.token_ids))
        say(
            f"gate: {CONTENDERS[name].title}: {same} of {arguments.tokens} tokens the same, logits"
            f" {f'{error:.2%} apart' if error else 'bit-identical'}; loaded in {worker.loaded.load_s:.1f} s"
        )
        entrants[name] = Entrant(worker, turn, reference.token_ids, error)
    return entrants


def _reference(name: str, models: Models, arguments: argparse.Namespace) -> Turn:
    with Worker(name, models, threads=arguments.threads) as worker:
        return worker.run("warm", arguments.tokens, keep_logits=True)


def measure(
    entrants: dict[str, Entrant], probes: dict[str, DiskProbe], mode: str, arguments: argparse.Namespace
) -> dict[str, Series]:
    """All rounds of one mode."""
    series = {name: Series() for name in entrants}
    for number in range(arguments.rounds):
        for name in rotated(list(entrants), number):
            streams = mode == "disk" and entrants[name].worker.loaded.streamed_bytes > 0
            probe = probes.get(CONTENDERS[name].values or "") if streams else None
            turn, bandwidth = take_turn(entrants[name], mode, probe, arguments)
            check_tokens(entrants[name].gate, turn, name=name, source="at the gate")
            series[name].turns.append(turn)
            series[name].disk_bytes_per_s += bandwidth
        rates = (f"{name} {s.rates[-1]:.2f}" for name, s in series.items())
        say(f"{mode}, round {number + 1} of {arguments.rounds}: {', '.join(rates)}")
    return series


def take_turn(
    entrant: Entrant, mode: str, probe: DiskProbe | None, arguments: argparse.Namespace
) -> tuple[Turn, list[float]]:
    """A turn, and the disk's bandwidth around it; again, while patience lasts, when others disturbed it."""
    while True:
        arguments.patience -= wait_for_quiet(arguments.patience)
        before = [probe.bytes_per_s()] if probe else []
        turn = entrant.worker.run(mode, arguments.tokens, follow=entrant.follow)
        after = [probe.bytes_per_s()] if probe else []
        if turn.is_clean or arguments.patience <= 0:
            return turn, [sum(before + after) / 2] if probe else []
        others = median(turn.foreign_share)
        say(f"{entrant.worker.name}: others used {others:.0%} of the processors; once more")


# ── reporting ───────────────────────────────────────────────────────────────────────────────────────────────


def describe(entrant: Entrant, series: Series, all_series: dict[str, Series]) -> dict[str, Any]:
    """One contender's figures, as they go into the JSON report."""
    worker = entrant.worker
    figures: dict[str, Any] = {
        "title": CONTENDERS[worker.name].title,
        "values": CONTENDERS[worker.name].values,
        "tokens_per_second": median(series.rates),
        "rounds": series.rates,
        "first_token_seconds": median(turn.token_s[0] for turn in series.turns),
        "disk_bytes_per_token": median(count for turn in series.turns for count in turn.read_bytes[1:]),
        "foreign_share": median(turn.foreign_share[i] for turn in series.turns for i in turn.counted),
        "load_seconds": worker.loaded.load_s,
        "logits_error": entrant.error,
        "peak_anonymous_bytes": {"load": worker.peak_load_bytes, "run": worker.peak_run_bytes},
        "library_bytes": worker.loaded.library_bytes,
        "ratio": {name: series.ratio_to(all_series[name]) for name in BASELINES if name in all_series},
    }
    if worker.loaded.planned_bytes:
        figures["endor"] = describe_endor(worker, series)
    return figures


def describe_endor(worker: Worker, series: Series) -> dict[str, Any]:
    """What only Endor reports: the split of the time, the bound and the memory plan."""
    parts = [turn.parts_s[i] for turn in series.turns for i in turn.counted]
    loaded = worker.loaded
    planned = sum(loaded.planned_bytes.values())
    peak = max(worker.peak_load_bytes, worker.peak_run_bytes)
    figures: dict[str, Any] = {
        "streamed_bytes": loaded.streamed_bytes,
        "seconds_per_token": {name: median(part[name] for part in parts) for name in parts[0]},
        "planned_bytes": loaded.planned_bytes,
        "above_plan_bytes": peak - planned,
        "above_plan_and_libraries_bytes": peak - planned - loaded.library_bytes,
    }
    figures["stall_share"] = figures["seconds_per_token"]["stall"] * median(series.rates)
    if series.disk_bytes_per_s:
        bounds = series.bounds(loaded.streamed_bytes)
        figures["disk_bytes_per_s"] = median(series.disk_bytes_per_s)
        figures["link_bound_tokens_per_second"] = median(bounds)
        figures["share_of_bound"] = median(r / b for r, b in zip(series.rates, bounds, strict=True))
    return figures


def print_mode(mode: str, contenders: dict[str, dict[str, Any]]) -> None:
    print(f"\n{TITLES[mode]}\n")
    baselines = [name for name in BASELINES if name in contenders]
    ratios = (f"x {name}" for name in baselines)
    columns = (
        "",
        "tokens/s",
        *ratios,
        "link bound",
        "of it",
        "stall",
        "GB from disk / token",
        "peak anon. MB",
    )
    print_table(columns, [_row(figures, baselines) for figures in contenders.values()])
    for figures in contenders.values():
        if figures["foreign_share"] >= DISTURBED:
            print(f"\n{figures['title']}: others used {figures['foreign_share']:.0%} of the processors")
        if "endor" in figures:
            print()
            for line in _endor_lines(figures["endor"], figures["library_bytes"]):
                print(f"{figures['title']}: {line}")


def _row(figures: dict[str, Any], baselines: list[str]) -> list[str]:
    endor = figures.get("endor", {})
    bounded = "share_of_bound" in endor
    return [
        figures["title"],
        f"{figures['tokens_per_second']:.3g}",
        *(f"{figures['ratio'][name]:.2f}" for name in baselines),
        f"{endor['link_bound_tokens_per_second']:.3g}" if bounded else "",
        f"{endor['share_of_bound']:.0%}" if bounded else "",
        f"{endor['stall_share']:.0%}" if endor else "",
        f"{figures['disk_bytes_per_token'] / 1e9:.2f}",
        f"{max(figures['peak_anonymous_bytes'].values()) / 1e6:.0f}",
    ]


def _endor_lines(figures: dict[str, Any], library_bytes: int) -> Iterator[str]:
    parts = (f"{name} {seconds * 1e3:.0f}" for name, seconds in figures["seconds_per_token"].items())
    yield f"ms per token: {', '.join(parts)} (reading runs beside the others)"
    if "share_of_bound" in figures:
        bandwidth = figures["disk_bytes_per_s"]
        yield f"{figures['streamed_bytes'] / 1e9:.3f} GB per token at {bandwidth / 1e9:.2f} GB/s"
    planned = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in figures["planned_bytes"].items())
    above = figures["above_plan_and_libraries_bytes"]
    yield (
        f"memory, MB: planned {planned}, imported libraries {library_bytes / 1e6:.0f};"
        f" the peak is {above / 1e6:.0f} above both, {ALLOWANCE_BYTES / 1e6:.0f} are allowed"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────


def expand(names: Sequence[str], values: Sequence[str]) -> tuple[str, ...]:
    """The contenders' names, those of Endor that name no codec once for each."""
    found: list[str] = []
    for name in names:
        first, _, rest = name.partition("-")
        if first == "endor" and rest.partition("-")[0] not in VALUES:
            found += ("-".join(filter(None, (first, codec, rest))) for codec in values)
        else:
            found.append(name)
    return tuple(dict.fromkeys(found))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", type=Path, help="where the models are kept, 10 GB (default: in the temporary folder)")
    add("--small", action="store_true", help="a tiny model, to try the script itself")
    add("--mode", choices=(*MODES, "all"), default="all")
    add("--values", default="raw,auto,int8,int4", help=f"codecs, some of {', '.join(VALUES)}")
    add(
        "--contenders",
        help="some of accelerate, dispatch, transformers, mapped, dense, dense-huge,"
        " endor[-CODEC][-PLACE][-decode]. PLACE: depth0, depth1, depth2 (default) or resident;"
        " decode: never straight from packed weights; without CODEC, one for each of --values",
    )
    add("--rounds", type=int, default=3)
    add("--tokens", type=int, default=6, help="per turn; the first, which reads the prompt, is not counted")
    add("--threads", type=int, default=0, help="of torch (default: torch's own choice)")
    add("--patience", type=float, default=0.0, metavar="S", help="to wait for a quiet machine, in all")
    add("--json", type=Path, metavar="FILE", help="also write the figures here; - for standard output only")
    arguments = parser.parse_args(words)
    arguments.values = tuple(arguments.values.split(","))
    if unknown := set(arguments.values) - set(VALUES):
        parser.error(f"unknown codecs: {', '.join(sorted(unknown))}")
    chosen = arguments.contenders.split(",") if arguments.contenders else None
    modes = MODES if arguments.mode == "all" else (arguments.mode,)
    arguments.contenders = {m: expand(chosen or DEFAULT_CONTENDERS[m], arguments.values) for m in modes}
    if unknown := {name for names in arguments.contenders.values() for name in names} - set(CONTENDERS):
        parser.error(f"unknown contenders: {', '.join(sorted(unknown))}")
    if arguments.rounds < 1 or arguments.tokens < 2:
        parser.error("at least one round and two tokens are needed")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, gate, measure; the report."""
    size = "small" if arguments.small else "1b"
    hush_transformers()
    workdir = arguments.workdir or Path(tempfile.gettempdir()) / f"endor-bench-stream-{size}"
    models = build_models(workdir, LLAMA_TINY if arguments.small else LLAMA_1B, _codecs(arguments))
    report: dict[str, Any] = {"environment": environment(), "modes": {}}
    for mode, names in arguments.contenders.items():
        with ExitStack() as stack:
            entrants = start(stack, names, models, arguments)
            probes = {
                codec: stack.enter_context(DiskProbe(files_of(models.packed[codec], ".safetensors")))
                for codec in {CONTENDERS[name].values for name in names} - {None}
                if codec
            }
            series = measure(entrants, probes, mode, arguments)
            report["modes"][mode] = {n: describe(entrants[n], series[n], series) for n in names}
    return report


def _codecs(arguments: argparse.Namespace) -> list[str]:
    """Those of all contenders."""
    names = (name for names in arguments.contenders.values() for name in names)
    return sorted({codec for name in names if (codec := CONTENDERS[name].values)})


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    line = environment_line()
    say(line)
    try:
        report = run(arguments)
    except GateError as error:
        print(f"the gate is red: {error}", file=sys.stderr)
        return 1
    if str(arguments.json) == "-":
        write_json(None, report)
        return 0
    print(line)
    for mode, contenders in report["modes"].items():
        print_mode(mode, contenders)
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python3
"""Tokens per second of a model that is streamed, against accelerate, transformers and the speed of the disk.

    python scripts/bench_stream.py --workdir /path/on/the/disk

Builds, once, a random Llama of 1.1 billion parameters, prunes half of its weights and keeps that twice:
as an Endor checkpoint and as a plain dense one with the same weights. Each contender runs these in its
own process; they take turns, so that all see the same drift of the machine, and in each round the disk's
sequential bandwidth is measured beside Endor's turn: bandwidth / bytes per token is the rate the link allows.

First comes the gate: every contender must generate the same tokens, Endor at every depth and with everything
resident. Without that no speed is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from bench_stream_worker import CONTENDERS, DISTURBED, MODES, Models, Turn, Worker

DEFAULT_CONTENDERS = ("accelerate", "transformers", "mapped", "endor")
GATE = ("mapped", "endor-depth0", "endor", "endor-resident")
BASELINES = ("accelerate", "mapped")
ALLOWANCE_BYTES = 200_000_000
_DISK_SPACE = 4


class GateError(Exception):
    """Contenders generated different tokens: their speeds mean nothing."""


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────


def build_models(workdir: Path, shape: LlamaShape) -> Models:
    """The three forms of one pruned model, made where they are missing."""
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(workdir, shape)
    models = Models(dense=workdir / "dense", endor=workdir / "endor", offload=workdir / "offload")
    if not (models.endor / "model.safetensors.index.json").exists():
        _build_endor(workdir / "source", models.endor, shape)
    if not models.dense.exists():
        save_whole(_decoded(models.endor), models.dense, shard_size="500MB")
    shutil.rmtree(workdir / "source", ignore_errors=True)
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


def _build_endor(source: Path, out: Path, shape: LlamaShape) -> None:
    import endor

    if not source.exists():
        build_random_llama(source, shape)
    dense_bytes = sum(path.stat().st_size for path in files_of(source, ".safetensors"))
    free_bytes = shutil.disk_usage(source).free
    if free_bytes < _DISK_SPACE * dense_bytes:
        needed_bytes = _DISK_SPACE * dense_bytes
        raise SystemExit(f"{source.parent}: {needed_bytes} bytes are needed, {free_bytes} are free")
    shutil.rmtree(out, ignore_errors=True)
    endor.convert(source, out, method="magnitude", sparsity=0.5, values="raw")


def _decoded(checkpoint: Path) -> Any:
    """The checkpoint's weights, decoded, in a plain transformers model: what Endor must agree with."""
    from transformers import AutoConfig, LlamaForCausalLM

    import endor

    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = LlamaForCausalLM._from_config(config, dtype=config.dtype)
    with endor.open(checkpoint) as opened:
        for name, parameter in model.named_parameters():
            parameter.data = opened.read_dense(name)
    return model


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


def check_tokens(reference: Turn, turn: Turn, *, name: str) -> None:
    """Raise GateError unless both turns generated the same tokens."""
    if turn.token_ids != reference.token_ids:
        raise GateError(
            f"{name} generated {list(turn.token_ids)}, the decoded weights in plain transformers"
            f" {list(reference.token_ids)}: no speed is worth showing"
        )


def start(stack: ExitStack, models: Models, arguments: argparse.Namespace) -> tuple[dict[str, Worker], Turn]:
    """Pass the gate; returns the contenders' workers, and the turn with which all must agree."""
    workers: dict[str, Worker] = {}
    reference: Turn | None = None
    for name in dict.fromkeys((*GATE, *arguments.contenders)):
        worker = stack.enter_context(Worker(name, models, threads=arguments.threads))
        turn = worker.run("warm", arguments.tokens)
        reference = reference or turn
        check_tokens(reference, turn, name=name)
        bits = "bit-identical" if turn.logits_digest == reference.logits_digest else "slightly other"
        load_s = worker.loaded.load_s
        say(f"gate: {CONTENDERS[name].title}: same tokens, {bits} logits; loaded in {load_s:.1f} s")
        if name in arguments.contenders:
            workers[name] = worker
        else:
            worker.close()
    assert reference is not None
    return {name: workers[name] for name in arguments.contenders}, reference


def measure(
    workers: dict[str, Worker], reference: Turn, probe: DiskProbe, mode: str, arguments: argparse.Namespace
) -> dict[str, Series]:
    """All rounds of one mode."""
    series = {name: Series() for name in workers}
    for number in range(arguments.rounds):
        for name in rotated(list(workers), number):
            streams = mode == "disk" and workers[name].loaded.streamed_bytes > 0
            turn, bandwidth = take_turn(workers[name], mode, probe if streams else None, arguments)
            check_tokens(reference, turn, name=name)
            series[name].turns.append(turn)
            series[name].disk_bytes_per_s += bandwidth
        rates = (f"{name} {s.rates[-1]:.2f}" for name, s in series.items())
        say(f"{mode}, round {number + 1} of {arguments.rounds}: {', '.join(rates)}")
    return series


def take_turn(
    worker: Worker, mode: str, probe: DiskProbe | None, arguments: argparse.Namespace
) -> tuple[Turn, list[float]]:
    """A turn, and the disk's bandwidth around it; again, while patience lasts, when others disturbed it."""
    while True:
        arguments.patience -= wait_for_quiet(arguments.patience)
        before = [probe.bytes_per_s()] if probe else []
        turn = worker.run(mode, arguments.tokens)
        after = [probe.bytes_per_s()] if probe else []
        if turn.is_clean or arguments.patience <= 0:
            return turn, [sum(before + after) / 2] if probe else []
        say(f"{worker.name}: others used {median(turn.foreign_share):.0%} of the processors; once more")


# ── reporting ───────────────────────────────────────────────────────────────────────────────────────────────


def describe(worker: Worker, series: Series, all_series: dict[str, Series]) -> dict[str, Any]:
    """One contender's figures, as they go into the JSON report."""
    figures: dict[str, Any] = {
        "tokens_per_second": median(series.rates),
        "rounds": series.rates,
        "first_token_seconds": median(turn.token_s[0] for turn in series.turns),
        "disk_bytes_per_token": median(count for turn in series.turns for count in turn.read_bytes[1:]),
        "foreign_share": median(turn.foreign_share[i] for turn in series.turns for i in turn.counted),
        "load_seconds": worker.loaded.load_s,
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
    if series.disk_bytes_per_s:
        bounds = series.bounds(loaded.streamed_bytes)
        figures["disk_bytes_per_s"] = median(series.disk_bytes_per_s)
        figures["link_bound_tokens_per_second"] = median(bounds)
        figures["share_of_bound"] = median(r / b for r, b in zip(series.rates, bounds, strict=True))
    return figures


def print_mode(mode: str, contenders: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'Every token from disk' if mode == 'disk' else 'Warm page cache'}\n")
    ratios = (f"x {name}" for name in BASELINES)
    columns = ("", "tokens/s", *ratios, "first token s", "GB from disk / token", "peak anon. MB", "load s")
    print_table(columns, [_row(name, figures) for name, figures in contenders.items()])
    for name, figures in contenders.items():
        if figures["foreign_share"] >= DISTURBED:
            print(f"\n{CONTENDERS[name].title}: others used {figures['foreign_share']:.0%} of the processors")
        if "endor" in figures:
            print()
            for line in _endor_lines(figures["endor"], figures["library_bytes"]):
                print(f"{CONTENDERS[name].title}: {line}")


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    ratio = figures["ratio"]
    return [
        CONTENDERS[name].title,
        f"{figures['tokens_per_second']:.3g}",
        *(f"{ratio[other]:.2f}" if other in ratio else "" for other in BASELINES),
        f"{figures['first_token_seconds']:.2f}",
        f"{figures['disk_bytes_per_token'] / 1e9:.2f}",
        f"{max(figures['peak_anonymous_bytes'].values()) / 1e6:.0f}",
        f"{figures['load_seconds']:.1f}",
    ]


def _endor_lines(figures: dict[str, Any], library_bytes: int) -> Iterator[str]:
    parts = (f"{name} {seconds * 1e3:.0f}" for name, seconds in figures["seconds_per_token"].items())
    yield f"ms per token: {', '.join(parts)} (reading runs beside the others)"
    if "share_of_bound" in figures:
        bandwidth = figures["disk_bytes_per_s"]
        yield (
            f"{figures['streamed_bytes'] / 1e9:.3f} GB per token at {bandwidth / 1e9:.2f} GB/s"
            f" allow {figures['link_bound_tokens_per_second']:.2f} tokens/s;"
            f" {figures['share_of_bound']:.0%} of that is reached"
        )
    planned = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in figures["planned_bytes"].items())
    above = figures["above_plan_and_libraries_bytes"]
    yield (
        f"memory, MB: planned {planned}, imported libraries {library_bytes / 1e6:.0f};"
        f" the peak is {above / 1e6:.0f} above both, {ALLOWANCE_BYTES / 1e6:.0f} are allowed"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workdir", type=Path, help="where the models are kept, 7 GB (default: in the temporary folder)")
    add("--small", action="store_true", help="a tiny model, to try the script itself")
    add("--mode", choices=(*MODES, "both"), default="both")
    add("--contenders", default=",".join(DEFAULT_CONTENDERS), help=f"some of {', '.join(CONTENDERS)}")
    add("--rounds", type=int, default=3)
    add("--tokens", type=int, default=6, help="per turn; the first, which reads the prompt, is not counted")
    add("--threads", type=int, default=0, help="of torch (default: torch's own choice)")
    add("--patience", type=float, default=0.0, metavar="S", help="to wait for a quiet machine, in all")
    add("--json", type=Path, metavar="FILE", help="also write the figures here; - for standard output only")
    arguments = parser.parse_args(words)
    arguments.contenders = tuple(arguments.contenders.split(","))
    if unknown := set(arguments.contenders) - set(CONTENDERS):
        parser.error(f"unknown contenders: {', '.join(sorted(unknown))}")
    if arguments.rounds < 1 or arguments.tokens < 2:
        parser.error("at least one round and two tokens are needed")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, gate, measure; the report."""
    size = "small" if arguments.small else "1b"
    hush_transformers()
    workdir = arguments.workdir or Path(tempfile.gettempdir()) / f"endor-bench-stream-{size}"
    models = build_models(workdir, LLAMA_TINY if arguments.small else LLAMA_1B)
    report: dict[str, Any] = {"environment": environment(), "modes": {}}
    with ExitStack() as stack:
        workers, reference = start(stack, models, arguments)
        probe = stack.enter_context(DiskProbe(files_of(models.endor, ".safetensors")))
        for mode in MODES if arguments.mode == "both" else (arguments.mode,):
            series = measure(workers, reference, probe, mode, arguments)
            report["modes"][mode] = {n: describe(workers[n], series[n], series) for n in workers}
    return report


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

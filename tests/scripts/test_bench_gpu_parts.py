"""A part of the GPU benchmark that fails, hangs or has no time costs its own lines, and is said to."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def scripts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "scripts"))


@pytest.fixture
def parts(scripts: None) -> ModuleType:
    return importlib.import_module("bench_gpu_parts")


@pytest.fixture
def bench(scripts: None) -> ModuleType:
    return importlib.import_module("bench_gpu")


@pytest.fixture
def report(scripts: None) -> ModuleType:
    return importlib.import_module("bench_gpu_report")


@pytest.fixture
def settings(parts: ModuleType, tmp_path: Path) -> Any:
    folder = str(tmp_path)
    codecs = ("raw", "exponent")
    return parts.Settings("cpu", True, folder, folder, layers=3, disk_layers=3, codecs=codecs)


def part_of(parts: ModuleType, *lines: dict[str, Any] | Exception, **options: Any) -> Any:
    """A part that yields these lines, or raises."""

    def run(_settings: Any, _deadline: Any) -> Iterator[dict[str, Any]]:
        for line in lines:
            if isinstance(line, Exception):
                raise line
            yield line

    return parts.Part(**{"name": "some", "run": run, "needs_s": 1, "limit_s": 1, **options})


# ── one part ────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_before_a_failure_are_kept(parts: ModuleType, settings: Any, tmp_path: Path) -> None:
    part = part_of(parts, {"a": 1}, ValueError("a wrong bit\nand more"))
    outcome = parts.run_here(part, settings, parts.Deadline(), tmp_path / "some.json")
    assert outcome.lines == [{"a": 1}]
    assert outcome.error == "ValueError: a wrong bit"
    assert any("raise line" in line for line in outcome.trace)
    assert json.loads((tmp_path / "some.json").read_text())["lines"] == [{"a": 1}]


def test_what_there_is_no_time_for_is_remembered(parts: ModuleType) -> None:
    deadline = parts.Deadline(time.time() + 5)
    assert deadline.allows(1, "the first")
    assert not deadline.allows(60, "the second")
    assert len(deadline.skipped) == 1
    assert deadline.skipped[0].startswith("the second: 60 s needed, ")


def running(
    parts: ModuleType, settings: Any, folder: Path, script: str, *, limit_s: float = 60, at_s: float = 60
) -> Any:
    """A part whose process runs `script`, which finds its arguments in `a`."""
    code = f"import sys, time, json, pathlib; a = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n{script}"
    part = part_of(parts, limit_s=limit_s)
    return parts.Running(
        part, settings, time.time() + at_s, command=[sys.executable, "-c", code], folder=folder
    )


FOUND = "json.dump({'lines': [{'b': 2}]}, open(a['--result'], 'w'))"


def test_a_process_that_crashes_is_an_error_with_its_last_words(
    parts: ModuleType, settings: Any, tmp_path: Path
) -> None:
    script = f"{FOUND}\nprint('CUDA error: an illegal address', flush=True)\nimport os; os.abort()"
    with closing(running(parts, settings, tmp_path, script)) as started:
        outcome = started.outcome()
    assert outcome.lines == [{"b": 2}]
    assert "ended with -6" in outcome.error
    assert "CUDA error: an illegal address" in outcome.trace


def test_a_process_that_hangs_is_ended_and_its_lines_count(
    parts: ModuleType, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_GRACE_S", 0.5)
    script = f"print('here', flush=True)\n{FOUND}\ntime.sleep(600)"
    with closing(running(parts, settings, tmp_path, script, limit_s=5)) as started:
        outcome = started.outcome()
    assert outcome.error.startswith("it did not end, and was ended after")
    assert outcome.trace == ["here"]
    assert outcome.seconds < 60


def test_a_process_gets_its_settings_and_its_deadline(
    parts: ModuleType, settings: Any, tmp_path: Path
) -> None:
    before = time.time()
    script = "pathlib.Path(a['--result']).write_text('{}')"
    with closing(running(parts, settings, tmp_path, script, limit_s=60, at_s=1000)) as started:
        outcome = started.outcome()
    assert outcome.error is None
    found, deadline = parts.read_task(tmp_path / "some.task")
    assert found == settings
    assert before + 59 < deadline.at < time.time() + 61


# ── all parts ───────────────────────────────────────────────────────────────────────────────────────────────


def gated(bench: ModuleType, parts: ModuleType, settings: Any, **steps: tuple[str, ...]) -> Any:
    """A run after its gate, with the steps that each codec passed."""
    run = bench.Run(settings, isolated=False, deadline=time.time() + 60)
    for codec in bench.CODECS:
        lines = [{"step": step, "codec": codec} for step in steps.get(codec, ())]
        run.outcomes[f"gate-{codec}"] = parts.Outcome(lines=lines)
    return run


def test_a_codec_that_fails_the_gate_gets_no_speed(
    bench: ModuleType, parts: ModuleType, settings: Any
) -> None:
    run = gated(bench, parts, settings, exponent=("kernels", "model"), raw=("kernels",))

    def tell(told: Any, _deadline: Any) -> Iterator[dict[str, Any]]:
        yield {"codecs": told.codecs}

    run.measure(parts.Part("decode", tell, needs_s=0, limit_s=1), None)
    streams = {
        codec: part_of(parts, {"speed": 1}, name=f"stream-{codec}", codec=codec, streams=True)
        for codec in ("exponent", "raw")
    }
    for each in streams.values():
        run.measure(each, None)
    assert run.lines("decode") == [{"codecs": ("raw", "exponent")}]
    assert run.lines("stream") == [{"speed": 1}]
    assert run.outcomes["stream-raw"].skipped == ["all of it: withheld, the gate is red for raw"]


def test_no_kernel_is_timed_if_the_gate_is_red_for_all(
    bench: ModuleType, parts: ModuleType, settings: Any
) -> None:
    run = gated(bench, parts, settings)
    run.measure(part_of(parts, {"ms": 1}, name="matmul"), None)
    run.measure(part_of(parts, {"copy": 1}, name="bounds"), None)
    assert not run.lines("matmul")
    assert "red for every codec" in run.outcomes["matmul"].skipped[0]
    assert run.lines("bounds")


def test_parts_that_do_not_fit_into_the_time_are_said_to_be_skipped(
    bench: ModuleType, parts: ModuleType, settings: Any
) -> None:
    run = gated(bench, parts, settings, raw=("kernels",))
    run.measure(part_of(parts, {"ms": 1}, name="ring", needs_s=3600), None)
    run.measure(part_of(parts, {"ms": 1}, name="decode", needs_s=1), None)
    assert "it needs 3600 s" in run.outcomes["ring"].skipped[0]
    assert run.lines("decode") == [{"ms": 1}]


def test_one_part_failing_does_not_keep_the_next_one_from_running(
    bench: ModuleType, parts: ModuleType, settings: Any
) -> None:
    run = gated(bench, parts, settings, raw=("kernels",))
    run.measure(part_of(parts, RuntimeError("broken"), name="decode"), None)
    run.measure(part_of(parts, {"ms": 1}, name="matmul"), None)
    assert run.outcomes["decode"].error == "RuntimeError: broken"
    assert run.lines("matmul") == [{"ms": 1}]


# ── room ────────────────────────────────────────────────────────────────────────────────────────────────────


def fitting(bench: ModuleType, memory_gib: int, folder_gib: int = 1000, *, in_memory: bool = False) -> int:
    layers: int = bench.fitting_layers(
        memory_bytes=memory_gib << 30, folder_bytes=folder_gib << 30, in_memory=in_memory
    )
    return layers


def test_the_whole_model_is_streamed_where_it_fits(bench: ModuleType) -> None:
    assert fitting(bench, 120) == 40
    assert fitting(bench, 120, 60, in_memory=True) == 40


def test_little_memory_or_disk_means_fewer_layers(bench: ModuleType) -> None:
    assert 0 < fitting(bench, 20) < 40
    assert 0 < fitting(bench, 120, 10) < 40
    assert fitting(bench, 20, in_memory=True) < fitting(bench, 20)
    assert fitting(bench, 4) == fitting(bench, 120, 0) == 0
    assert bench.fitting_disk_layers(1 << 40) == bench.DISK_LAYERS
    assert 0 < bench.fitting_disk_layers(4 << 30) < bench.DISK_LAYERS
    assert bench.fitting_disk_layers(0) == 0


def test_a_model_without_room_is_skipped_with_the_reason(
    bench: ModuleType, parts: ModuleType, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    small = parts.Settings("cuda", False, folder, folder, layers=0, disk_layers=0, codecs=("raw",))
    reasons = {part.name: bench.missing_for(part, small) for part in bench.PARTS}
    assert "hold not one layer" in reasons["stream-exponent"]
    assert "--directory" in reasons["disk-accelerate"]
    assert reasons["decode"] is None


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder in memory")
def test_a_folder_in_memory_is_no_disk(bench: ModuleType, parts: ModuleType) -> None:
    in_memory = parts.Settings("cuda", False, "/tmp", "/dev/shm", layers=1, disk_layers=1, codecs=("raw",))
    part = next(part for part in bench.PARTS if part.name == "disk-exponent")
    assert "lies in memory" in bench.missing_for(part, in_memory)


# ── verdicts ────────────────────────────────────────────────────────────────────────────────────────────────


def empty_report() -> dict[str, Any]:
    return {name: [] for name in ("gate", "bounds", "stream", "decode", "matmul", "ring", "disk")}


def verdicts(report: ModuleType, found: dict[str, Any]) -> dict[str, str]:
    return {figure.what: figure.verdict for figure in report.figures(found)}


def test_what_was_not_measured_is_never_met(report: ModuleType) -> None:
    assert set(verdicts(report, empty_report()).values()) == {"not measured"}


def test_verdicts_follow_from_the_figures_of_the_issue(report: ModuleType) -> None:
    found = empty_report()
    found["decode"] = [
        {"codec": "raw", "what": "matrix", "mask": "bitmap", "of_copy": 0.81},
        {"codec": "exponent", "what": "matrix", "mask": "bitmap", "of_copy": 0.59},
        {"codec": "exponent", "what": "matrix", "mask": "dense", "of_copy": 0.99},
    ]
    speeds = {("raw", 1): 1.2, ("exponent", 1): 1.5}
    found["matmul"] = [
        {"shape": [8, 8], "rows": rows, "what": codec, "ms": 1.0, "times_dense": times}
        for (codec, rows), times in speeds.items()
    ] + [
        {"shape": [8, 8], "rows": 16, "what": what, "ms": ms, "times_dense": 1.0}
        for what, ms in {"raw": 1.0, "decode raw": 1.1, "exponent": 1.2, "decode exponent": 1.1}.items()
    ]
    found["stream"] = [{"codec": "exponent", "of_bound": 0.96, "times_accelerate": 2.9}]
    found["ring"] = [{"codec": "exponent", "decode_share": 0.04}]
    told = verdicts(report, found)
    assert told["decode raw, one matrix"] == "met"
    assert told["decode exponent, one matrix"] == "missed"
    assert told["decode raw, one layer"] == "not measured"
    assert told["product, 1 row 8x8"] == "met"
    assert told["product, 16 rows 8x8, raw"] == "met"
    assert told["product, 16 rows 8x8, exponent"] == "missed"
    assert told["from pinned memory, exponent"] == "met"
    assert told["from pinned memory, exponent, tokens/s"] == "missed"
    assert told["decode and launches, exponent"] == "met"
    assert told["from pinned memory, raw"] == "not measured"


def model_line(folder: Path, title: str, logits: list[float], **more: Any) -> dict[str, Any]:
    file = folder / f"{title}.pt"
    torch.save(torch.tensor(logits), file)
    return {
        "tier": "host",
        "title": title,
        "layers": 40,
        "tokens_per_s": 6.0,
        "ids": [1, 2, 3],
        "logits": str(file),
        **more,
    }


def test_a_model_with_wrong_logits_keeps_no_speed(report: ModuleType, tmp_path: Path) -> None:
    lines = [
        model_line(tmp_path, "endor exponent", [1.0, 2.0], codec="exponent"),
        model_line(tmp_path, "endor raw", [2.0, 1.0], codec="raw"),
        model_line(tmp_path, "endor raw, not a number", [2.0, float("nan")], codec="raw"),
        model_line(tmp_path, "endor int4", [1.2, 2.0], codec="int4"),
        model_line(tmp_path, "accelerate", [1.0, 2.01], tokens_per_s=2.0, ids=[1, 2, 4]),
    ]
    right, wrong, nan, lossy, other = report.compare_logits(lines)
    assert right["times_accelerate"] == 3.0
    assert right["same_tokens"] == 2
    for line in (wrong, nan):
        assert "no speed is worth showing" in line["error"]
        assert "tokens_per_s" not in line
    assert lossy["logits_error"] > 0.05
    assert "tokens_per_s" in lossy
    assert other == lines[-1]


def test_what_memory_did_not_hold_is_said(report: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"title": "endor raw", "layers": 40, "tokens_per_s": 1.0}
    for share in (0.0, 0.25):
        found = empty_report() | {"stream": [line | {"disk_share": share}], "notes": [], "parts": {}}
        report.show(found | {"figures": []})
        assert ("memory did not hold 25%" in capsys.readouterr().out) == (share > 0)


def test_models_with_other_numbers_of_layers_are_not_compared(report: ModuleType, tmp_path: Path) -> None:
    mine = model_line(tmp_path, "endor raw", [1.0], codec="raw")
    compared, _ = report.compare_logits([mine, model_line(tmp_path, "accelerate", [1.0], layers=8)])
    assert compared["times_accelerate"] is None


def test_a_report_with_failures_shows_them_and_is_one(
    report: ModuleType, bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = empty_report() | {
        "notes": ["only 12 of 40 layers"],
        "parts": {
            "decode": {"error": "RuntimeError: broken", "skipped": [], "trace": ["in decode.py", "boom"]},
            "ring": {"error": None, "skipped": ["all of it: no time"], "trace": []},
        },
        "figures": [],
    }
    report.show(found)
    said = capsys.readouterr().out
    assert "FAILED decode: RuntimeError: broken" in said
    assert "    boom" in said
    assert "skipped in ring: all of it: no time" in said
    assert "note: only 12 of 40 layers" in said
    assert bench.has_failed(found)
    assert not bench.has_failed(found | {"parts": {}})


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_forwards_do_not_count(scripts: None) -> None:
    stream = importlib.import_module("bench_gpu_stream")
    turn = stream.Turn(ids=[1, 2, 3, 4], seconds=[9.0, 5.0, 0.5, 0.5])
    assert turn.tokens_per_s == 2.0


def test_little_time_means_fewer_tokens_but_one_that_counts(scripts: None, parts: ModuleType) -> None:
    models = importlib.import_module("bench_gpu_models")
    stream = importlib.import_module("bench_gpu_stream")
    cpu = torch.device("cpu")
    model = models.dense_on(models.Recipe(stream.LLAMA_TINY, distinct=1), cpu, made_on=cpu)
    deadline = parts.Deadline(time.time())
    turn = stream.generate(model, cpu, 50, deadline=deadline)
    assert len(turn.ids) == 3
    assert len(turn.counted_s) == 1
    assert deadline.skipped == ["47 of 50 tokens, for lack of time"]
    assert stream.generate(model, cpu, 3).ids == turn.ids


def test_caches_are_emptied_before_each_token_and_who_reads_ahead_pays_for_it(scripts: None) -> None:
    models = importlib.import_module("bench_gpu_models")
    stream = importlib.import_module("bench_gpu_stream")
    cpu = torch.device("cpu")
    model = models.dense_on(models.Recipe(stream.LLAMA_TINY, distinct=1), cpu, made_on=cpu)
    calls: list[float] = []

    def prepare() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.2)

    free = stream.generate(model, cpu, 4, prepare=prepare)
    paid = stream.generate(model, cpu, 4, prepare=prepare, counts_preparing=True)
    assert len(calls) == 8
    assert min(paid.seconds) >= 0.2 > min(free.seconds)


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
def test_a_checkpoint_is_not_larger_than_the_room_that_is_asked_for(
    scripts: None, tmp_path: Path, codec: str
) -> None:
    models = importlib.import_module("bench_gpu_models")
    common = importlib.import_module("bench_common")
    shape = common.LlamaShape(
        hidden=256, layers=3, intermediate=352, vocabulary=500, heads=4, key_value_heads=2
    )
    nbytes = models.write_endor(tmp_path, models.Recipe(shape, distinct=1), codec, torch.device("cpu"))
    bound = models.packed_bytes(shape, 3, codec)
    assert 0.7 * bound < nbytes + 3 * 65536 + 6 * 65536
    assert nbytes <= bound


def test_repeated_layers_have_memory_of_their_own(scripts: None) -> None:
    models = importlib.import_module("bench_gpu_models")
    stream = importlib.import_module("bench_gpu_stream")
    cpu = torch.device("cpu")
    model = models.dense_on(models.Recipe(stream.LLAMA_TINY, distinct=1), cpu, made_on=cpu)
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert 0.45 < (first == 0).float().mean() < 0.55

"""`convert-model` as a user meets it: exit codes, messages, progress, JSON, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from endor.cli.progress import _Lines
from endor.convert import Progress
from endor.convert.options import VALUES
from endor.pruning import METHODS

FAST = ("--method", "magnitude", "--values", "raw")


def test_summary_says_what_was_made(run_command: Any, demo_model: Path, tmp_path: Path) -> None:
    done = run_command("convert-model", demo_model, tmp_path / "out", *FAST)
    assert done.returncode == 0, done.stderr
    assert "42 of them pruned to sparsity 0.500, 9.01 bits per weight" in done.stdout
    assert "7.7 MB became 5.0 MB in" in done.stdout


def test_json_is_one_object_on_stdout(run_command: Any, demo_model: Path, tmp_path: Path) -> None:
    done = run_command("convert-model", demo_model, tmp_path / "out", *FAST, "--json")
    report = json.loads(done.stdout)
    assert set(report) == {
        "tensors", "pruned_tensors", "source_bytes", "output_bytes", "bits_per_weight", "sparsity", "seconds"
    }  # fmt: skip
    assert report["tensors"] == 56


def test_quiet_prints_nothing(run_command: Any, demo_model: Path, tmp_path: Path) -> None:
    done = run_command("convert-model", demo_model, tmp_path / "out", *FAST, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "case",
    [
        ((), 2, "Missing argument 'SOURCE'"),
        (("a",), 2, "Missing argument 'OUT'"),
        (("/nowhere", "OUT"), 1, "error: /nowhere: no such directory"),
        (("DEMO", "OUT", "--sparsity", "1.5"), 2, "1.5 is not at least 0 and below 1"),
        (("DEMO", "OUT", "--sparsity", "-0.5"), 2, "-0.5 is not at least 0 and below 1"),
        (("DEMO", "OUT", "--sparsity", "much"), 2, "'much' is not a valid float"),
        (("DEMO", "OUT", "--method", "guess"), 2, "'guess' is not one of"),
        (("DEMO", "OUT", "--memory", "lots"), 2, "'lots' is not a size"),
        (("DEMO", "OUT", "--memory", "1MiB"), 1, "error: --memory 1 MiB is too small"),
        (("DEMO", "OUT", "--resume", "--overwrite"), 2, "give one of them"),
        (
            ("DEMO", "OUT", "--pattern", "2:4", "--sparsity", "0.7"),
            1,
            "error: pattern 2:4 always has sparsity 0.5",
        ),
        (
            ("DEMO", "OUT", "--calibration", "/nowhere.txt"),
            1,
            "error: cannot read the calibration file /nowhere.txt",
        ),
        (("DEMO", "OUT", "--evaluate", "/nowhere.txt"), 1, "error: cannot read /nowhere.txt"),
        (("DEMO", "OUT", "--include", "nothing*"), 1, "error: --include 'nothing*' matches no tensor"),
        (("DEMO", "OUT", "--shard-size", "0"), 1, "error: the shard size must be at least 1 byte"),
    ],
    ids=lambda case: " ".join(case[0]),
)
def test_what_cannot_be_done_is_said(
    run_command: Any, demo_model: Path, tmp_path: Path, case: tuple[tuple[str, ...], int, str]
) -> None:
    arguments, code, message = case
    places = {"DEMO": str(demo_model), "OUT": str(tmp_path / "out")}
    done = run_command("convert-model", *(places.get(a, a) for a in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_warnings_are_one_line(run_command: Any, demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 20)
    done = run_command(
        "convert-model", demo_model, tmp_path / "out", "--values", "raw", "--calibration", text
    )
    assert done.returncode == 0, done.stderr
    assert "\nwarning: the calibration text gives " in done.stderr


def test_evaluate_reports_perplexity_before_and_after(
    run_command: Any, demo_model: Path, held_out_text: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(held_out_text.read_text()[:20_000])
    done = run_command("convert-model", demo_model, tmp_path / "out", *FAST, "--json", "--evaluate", text)
    perplexity = json.loads(done.stdout)["perplexity"]
    assert 1 < perplexity["dense"] < perplexity["converted"] < 3 * perplexity["dense"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_interrupted_conversion_leaves_a_note_and_no_temporary_file(
    demo_model: Path, tmp_path: Path, repository: Path, number: int, code: int
) -> None:
    arguments = [
        str(demo_model),
        str(tmp_path / "out"),
        "--shard-size",
        "300kB",
        "--sequence-length",
        "256",
        "--samples",
        "64",
        "--values",
        "raw",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "from endor.cli.convert import main; main()", *arguments],
        cwd=repository, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("model-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if name.endswith((".part", ".tmp"))]
    assert "config.json" not in names
    assert "--resume" in stderr


def test_choices_are_those_of_the_library() -> None:
    from endor.cli.convert import command

    choices = {p.name: set(p.type.choices) for p in command.params if hasattr(p.type, "choices")}
    assert choices["method"] == set(METHODS)
    assert choices["values"] == set(VALUES)


def test_lines_of_progress_have_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _Lines()
    lines._started -= 10
    lines(Progress("converting model.layers.3", 300_000_000, 900_000_000, 100_000_000))
    lines(Progress("converting model.layers.4", 400_000_000, 900_000_000))
    shown = capsys.readouterr().err
    assert shown.startswith("converting model.layers.3: 300 MB of 900 MB, 20.0 MB/s, 0:30 left")
    assert "layers.4" not in shown, "one line every few seconds"

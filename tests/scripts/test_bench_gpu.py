"""The GPU benchmark goes through all its parts in a dry run, and says what is missing where it cannot run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


def command_of(repository: Path, *arguments: str, interpret: bool) -> tuple[list[str], dict[str, str]]:
    """As on a machine where Endor is not installed: nothing tells Python where the checkout is."""
    left_out = {"TRITON_INTERPRET", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, str(repository / "scripts" / "bench_gpu.py"), *arguments], environment


def bench(
    folder: Path, repository: Path, *arguments: str, interpret: bool
) -> subprocess.CompletedProcess[str]:
    command, environment = command_of(repository, *arguments, interpret=interpret)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_measures_everything_it_should(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    file, models = tmp_path / "report.json", tmp_path / "models"
    models.mkdir()
    words = ("--dry-run", "--json", str(file), "--directory", str(models))
    done = bench(tmp_path, repository, *words, interpret=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(file.read_text())

    codecs = {"raw", "exponent", "int8", "int4"}
    assert {(line["codec"], line["step"]) for line in report["gate"]} == {
        (codec, step) for codec in codecs for step in ("kernels", "model")
    }
    assert all(line.get("logits_error", 0) == 0 for line in report["gate"])
    assert report["bounds"][0]["copy"] > 0 < report["bounds"][0]["link"]
    assert {line["codec"] for line in report["decode"]} == codecs
    assert {line["what"] for line in report["decode"]} == {"matrix", "layer"}
    assert {line["what"] for line in report["matmul"]} >= {"dense", "decode raw", "raw", "exponent", "int4"}
    assert all(line["launches"] <= 2 and line["decode_ms"] > 0 for line in report["ring"])
    streamed = {line["title"]: line for line in report["stream"]}
    assert list(streamed) == ["endor exponent", "accelerate cpu_offload", "endor raw", "endor int4"]
    for line in (streamed["endor exponent"], streamed["endor raw"]):
        assert line["logits_error"] < 0.05
        assert line["crossed_bytes"] > 0 < line["of_bound"]
        assert line["bytes_by_tier"]["host"] > 0 < line["bytes_by_tier"]["device"]
        assert line["times_accelerate"] > 0
    assert {line["title"] for line in report["disk"]} >= {"endor exponent", "accelerate disk_offload"}
    for line in (line for line in report["disk"] if "codec" in line):
        assert line["disk_bytes_per_s"] > 0
        assert line["bytes_by_tier"]["host"] == 0 < line["bytes_by_tier"]["disk"]
    assert not [part for part in report["parts"].values() if part["error"] or part["skipped"]]
    assert {figure["verdict"] for figure in report["figures"]} <= {"met", "missed", "not measured", ""}

    assert "these times mean nothing" in done.stdout
    assert len(done.stdout) + len(done.stderr) < 12_000
    assert done.stdout.count("|--") >= 7
    assert not list(models.iterdir())


@pytest.mark.slow
def test_parts_run_in_processes_of_their_own_and_leave_no_files(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    file, models = tmp_path / "report.json", tmp_path / "models"
    models.mkdir()
    words = ("--dry-run", "--isolate", "--parts", "bounds,stream", "--codecs", "raw", "--json", str(file))
    done = bench(tmp_path, repository, *words, "--directory", str(models), interpret=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert report["bounds"]
    assert [line["title"] for line in report["stream"]] == ["accelerate cpu_offload", "endor raw"]
    assert set(report["parts"]) == {"gate-raw", "bounds", "stream-accelerate", "stream-raw"}
    assert not list(models.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_leaves_no_files(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    words = ("--dry-run", "--isolate", "--directory", str(tmp_path))
    command, environment = command_of(repository, *words, interpret=True)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until = time.monotonic() + 120
            while not list(tmp_path.glob("*/gate-*.task")) and time.monotonic() < until:
                time.sleep(0.05)
            assert list(tmp_path.glob("*/gate-*.task")), "the gate was not begun"
            process.send_signal(number)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["measure", "dry-run"])
def test_without_a_gpu_it_says_so(repository: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = bench(tmp_path, repository, *arguments, interpret=False)
    assert done.returncode == 2
    assert done.stderr.startswith("bench_gpu: ")
    assert "no CUDA device" in done.stderr or "Triton is not installed" in done.stderr
    assert not done.stdout


def test_unknown_parts_are_refused_by_name(repository: Path, tmp_path: Path) -> None:
    done = bench(tmp_path, repository, "--parts", "decode,speed", interpret=False)
    assert done.returncode == 2
    assert "unknown parts: speed; there are bounds, stream, decode, matmul, ring, disk" in done.stderr


def test_unknown_codecs_are_refused_by_name(repository: Path, tmp_path: Path) -> None:
    done = bench(tmp_path, repository, "--codecs", "zip", interpret=False)
    assert done.returncode == 2
    assert "unknown codecs: zip; there are raw, exponent, int8, int4" in done.stderr

"""The GPU benchmark goes through all its parts in a dry run, and says what is missing where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def bench(repository: Path, *arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "scripts/bench_gpu.py", *arguments]
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )


def test_a_dry_run_measures_everything_it_should(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    file = tmp_path / "report.json"
    done = bench(repository, "--dry-run", "--json", str(file), interpret=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert {line["codec"] for line in report["decode"]} == {"raw", "exponent", "int8", "int4"}
    assert {line["what"] for line in report["matmul"]} >= {"dense", "decode raw", "raw", "exponent", "int4"}
    assert all(line["launches"] <= 2 and line["decode_ms"] > 0 for line in report["stream"])
    assert "these times mean nothing" in done.stdout
    assert done.stdout.count("| --") + done.stdout.count("|--") >= 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["measure", "dry-run"])
def test_without_a_gpu_it_says_so(repository: Path, arguments: list[str]) -> None:
    done = bench(repository, *arguments, interpret=False)
    assert done.returncode == 2
    assert done.stderr.startswith("bench_gpu: ")
    assert "no CUDA device" in done.stderr or "Triton is not installed" in done.stderr
    assert not done.stdout

"""The benchmark of budgets runs from beginning to end on the small model that ships."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import endor

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts/bench_budgets.py"
SHORT = ("--tokens", "2", "--rounds", "1")
DEMO = REPOSITORY / "endor/assets/demo_model"


def run(*words: str | Path) -> str:
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
    ).stdout


def test_it_reports_every_budget(tmp_path: Path) -> None:
    endor.convert(DEMO, tmp_path / "out", method="magnitude", sparsity=0.5)
    report = tmp_path / "report.json"
    run(tmp_path / "out", *SHORT, "--json", report)
    results = json.loads(report.read_text())["results"]
    read = [results[share][0]["disk_bytes"] for share in ("0.0", "0.25", "0.5", "0.75", "1.0")]
    assert read == sorted(read, reverse=True)
    assert read[0] > 0 == read[-1]
    assert len({tuple(each[0]["tokens"]) for each in results.values()}) == 1


def test_accelerate_gets_the_same_memory_and_weights(tmp_path: Path) -> None:
    endor.convert(DEMO, tmp_path / "out", method="magnitude", sparsity=0.0)
    dense, report = tmp_path / "dense", tmp_path / "report.json"
    shutil.copytree(DEMO, dense)

    run(tmp_path / "out", "--dense", dense, "--shares", "0,1", *SHORT, "--json", report)

    theirs = json.loads(report.read_text())["accelerate"]
    budget = 1.02 * sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert theirs["0.0"][0]["resident_bytes"] == 0 < theirs["1.0"][0]["resident_bytes"] <= budget


def test_weights_that_are_not_the_same_are_refused(tmp_path: Path) -> None:
    endor.convert(DEMO, tmp_path / "out", method="magnitude", sparsity=0.5)
    shutil.copytree(DEMO, tmp_path / "dense")

    with pytest.raises(subprocess.CalledProcessError) as failure:
        run(tmp_path / "out", "--dense", tmp_path / "dense", "--shares", "0", *SHORT)
    assert "the logits are" in failure.value.stderr


def test_no_streaming_machinery_gives_the_same_tokens(tmp_path: Path) -> None:
    endor.convert(DEMO, tmp_path / "out", method="magnitude", sparsity=0.5)

    printed = run(tmp_path / "out", "--unstreamed", *SHORT)
    assert "without machinery" in printed

"""The benchmark of budgets runs from beginning to end on the small model that ships."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import endor

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts/bench_budgets.py"
DEMO = REPOSITORY / "endor/assets/demo_model"


def test_it_reports_every_budget(tmp_path: Path) -> None:
    endor.convert(DEMO, tmp_path / "out", method="magnitude", sparsity=0.5)
    report = tmp_path / "report.json"
    subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "out", "--tokens", "2", "--rounds", "1", "--json", report],
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=200,
    )
    results = json.loads(report.read_text())["results"]
    read = [results[share][0]["disk_bytes"] for share in ("0.0", "0.25", "0.5", "0.75", "1.0")]
    assert read == sorted(read, reverse=True)
    assert read[0] > 0 == read[-1]
    assert len({tuple(each[0]["tokens"]) for each in results.values()}) == 1

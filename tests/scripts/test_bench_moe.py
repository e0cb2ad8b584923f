"""The benchmark of Mixture-of-Experts runs from beginning to end on a model of no size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts/bench_moe.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_it_reports_every_budget(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--tokens", "2", "--rounds", "1", "--json", str(out)],
        check=True,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    nothing, everything = results["0.0"][0], results["1.0"][0]
    assert nothing["disk_bytes"] > everything["disk_bytes"]
    assert nothing["tokens"] == everything["tokens"]

"""Two minutes of generation leave memory, descriptors and threads as they were after the first seconds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import endor

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "scripts"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
DEMO = Path(endor.__file__).parent / "assets/demo_model"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_minutes_of_generation_do_not_grow(tmp_path: Path) -> None:
    endor.convert(DEMO, tmp_path / "out", method="magnitude", sparsity=0.5)
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "soak.py"), str(tmp_path / "out"), "--minutes", "2"],
        check=False,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] > 100


def test_growth_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    footprint = importlib.import_module("soak").Footprint
    before = footprint(1 << 30, 10, 4)
    assert footprint((1 << 30) + (4 << 20), 10, 3).grown_from(before) == []
    grown = footprint((1 << 30) + (9 << 20), 11, 5).grown_from(before)
    assert [line.split()[0] for line in grown] == ["anonymous", "descriptors", "threads"]

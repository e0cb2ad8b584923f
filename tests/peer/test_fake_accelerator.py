"""On an accelerator weights are moved once per forward, one module at a time, and nothing stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAYER_BYTES = 512 * 512 * 4
LAYERS = 6
SMALL_BYTES = 12 * 2 * 512 * 4
"""Inputs, and outputs that the fake device gets from the CPU."""


@pytest.mark.slow
def test_weights_go_to_an_accelerator_once_and_leave(fakedev: Path, tmp_path: Path) -> None:
    paths = [HERE.parent.parent, HERE / "fakedev", fakedev]
    ran = subprocess.run(
        [sys.executable, str(HERE / "accelerator_cases.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == 6
    for case, counts in found.items():
        resident = 1 if case.endswith("by_map") else 0
        assert counts["right"], case
        assert counts["moved_bytes"] <= (LAYERS - resident) * LAYER_BYTES + SMALL_BYTES, case
        assert counts["moved_bytes"] >= (LAYERS - resident) * LAYER_BYTES, case
        assert counts["peak_bytes"] < 1.5 * LAYER_BYTES, case
        assert counts["left_bytes"] < LAYER_BYTES / 8, case

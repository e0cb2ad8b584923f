"""On an accelerator weights move once per forward, nothing stays, and a streamed model makes its tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LAYER_BYTES = 512 * 512 * 4
LAYERS = 6
AHEAD_BLOCKS, BLOCK_BYTES = 3, 40960
SMALL_BYTES = 12 * 2 * 512 * 4
"""Inputs, and outputs that the fake device gets from the CPU."""


def run_cases(name: str, fakedev: Path, folder: Path) -> dict[str, Any]:
    paths = [HERE.parent.parent, HERE / "fakedev", fakedev]
    ran = subprocess.run(
        [sys.executable, str(HERE / name), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.slow
def test_a_streamed_model_makes_its_tokens_in_the_memory_that_was_planned(
    fakedev: Path, tmp_path: Path
) -> None:
    found = run_cases("device_cases.py", fakedev, tmp_path)
    assert "bytes of device memory are needed" in found.pop("refused")
    assert set(found) == {"disk", "host", "device", "all three"}
    resident = found["device"]
    for tiers, counts in found.items():
        assert counts["right"], tiers
        assert counts["left_bytes"] == 0, tiers
        assert counts["planned_bytes"] <= counts["held_bytes"] <= counts["planned_bytes"] + 65536, tiers
        # What the fake device copies for what it does on the CPU is the same in all of them; blocks
        # for the next token may be there already, or not yet.
        moved = counts["copied_bytes"] - resident["copied_bytes"]
        assert abs(moved - counts["streamed_bytes"]) <= AHEAD_BLOCKS * BLOCK_BYTES + 65536, tiers
    assert found["disk"]["placement"]["disk"] == found["host"]["placement"]["host"] == 6


@pytest.mark.slow
def test_weights_go_to_an_accelerator_once_and_leave(fakedev: Path, tmp_path: Path) -> None:
    found = run_cases("accelerator_cases.py", fakedev, tmp_path)
    assert len(found) == 6
    for case, counts in found.items():
        resident = 1 if case.endswith("by_map") else 0
        assert counts["right"], case
        assert counts["moved_bytes"] <= (LAYERS - resident) * LAYER_BYTES + SMALL_BYTES, case
        assert counts["moved_bytes"] >= (LAYERS - resident) * LAYER_BYTES, case
        assert counts["peak_bytes"] < 1.5 * LAYER_BYTES, case
        assert counts["left_bytes"] < LAYER_BYTES / 8, case

"""accelerate's own tests pass with Endor's functions wherever they pass with accelerate's.

The run on the CPU cannot tell an offloader from one that does nothing; the one on the fake accelerator can.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
OURS = "endor.integrations.accelerate"
LEAST = {"cpu": 55, "fakedev": 80}
"""How many tests pass at least: accelerate 1.15 has 62 and 92."""
REPLACED = {"dispatch_model", "disk_offload", "cpu_offload", "load_checkpoint_in_model", "AlignDevicesHook"}


def start(
    suite: Path, device: str, implementation: str, out: Path, more: list[Path]
) -> subprocess.Popen[str]:
    paths = [REPOSITORY, suite / "packages", HERE / "fakedev", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    words = ["--tests", str(suite / "tests"), "--device", device, "--impl", implementation, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, str(HERE / "runner.py"), *words],
        env=environment,
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def both(
    suite: Path, device: str, folder: Path, more: list[Path]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """accelerate's result and ours, run side by side, and what ours printed."""
    outs = {name: folder / f"{name or 'accelerate'}.json" for name in ("", OURS)}
    runs = {name: start(suite, device, name, out, more) for name, out in outs.items()}
    said = {name: process.communicate(timeout=280)[0] for name, process in runs.items()}
    for name, process in runs.items():
        assert process.returncode == 0, said[name]
    theirs, mine = (json.loads(outs[name].read_text(encoding="utf-8")) for name in ("", OURS))
    return theirs, mine, said[OURS]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "fakedev"])
def test_what_passes_for_accelerate_passes_for_endor(
    device: str, suite: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    more = [request.getfixturevalue("fakedev")] if device == "fakedev" else []
    theirs, mine, said = both(suite, device, tmp_path, more)
    passed = {name for name, outcome in theirs["outcomes"].items() if outcome == "passed"}
    assert len(passed) >= LEAST[device]
    lost = {name: mine["messages"].get(name) for name in passed if mine["outcomes"].get(name) != "passed"}
    assert not lost, said
    assert all(mine["calls"].get(name, 0) > 0 for name in REPLACED), mine["calls"]

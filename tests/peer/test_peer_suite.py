"""accelerate's own tests pass with Endor's functions wherever they pass with accelerate's.

The run on the CPU cannot tell an offloader from one that does nothing; the one on the fake accelerator can.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / "build" / "peer"
OURS = "endor.integrations.accelerate"
LEAST = {"cpu": 55, "fakedev": 80}
"""How many tests pass at least: accelerate 1.15 has 62 and 92."""
REPLACED = {"dispatch_model", "disk_offload", "cpu_offload", "load_checkpoint_in_model", "AlignDevicesHook"}


@pytest.fixture(scope="session")
def suite() -> Path:
    directory = CACHE / f"accelerate-{version('accelerate')}"
    if not directory.is_dir():
        reason = CACHE / "unavailable.txt"
        why = reason.read_text(encoding="utf-8") if reason.exists() else "run scripts/fetch_peer_suite.py"
        pytest.skip(f"accelerate's tests are not here: {why}")
    return directory


@pytest.fixture(scope="session")
def fakedev() -> Path:
    """The fake accelerator, built once for this torch and kept."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("the fake accelerator needs a C++ compiler")
    source = HERE / "fakedev" / "fakedev.cpp"
    key = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    folder = CACHE / f"fakedev-{key}"
    if not (folder / "_fakedev.so").exists():
        build(compiler, source, folder)
    return folder


def build(compiler: str, source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    includes = (home / "include", home / "include/torch/csrc/api/include", sysconfig.get_paths()["include"])
    part = folder / "_fakedev.so.part"
    libraries = [
        f"-L{home}/lib",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ltorch_python",
        f"-Wl,-rpath,{home}/lib",
    ]
    options = ["-O0", "-std=c++20", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=_fakedev"]
    command = [
        compiler,
        *options,
        *(f"-I{path}" for path in includes),
        str(source),
        "-o",
        str(part),
        *libraries,
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the fake accelerator does not compile here: {built.stderr.splitlines()[0][:200]}")
    part.rename(folder / "_fakedev.so")


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

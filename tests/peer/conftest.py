"""accelerate's own tests, fetched by scripts/fetch_peer_suite.py, and the fake accelerator, built here."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / "build" / "peer"


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

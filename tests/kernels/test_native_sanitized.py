"""The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer, on random and hostile inputs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path("endor/kernels/native")
DRIVER = Path("tests/kernels/native_driver.cpp")
COMPILER = os.environ.get("CXX", "g++")
OPTIONS = ["-std=c++17", "-g", "-O1", "-fno-sanitize-recover=all", "-pthread"]


def compiles(folder: Path, sanitizer: str) -> bool:
    """Whether this machine can build and run a program with `sanitizer`."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [COMPILER, *OPTIONS, f"-fsanitize={sanitizer}", str(source), "-o", str(folder / "probe")]
    if shutil.which(COMPILER) is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([folder / "probe"], capture_output=True, check=False).returncode == 0


def build_driver(repository: Path, folder: Path, sanitizer: str) -> Path:
    """The driver and all kernels but the Python module."""
    native = repository / NATIVE
    sources = [str(path) for path in sorted(native.glob("*.cpp")) if path.name != "module.cpp"]
    driver = folder / "driver"
    flags = [*OPTIONS, f"-fsanitize={sanitizer}", "-Wall", "-Wextra", "-Werror", f"-I{native}"]
    subprocess.run([COMPILER, *flags, *sources, str(repository / DRIVER), "-o", str(driver)], check=True)
    return driver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "trials"),
    [("address,undefined", 1000), ("thread", 50)],
    ids=["address-and-undefined", "thread"],
)
def test_no_input_makes_the_kernels_misbehave(
    repository: Path, tmp_path: Path, sanitizer: str, trials: int
) -> None:
    if not compiles(tmp_path, sanitizer):
        pytest.skip(f"{COMPILER} cannot build and run programs with -fsanitize={sanitizer}")
    driver = build_driver(repository, tmp_path, sanitizer)
    result = subprocess.run([driver, str(trials)], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "scalar ok" in result.stdout

"""The C++ kernels on random and hostile inputs: under sanitizers, and those for Arm under an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path("endor/kernels/native")
DRIVERS = [Path("tests/kernels/native_driver.cpp"), Path("tests/kernels/native_codecs_driver.cpp")]
COMPILER = os.environ.get("CXX", "g++")
OPTIONS = ["-std=c++17", "-g", "-O1", "-fno-sanitize-recover=all", "-pthread"]
CROSS_COMPILER, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")


def compiles(folder: Path, sanitizer: str) -> bool:
    """Whether this machine can build and run a program with `sanitizer`."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [COMPILER, *OPTIONS, f"-fsanitize={sanitizer}", str(source), "-o", str(folder / "probe")]
    if shutil.which(COMPILER) is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([folder / "probe"], capture_output=True, check=False).returncode == 0


def build_driver(repository: Path, folder: Path, source: Path, compiler: list[str]) -> Path:
    """A driver and all kernels but the Python module, without a warning."""
    native = repository / NATIVE
    sources = [str(path) for path in sorted(native.glob("*.cpp")) if path.name != "module.cpp"]
    driver = folder / "driver"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [*compiler, *warnings, f"-I{native}", *sources, str(repository / source), "-o", str(driver)]
    subprocess.run(command, check=True)
    return driver


@pytest.mark.slow
@pytest.mark.parametrize("source", DRIVERS, ids=["raw", "codecs"])
@pytest.mark.parametrize(
    ("sanitizer", "trials"),
    [("address,undefined", 1000), ("thread", 50)],
    ids=["address-and-undefined", "thread"],
)
def test_no_input_makes_the_kernels_misbehave(
    repository: Path, tmp_path: Path, sanitizer: str, trials: int, source: Path
) -> None:
    if not compiles(tmp_path, sanitizer):
        pytest.skip(f"{COMPILER} cannot build and run programs with -fsanitize={sanitizer}")
    driver = build_driver(repository, tmp_path, source, [COMPILER, *OPTIONS, f"-fsanitize={sanitizer}"])
    result = subprocess.run([driver, str(trials)], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "scalar ok" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("source", DRIVERS, ids=["raw", "codecs"])
def test_neon_kernels_pass_the_same_trials_under_emulation(
    repository: Path, tmp_path: Path, source: Path
) -> None:
    emulator = next((name for name in EMULATORS if shutil.which(name)), None)
    if shutil.which(CROSS_COMPILER) is None or emulator is None:
        pytest.skip(f"needs {CROSS_COMPILER} and {' or '.join(EMULATORS)}")
    driver = build_driver(
        repository, tmp_path, source, [CROSS_COMPILER, "-std=c++17", "-O2", "-static", "-pthread"]
    )
    command = [emulator, str(driver), "300"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "neon ok" in result.stdout or source != DRIVERS[0]

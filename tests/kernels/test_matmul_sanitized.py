"""The matmul kernels on random and hostile inputs, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path("endor/kernels/native")
DRIVER = Path("tests/kernels/matmul_driver.cpp")
COMPILER = os.environ.get("CXX", "g++")
OPTIONS = ["-std=c++17", "-g", "-O1", "-fno-sanitize-recover=all", "-pthread", "-Wall", "-Wextra", "-Werror"]


def compiles(folder: Path, sanitizer: str) -> bool:
    """Whether this machine can build and run a program with `sanitizer`."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [COMPILER, *OPTIONS, f"-fsanitize={sanitizer}", str(source), "-o", str(folder / "probe")]
    if shutil.which(COMPILER) is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([folder / "probe"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizer", "trials"),
    [("address,undefined", 500), ("thread", 100)],
    ids=["address-and-undefined", "thread"],
)
def test_no_input_makes_the_products_misbehave(
    repository: Path, tmp_path: Path, sanitizer: str, trials: int
) -> None:
    if not compiles(tmp_path, sanitizer):
        pytest.skip(f"{COMPILER} cannot build and run programs with -fsanitize={sanitizer}")
    native = repository / NATIVE
    names = [path for path in native.glob("*.cpp") if path.name != "module.cpp"]
    driver = tmp_path / "driver"
    command = [COMPILER, *OPTIONS, f"-fsanitize={sanitizer}", f"-I{native}", *map(str, sorted(names))]
    subprocess.run([*command, str(repository / DRIVER), "-o", str(driver)], check=True)
    result = subprocess.run([driver, str(trials)], capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "scalar ok" in result.stdout

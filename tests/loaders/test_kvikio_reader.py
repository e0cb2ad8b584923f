"""The kvikio reader with the real kvikio: in processes of their own, with a CUDA driver made for the test."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from endor.errors import PlanError
from endor.loaders import choose_reader, probe_kvikio

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.timeout(240)

needs_kvikio = pytest.mark.skipif(
    importlib.util.find_spec("kvikio") is None,
    reason="kvikio is not installed; scripts/test installs it where the package index has it",
)


def compile_library(source: str, target: Path, *options: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a driver for the test needs Linux and a C compiler")
    command = [compiler, "-shared", "-fPIC", "-O1", *options, "-o", str(target)]
    subprocess.run([*command, str(HERE / "faults" / source), "-ldl"], check=True, capture_output=True)
    return target


def environment(tmp_path: Path, *options: str, preload: bool = False) -> dict[str, str]:
    """This process's, with a driver compiled with `options` in front of any other."""
    compile_library("driver.c", tmp_path / "libcuda.so.1", "-Wl,-soname,libcuda.so.1", *options)
    search = f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    found = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": search}
    if preload:
        found["LD_PRELOAD"] = str(compile_library("preload.c", tmp_path / "preload.so"))
    return found


def run_cases(tmp_path: Path, names: str, *options: str, preload: bool = False) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "pyproject.toml"), str(HERE / "kvikio_cases.py"), "-k", names],
        env=environment(tmp_path, *options, preload=preload),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


@needs_kvikio
def test_contract_and_host_memory(tmp_path: Path) -> None:
    run_cases(tmp_path, "Contract or TestHost")


@needs_kvikio
def test_faults_below_kvikio(tmp_path: Path) -> None:
    run_cases(tmp_path, "TestFaults", preload=True)


@needs_kvikio
def test_device_memory(tmp_path: Path) -> None:
    run_cases(tmp_path, "TestDevice", "-DDEVICE")


@needs_kvikio
def test_driver_that_hangs_is_found_out_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", environment(tmp_path, "-DHANGS")["LD_LIBRARY_PATH"])
    found = probe_kvikio(timeout_s=4)
    assert not found.serves_host
    assert found.reason == "it hung for 4 s while reading into host memory"


@needs_kvikio
def test_without_a_driver_it_is_refused_by_name_and_not_taken_by_itself(tmp_path: Path) -> None:
    found = probe_kvikio()
    if found.serves_host:
        pytest.skip("this machine has a CUDA driver")
    assert "libcuda.so.1" in found.reason
    with pytest.raises(PlanError, match=r"kvikio cannot serve here: .*libcuda\.so\.1.*; use auto or posix"):
        choose_reader("kvikio")
    choice = choose_reader("auto", device_memory=True)
    choice.reader.close()
    assert choice.reader.name == "posix"
    assert "libcuda.so.1" in choice.reason


def test_file_that_the_probe_cannot_read_is_a_reason(tmp_path: Path) -> None:
    found = probe_kvikio(tmp_path / "gone")
    assert not found.serves_host
    assert found.reason


def test_without_kvikio_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_kvikio.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    try:
        with pytest.raises(PlanError, match=r"not installed \(pip install 'endor-offload\[kvikio\]'\)"):
            choose_reader("kvikio")
    finally:
        probe_kvikio.cache_clear()


@pytest.mark.parametrize(("name", "taken"), [("auto", "posix"), ("posix", "posix"), ("mmap", "mmap")])
def test_choice_says_why(name: str, taken: str) -> None:
    choice = choose_reader(name)
    choice.reader.close()
    assert choice.reader.name == taken
    assert ("host memory" in choice.reason) if name == "auto" else choice.reason.startswith("asked for")


def test_unknown_reader_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PlanError, match="reader 'carrier pigeon' is unknown; use auto, posix, kvikio, mmap"):
        choose_reader("carrier pigeon")

"""Faults injected below Python: a bad sector, a dying disk, short reads, refused direct reads, Ctrl-C."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from endor.loaders import PAGE_BYTES, drop_from_page_cache

HERE = Path(__file__).resolve().parent
SIZE = 64 * PAGE_BYTES  # four units of stream.py

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("faults below Python need Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "preload.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(HERE / "faults" / "preload.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return library


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.faulty"
    path.write_bytes(os.urandom(SIZE))
    return path


def start(path: Path, *, mode: str, passes: int = 1, **environment: str) -> subprocess.Popen[str]:
    root = HERE.parent.parent
    process = subprocess.Popen(
        [sys.executable, str(HERE / "faults" / "stream.py"), str(path), mode, str(passes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(output)
    assert found["left"] == []
    return found


def run(path: Path, preload: Path, *, mode: str, fault: str) -> dict[str, Any]:
    return outcome(start(path, mode=mode, LD_PRELOAD=str(preload), ENDOR_FAULT=fault))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_bad_sector_names_unit_file_offset_and_errno(file: Path, preload: Path, mode: str) -> None:
    found = run(file, preload, mode=mode, fault=f"eio {33 * PAGE_BYTES}")
    assert found["errno"] == errno.EIO
    assert "unit 'layer 2'" in found["error"]
    assert f"{file}: reading" in found["error"]
    assert f"offset {32 * PAGE_BYTES}" in found["error"]
    assert found["digest"] == hashlib.sha256(file.read_bytes()[: 32 * PAGE_BYTES]).hexdigest()


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_short_reads_are_continued(file: Path, preload: Path, mode: str) -> None:
    found = run(file, preload, mode=mode, fault="short")
    assert "error" not in found
    assert found["digest"] == digest(file)


def test_direct_reads_refused_after_opening_are_done_buffered(file: Path, preload: Path) -> None:
    found = run(file, preload, mode="direct", fault="einval")
    assert found["digest"] == digest(file)
    assert (found["bytes_direct"], found["bytes_buffered"]) == (0, SIZE)


@pytest.mark.parametrize("fault", ["", "slow"], ids=["running", "waiting-for-a-slow-disk"])
def test_ctrl_c_ends_at_once_and_leaves_nothing(file: Path, preload: Path, fault: str) -> None:
    process = start(file, mode="direct", passes=1_000_000, LD_PRELOAD=str(preload), ENDOR_FAULT=fault)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        found = outcome(process)
    finally:
        process.kill()
    assert found["interrupted"]


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder on a real block device, and that device's backing file, which the test can cut short."""
    backing, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with backing.open("wb") as disk:
        disk.truncate(16 << 20)
    try:
        subprocess.run(
            ["mkfs.ext4", "-q", "-O", "^has_journal", str(backing)], check=True, capture_output=True
        )
        subprocess.run(["mount", "-o", "loop", str(backing), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a loop device: {error}")
    try:
        yield folder, backing
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_disk_that_dies_is_an_error_with_its_errno(failing_disk: tuple[Path, Path], mode: str) -> None:
    folder, backing = failing_disk
    path = folder / "model.safetensors"
    path.write_bytes(os.urandom(8 << 20))
    drop_from_page_cache(path)
    os.truncate(backing, 1 << 20)
    found = outcome(start(path, mode=mode))
    assert found["errno"] == errno.EIO
    assert f"{path}: reading" in found["error"]

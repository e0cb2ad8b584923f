"""Faults injected below Python: a bad sector, a dying disk, short reads, refused direct reads, Ctrl-C."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from endor.loaders import PAGE_BYTES, drop_from_page_cache

HERE = Path(__file__).resolve().parent
SIZE = 64 * PAGE_BYTES  # four units of stream.py
BAD_SECTOR = f"eio@{33 * PAGE_BYTES}.faulty"

Outcomes = dict[tuple[str, str], dict[str, Any]]

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


def start(*paths: Path, passes: int = 1, preload: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "faults" / "stream.py"), str(passes), *map(str, paths)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def outcomes(process: subprocess.Popen[str]) -> Outcomes:
    """What happened, by file name and mode."""
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in output.splitlines()]
    assert [outcome["left"] for outcome in found] == [[]] * len(found)
    return {(Path(outcome["path"]).name, outcome["mode"]): outcome for outcome in found}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, preload: Path, content: bytes) -> Outcomes:
    """All faults in one process, for its start takes longer than they do."""
    folder = tmp_path_factory.mktemp("faulty")
    paths = [folder / name for name in (BAD_SECTOR, "short.faulty", "einval.faulty")]
    for path in paths:
        path.write_bytes(content)
    return outcomes(start(*paths, preload=preload))


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_bad_sector_names_unit_file_offset_and_errno(found: Outcomes, content: bytes, mode: str) -> None:
    outcome = found[BAD_SECTOR, mode]
    assert outcome["errno"] == errno.EIO
    assert "unit 'layer 2'" in outcome["error"]
    assert f"{BAD_SECTOR}: reading" in outcome["error"]
    # Every read that reaches the sector fails, and which of the unit's two chunks does so first is not fixed.
    named = re.search(r"offset (\d+) ", outcome["error"])
    assert named is not None
    assert int(named[1]) in {32 * PAGE_BYTES, 36 * PAGE_BYTES}
    assert outcome["digest"] == digest(content[: 32 * PAGE_BYTES])


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_short_reads_are_continued(found: Outcomes, content: bytes, mode: str) -> None:
    outcome = found["short.faulty", mode]
    assert "error" not in outcome
    assert outcome["digest"] == digest(content)


def test_direct_reads_refused_after_opening_are_done_buffered(found: Outcomes, content: bytes) -> None:
    outcome = found["einval.faulty", "direct"]
    assert outcome["digest"] == digest(content)
    assert (outcome["bytes_direct"], outcome["bytes_buffered"]) == (0, SIZE)


@pytest.mark.parametrize("name", ["sound.faulty", "slow.faulty"])
def test_ctrl_c_ends_at_once_and_leaves_nothing(tmp_path: Path, preload: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(os.urandom(SIZE))
    process = start(path, passes=1_000_000, preload=preload)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        assert outcomes(process)[name, "direct"]["interrupted"]
        assert time.monotonic() - began_s < 20
    finally:
        process.kill()


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


def test_disk_that_dies_is_an_error_with_its_errno(failing_disk: tuple[Path, Path]) -> None:
    folder, backing = failing_disk
    path = folder / "model.safetensors"
    path.write_bytes(os.urandom(8 << 20))
    drop_from_page_cache(path)
    os.truncate(backing, 1 << 20)
    for outcome in outcomes(start(path)).values():
        assert outcome["errno"] == errno.EIO
        assert f"{path}: reading" in outcome["error"]

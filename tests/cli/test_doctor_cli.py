"""`endor doctor`: what it says of this machine, as text and as one JSON object, and that it remembers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import endor
from endor.loaders import READER_NAMES

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file that is large enough to be read, and a cache of its own beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(1 << 20) * 32)
    return folder


def examine(run_command: Run, *arguments: str | Path) -> dict[str, Any]:
    done = run_command("endor", "doctor", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_json_is_one_object_with_everything(run_command: Run, disk: Path) -> None:
    found = examine(run_command, disk)
    assert set(found) == {"version", "device", "memory", "kernels", "readers", "gds", "bandwidth"}
    assert found["version"] == endor.__version__
    assert (found["device"]["kind"], found["device"]["threads"] >= 1) == ("cpu", True)
    assert found["memory"]["available_bytes"] > 1 << 20
    assert {"raw", "exponent", "int8", "int4"} <= set(found["kernels"])
    assert set(found["readers"]) == set(READER_NAMES)
    assert found["readers"]["auto"]["takes"] == "posix"
    assert all(reader["reason"] for reader in found["readers"].values())
    assert found["gds"]["path"] in ("none", "compatibility mode", "GDS")
    assert found["bandwidth"]["where"] == str(disk)
    assert found["bandwidth"]["disk"]["bytes_per_s"] > 0
    assert found["bandwidth"]["memory"]["bytes_per_s"] > 0


def test_bandwidth_is_remembered_until_measured_again(run_command: Run, disk: Path) -> None:
    first = examine(run_command, disk)["bandwidth"]
    again = examine(run_command, disk)["bandwidth"]
    anew = examine(run_command, disk, "--measure")["bandwidth"]
    assert [one["remembered"] for one in (first, again, anew)] == [False, True, False]
    assert again["disk"] == first["disk"] != anew["disk"]


def test_text_says_why_each_reader_is_or_is_not_there(run_command: Run, disk: Path) -> None:
    done = run_command("endor", "doctor", disk)
    assert done.returncode == 0
    assert done.stderr == f"measuring memory and the disk of {disk}\n"
    text = " ".join(done.stdout.split())
    for expected in (f"endor {endor.__version__}", "reader auto posix: ", "reader kvikio ", "reader mmap "):
        assert expected in text
    assert "GB/s, copy, measured 20" in text


def test_disk_that_is_not_there_is_an_error(run_command: Run, disk: Path) -> None:
    done = run_command("endor", "doctor", disk / "gone", "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {disk / 'gone'}: ")
    assert "No such file" in done.stderr

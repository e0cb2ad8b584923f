"""`endor doctor`: what it says of this machine, as text and as one JSON object, and that it remembers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import PlanError
from endor.loaders import READER_NAMES, BlockingAccelerator, KvikioProbe

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
    for expected in (
        f"endor {endor.__version__}",
        "GPUs none",
        "reader auto posix: ",
        "reader kvikio ",
        "reader mmap ",
    ):
        assert expected in text
    assert "GB/s, copy, measured 20" in text


def test_disk_that_is_not_there_is_an_error(run_command: Run, disk: Path) -> None:
    done = run_command("endor", "doctor", disk / "gone", "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {disk / 'gone'}: ")
    assert "No such file" in done.stderr


# A machine with GPUs.


class Card(BlockingAccelerator):
    """Host memory that is called a GPU's."""

    @property
    def name(self) -> str:
        return "a card"


@pytest.fixture
def gpus(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """Two GPUs, and a kvikio that reaches them through host memory."""
    card = Card(torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: ("a card", "another card")[i])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: ((20 + i) * 10**9, (24 + i) * 10**9))
    monkeypatch.setattr("endor.loaders.accelerator_for", lambda _: card)
    kvikio = KvikioProbe(True, True, False, "cuFile is in compatibility mode", "26.10")
    monkeypatch.setattr("endor.loaders.probe_kvikio", lambda _: kvikio)
    monkeypatch.setattr("endor.loaders.choice.probe_kvikio", lambda _: kvikio)
    monkeypatch.setattr("endor.runtime.bandwidth._COPIED_BYTES", 4 << 20)
    return card


def test_gpus_are_named_with_their_memory_and_the_first_one_is_used(
    run_command: Run, disk: Path, gpus: Card
) -> None:
    found = examine(run_command, disk)
    device = found["device"]
    assert (device["kind"], device["name"], device["gpus"]) == ("cuda", "a card", ["a card", "another card"])
    first = {"device": "cuda:0", "name": "a card", "free_bytes": 20 * 10**9, "memory_bytes": 24 * 10**9}
    assert device["gpu_memory"][0] == first
    assert found["bandwidth"]["link"]["path"] == "pinned copy"
    assert found["bandwidth"]["device"]["bytes_per_s"] > 0
    assert found["gds"]["path"] == "compatibility mode"
    assert found["readers"]["auto"]["reason"].endswith("cuFile is in compatibility mode")
    assert gpus.name == device["name"]


@pytest.mark.usefixtures("gpus")
def test_text_says_which_gpu_is_used_and_how_fast_its_link_is(run_command: Run, disk: Path) -> None:
    done = run_command("endor", "doctor", disk)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "measuring the link to a card"
    text = " ".join(done.stdout.split())
    for expected in (
        "device cuda:0 a card, 24.0 GB, 20.0 GB of them free processor ",
        "cuda:1 another card, 25.0 GB, 21.0 GB of them free",
        "kernels on the GPU raw: ",
        "GPUDirect path compatibility mode: cuFile is in compatibility mode",
        "link to the GPU bandwidth ",
        " GB/s, pinned copy, measured 20",
        "GPU memory bandwidth ",
    ):
        assert expected in text
    assert "not used" not in text


@pytest.mark.usefixtures("gpus")
def test_link_is_remembered_until_measured_again(run_command: Run, disk: Path) -> None:
    first = examine(run_command, disk)["bandwidth"]
    again = examine(run_command, disk)["bandwidth"]
    anew = examine(run_command, disk, "--measure")["bandwidth"]
    assert [one["remembered"] for one in (first, again, anew)] == [False, True, False]
    assert again["link"] == first["link"] != anew["link"]


@pytest.mark.parametrize(("backend", "expected"), [("triton", "Triton"), ("reference", "pip install triton")])
@pytest.mark.usefixtures("gpus")
def test_kernels_of_the_gpu_have_a_reason(
    run_command: Run, disk: Path, monkeypatch: pytest.MonkeyPatch, backend: str, expected: str
) -> None:
    monkeypatch.setattr(
        "endor.kernels.active_backend", lambda device, codec: backend if device == "cuda" else f"cpu {codec}"
    )
    found = examine(run_command, disk)
    assert found["gpu_kernels"]["codecs"]["exponent"] == backend
    assert expected in found["gpu_kernels"]["reason"]
    assert found["kernels"]["exponent"] == "cpu exponent"


def test_link_that_cannot_be_measured_is_said_to_be_so(
    run_command: Run, disk: Path, gpus: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise PlanError("no memory can be pinned")

    monkeypatch.setattr(gpus, "pin", refuse)
    found = examine(run_command, disk)["bandwidth"]
    assert (found["link"], found["link_error"]) == (None, "no memory can be pinned")
    assert found["disk"]["bytes_per_s"] > 0
    text = " ".join(run_command("endor", "doctor", disk).stdout.split())
    assert "link to the GPU not measured: no memory can be pinned" in text

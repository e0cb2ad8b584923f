"""`endor plan`: one budget or a table of them; bandwidths given, measured or guessed, and said which."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from endor.errors import LoadError, PlanError
from endor.loaders import BlockingAccelerator
from tests.runtime.test_sliced_weights import converted, mixtral

Run = Callable[..., subprocess.CompletedProcess[str]]
GIVEN = ("--disk-bandwidth", "1MB/s", "--memory-bandwidth", "1 GB / s")


def planned(run_command: Run, *arguments: str | Path) -> dict[str, Any]:
    done = run_command("endor", "plan", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_given_bandwidths_are_used(run_command: Run, demo_checkpoint: Path) -> None:
    found = planned(run_command, demo_checkpoint, "--host-memory", "0", *GIVEN)
    assert found["bandwidth"] == {
        "disk": {"bytes_per_s": 1e6, "source": "given"},
        "work": {"bytes_per_s": 1e9, "kinds": {}, "source": "given"},
    }
    (plan,) = found["plans"]
    assert plan["placement"]["host"] == 0 < plan["placement"]["disk"]
    seconds = plan["seconds_per_token"]
    assert plan["bound"] == "disk"
    assert seconds["total"] == pytest.approx(seconds["read"] + seconds["exposed"])
    assert plan["tokens_per_second"] == pytest.approx(1 / seconds["total"])
    assert plan["memory"]["total"] == sum(n for part, n in plan["memory"].items() if part != "total")


def test_without_a_budget_a_table_goes_from_nothing_to_everything(
    run_command: Run, demo_checkpoint: Path
) -> None:
    plans = planned(run_command, demo_checkpoint, *GIVEN)["plans"]
    assert [plan["label"] for plan in plans] == ["0 %", "25 %", "50 %", "75 %", "100 %", "default"]
    speeds = [plan["tokens_per_second"] for plan in plans]
    assert speeds == sorted(speeds)
    assert [plan["bound"] for plan in plans[::4]] == ["disk", "work"]
    assert plans[4]["placement"]["disk"] == 0


def test_text_of_one_budget_says_where_everything_is(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--host-memory", "0", *GIVEN)
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for expected in ("0 in memory, ", "from disk", "ring ", "seconds per token read ", "0.00 GB/s, given"):
        assert expected in text
    assert " predicted, bound by disk" in text


def test_text_without_a_budget_is_a_row_for_each(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command("endor", "plan", demo_checkpoint, *GIVEN)
    lines = done.stdout.splitlines()
    expected = "to keep bytes blocks kept from disk/token memory tokens/s bound by"
    assert " ".join(lines[0].split()) == expected
    assert [line.split("  ")[0] for line in lines[1:7]] == ["0 %", "25 %", "50 %", "75 %", "100 %", "default"]
    assert lines[7] == "disk: 0.00 GB/s, given"


def test_a_device_is_planned_for_with_guesses_that_are_called_so(
    run_command: Run, demo_checkpoint: Path
) -> None:
    arguments = (demo_checkpoint, "--host-memory", "1GB", "--device-memory", "0", "--disk-bandwidth", "1GB")
    found = planned(run_command, *arguments)
    assert found["bandwidth"]["work"]["source"].startswith("guessed: a common GPU")
    assert found["bandwidth"]["copy"]["source"].startswith("guessed: PCI Express")
    assert found["plans"][0]["placement"]["device"] == 0 < found["plans"][0]["placement"]["host"]
    text = run_command("endor", "plan", *arguments).stdout
    assert "memory of the host" in text
    assert "0 on the device" in text


def test_what_is_not_given_is_measured_and_the_disk_only_once(
    run_command: Run, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("endor.runtime.bandwidth._OWN_FILE_BYTES", 8 << 20)
    first = run_command("endor", "plan", demo_checkpoint)
    assert first.returncode == 0
    assert "measuring memory and the disk" in first.stderr
    assert "measuring how fast weights of this model are multiplied" in first.stderr
    assert "memory and the disk" not in run_command("endor", "plan", demo_checkpoint).stderr
    found = planned(run_command, demo_checkpoint, "--disk-bandwidth", "5MB")["bandwidth"]
    assert found["disk"] == {"bytes_per_s": 5_000_000, "source": "given"}
    assert found["work"]["kinds"]
    assert found["work"]["source"] == "measured now on weights of this model"


def test_disk_that_cannot_be_measured_is_guessed_in_words(
    run_command: Run, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise LoadError("/models: read-only")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("endor.runtime.bandwidth.measure_bandwidths", refuse)
    found = planned(run_command, demo_checkpoint, "--memory-bandwidth", "1GB")["bandwidth"]["disk"]
    expected = "guessed, as it cannot be measured (/models: read-only); give --disk-bandwidth"
    assert found == {"bytes_per_s": 2e9, "source": expected}


@pytest.mark.parametrize("rate", ["0", "fast", "-1GB/s", "1GB/h"])
def test_rate_that_is_none_is_a_usage_error(run_command: Run, demo_checkpoint: Path, rate: str) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--disk-bandwidth", rate)
    assert done.returncode == 2
    assert rate.removesuffix("/s") in done.stderr


def test_budget_too_small_is_an_error_that_says_what_is_needed(
    run_command: Run, demo_checkpoint: Path
) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--host-memory", "100", *GIVEN)
    assert done.returncode == 1
    assert "holds no block" in done.stderr
    assert "or 0 to stream every block" in done.stderr


def test_directory_without_a_model_is_an_error(run_command: Run, tmp_path: Path) -> None:
    done = run_command("endor", "plan", tmp_path, *GIVEN)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


# A device with its own memory: one that is here, or one that is not.


class Card(BlockingAccelerator):
    """Host memory that is called a GPU's."""

    @property
    def name(self) -> str:
        return "a card"

    def __init__(self, free_bytes: int) -> None:
        super().__init__(torch.device("cpu"))
        self._free_bytes = free_bytes

    def free_bytes(self) -> int:
        return self._free_bytes


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Card]:
    """Puts a GPU with so much free memory into this machine, and forgets what was measured here."""

    def insert(free_bytes: int) -> Card:
        found = Card(free_bytes)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("endor.loaders.accelerator_for", lambda _: found)
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("endor.runtime.bandwidth._COPIED_BYTES", 4 << 20)
    return insert


RATES = ("--disk-bandwidth", "1GB/s", "--link-bandwidth", "20GB/s", "--memory-bandwidth", "400GB/s")


def test_a_device_that_is_here_keeps_what_fits_beside_the_context(
    run_command: Run, demo_checkpoint: Path, card: Callable[[int], Card]
) -> None:
    card((256 << 20) + (64 << 20))
    found = planned(run_command, demo_checkpoint, "--host-memory", "0", *RATES)
    assert found["device"] == "cpu, a card"
    (plan,) = found["plans"]
    assert plan["placement"]["device"] > 0 == plan["placement"]["disk"]
    assert plan["memory"]["cache"] > 0 < plan["memory"]["activations"]
    parts = {part: n for part, n in plan["memory"].items() if part not in ("total", "host")}
    assert plan["memory"]["total"] == sum(parts.values())
    assert plan["pinned_memory"]["total"] == plan["memory"]["host"] == 0
    assert plan["bound"] == "work"


def test_context_length_is_what_keys_and_values_have_room_for(
    run_command: Run, demo_checkpoint: Path, card: Callable[[int], Card]
) -> None:
    card(1 << 30)
    arguments = (demo_checkpoint, "--host-memory", "0", *RATES)
    one, two = (planned(run_command, *arguments, "--context-length", n) for n in ("1", "2"))
    assert (one["context_tokens"], two["context_tokens"]) == (1, 2)
    assert two["plans"][0]["memory"]["cache"] == 2 * one["plans"][0]["memory"]["cache"]
    usual = planned(run_command, *arguments)["context_tokens"]
    assert (
        usual == planned(run_command, *arguments, "--context-length", "1000000")["context_tokens"]
    )  # the most


def test_a_device_that_is_too_small_is_an_error_that_says_what_would_do(
    run_command: Run, demo_checkpoint: Path, card: Callable[[int], Card]
) -> None:
    card(1 << 20)
    done = run_command("endor", "plan", demo_checkpoint, *RATES)
    assert done.returncode == 1
    assert "bytes of device memory are needed, " in done.stderr
    assert "bytes are needed, with device_memory=0, depth=0" in done.stderr
    done = run_command("endor", "plan", demo_checkpoint, "--device-memory", "0", *RATES)
    assert done.returncode == 1  # given or not
    assert "bytes of device memory are needed, " in done.stderr


def test_cpu_is_taken_where_it_is_asked_for_though_there_is_a_device(
    run_command: Run, demo_checkpoint: Path, card: Callable[[int], Card]
) -> None:
    card(1 << 30)
    found = planned(run_command, demo_checkpoint, "--device", "cpu", "--host-memory", "0", *GIVEN)
    assert (found["device"], found["context_tokens"]) == ("cpu", 0)
    assert found["plans"][0]["pinned_memory"] is None
    done = run_command("endor", "plan", demo_checkpoint, "--device", "cpu", "--device-memory", "1GB")
    assert done.returncode == 1
    assert "on the CPU give --host-memory" in done.stderr


def test_link_of_a_device_that_is_here_is_measured_once(
    run_command: Run, demo_checkpoint: Path, card: Callable[[int], Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(1 << 30)
    monkeypatch.setattr("endor.runtime.bandwidth._OWN_FILE_BYTES", 8 << 20)
    first = run_command("endor", "plan", demo_checkpoint)
    assert first.returncode == 0
    assert "measuring the link to a card" in first.stderr
    assert "measuring the link" not in run_command("endor", "plan", demo_checkpoint).stderr
    found = planned(run_command, demo_checkpoint)["bandwidth"]
    assert found["copy"]["source"].startswith("measured 20")
    assert found["work"]["source"].startswith("guessed: as fast as the device copies, measured 20")


def test_link_that_cannot_be_measured_is_guessed_in_words(
    run_command: Run, demo_checkpoint: Path, card: Callable[[int], Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PlanError("no memory can be pinned")

    monkeypatch.setattr(card(1 << 30), "pin", refuse)
    monkeypatch.setattr("endor.runtime.bandwidth._OWN_FILE_BYTES", 8 << 20)
    found = planned(run_command, demo_checkpoint, "--disk-bandwidth", "1GB")["bandwidth"]
    reason = "guessed, as it cannot be measured (no memory can be pinned); give --link-bandwidth"
    assert found["copy"] == {"bytes_per_s": 20e9, "source": reason}
    assert found["work"]["source"] == "guessed: a common GPU; give --memory-bandwidth"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_here_needs_its_memory_named(
    run_command: Run, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = run_command("endor", "plan", demo_checkpoint, "--device", device, *RATES)
    assert done.returncode == 1
    assert "there is no CUDA device on this machine" in done.stderr
    assert "give --device-memory to plan for a machine that has one" in done.stderr
    found = planned(
        run_command,
        demo_checkpoint,
        "--device",
        device,
        "--device-memory",
        "0",
        "--host-memory",
        "1GB",
        *RATES,
    )
    assert found["device"] == "a GPU that is not here"
    assert found["bandwidth"]["copy"] == {"bytes_per_s": 20e9, "source": "given"}
    assert found["plans"][0]["bound"] in ("copy", "work")
    assert found["plans"][0]["pinned_memory"]["resident"] > 0


def test_table_of_a_device_has_both_memories(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--device-memory", "0", *RATES)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    expected = "to keep bytes on device in memory from disk/token device memory pinned tokens/s bound by"
    assert " ".join(lines[0].split()) == expected
    assert lines[7:] == [
        "device: a GPU that is not here",
        "disk: 1.00 GB/s, given",
        "decode and compute: 400.00 GB/s, given",
        "to the device: 20.00 GB/s, given",
    ]


def test_a_deeper_ring_is_named_where_nothing_is_read_ahead(run_command: Run, demo_checkpoint: Path) -> None:
    # Blocks of 410 kB: 41 ms from disk, 4 ms over the link, next to no work.
    slow = ("--disk-bandwidth", "10MB/s", "--link-bandwidth", "100MB/s", "--memory-bandwidth", "100GB/s")
    tiers = ("--device-memory", "1MB", "--host-memory", "2MB", "--depth", "0")
    text = " ".join(run_command("endor", "plan", demo_checkpoint, *tiers, *slow).stdout.split())
    assert "deeper ring --depth 2 would give " in text
    assert " more of the device's memory, " in text
    deep = run_command("endor", "plan", demo_checkpoint, *tiers[:-1], "2", *slow)
    assert (deep.returncode, "deeper ring" in deep.stdout) == (0, False)


def test_experts_that_stay_in_host_memory_are_counted(run_command: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory, _ = converted(mixtral(), tmp_path)
    few, many = (
        ("--device-memory", "0", "--host-memory", "0"),
        ("--device-memory", "0", "--host-memory", "1GB"),
    )
    assert planned(run_command, directory, *few, *RATES)["plans"][0]["host_experts"] == 0
    (plan,) = planned(run_command, directory, *many, *RATES)["plans"]
    assert (plan["expert_slots"], plan["host_experts"]) == (3, 16)
    assert plan["bytes_per_token"]["disk"] == 64 * 2  # a row of the embedding
    text = " ".join(run_command("endor", "plan", directory, *many, *RATES).stdout.split())
    assert "experts room for 3 on the device, 16 in memory; all are taken to be as likely" in text
    text = " ".join(run_command("endor", "plan", directory, *few, *RATES).stdout.split())
    assert "experts room for 3; all are taken to be as likely" in text


@pytest.mark.parametrize("device", ["gpu", "cuda:", "mps"])
def test_device_that_is_none_is_a_usage_error(run_command: Run, demo_checkpoint: Path, device: str) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--device", device)
    assert done.returncode == 2
    assert "write auto, cpu, cuda or cuda:N" in done.stderr

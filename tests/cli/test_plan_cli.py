"""`endor plan`: one budget or a table of them; bandwidths given, measured or guessed, and said which."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from endor.errors import LoadError

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

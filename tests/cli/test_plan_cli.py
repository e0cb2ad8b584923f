"""`endor plan`: bandwidths given or measured, text and JSON, and budgets that cannot be met."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
GIVEN = ("--disk-bandwidth", "1MB/s", "--memory-bandwidth", "1 GB / s")


def test_given_bandwidths_are_used(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--host-memory", "0", *GIVEN, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["bandwidth"] == {"disk": 1_000_000, "memory": 1_000_000_000}
    assert found["placement"]["host"] == 0 < found["placement"]["disk"]
    assert found["seconds_per_token"]["disk"] == found["bytes_per_token"]["disk"] / 1e6
    assert found["bound"] == "disk"
    assert found["tokens_per_second"] == pytest.approx(1 / found["seconds_per_token"]["disk"])
    assert found["memory"]["total"] == sum(found["memory"][name] for name in ("resident", "ring", "dense"))


def test_more_memory_means_fewer_bytes_from_disk(run_command: Run, demo_checkpoint: Path) -> None:
    found = [
        json.loads(
            run_command("endor", "plan", demo_checkpoint, "--host-memory", budget, *GIVEN, "--json").stdout
        )
        for budget in ("0", "1GiB")
    ]
    assert [one["bytes_per_token"]["disk"] > 0 for one in found] == [True, False]
    assert found[1]["bound"] == "memory"
    assert found[1]["tokens_per_second"] > found[0]["tokens_per_second"]


def test_text_names_the_bound(run_command: Run, demo_checkpoint: Path) -> None:
    done = run_command("endor", "plan", demo_checkpoint, "--host-memory", "0", *GIVEN)
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "0 in memory, " in text
    assert "s per token at 0.00 GB/s" in text
    assert " at most, bound by disk" in text


def test_what_is_not_given_is_measured_once(
    run_command: Run, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("endor.runtime.bandwidth._OWN_FILE_BYTES", 8 << 20)
    first = run_command("endor", "plan", demo_checkpoint)
    assert first.returncode == 0
    assert "measuring memory and the disk" in first.stderr
    assert run_command("endor", "plan", demo_checkpoint).stderr == ""
    partly = run_command("endor", "plan", demo_checkpoint, "--disk-bandwidth", "5MB", "--json")
    assert json.loads(partly.stdout)["bandwidth"]["disk"] == 5_000_000


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
    assert "bytes" in done.stderr

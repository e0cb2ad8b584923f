"""The bound on memory: kept for any size of model, and refused with a number where it is too small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.convert.activations import ActivationStore
from endor.convert.parallel import Job, run_in_order
from endor.errors import ConvertError
from tests.support.sources import dense_weights, save_source

PEAK = """
import json, sys, endor
endor.convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
"""


def peak_bytes(source: Path, out: Path, repository: Path, **options: Any) -> int:
    command = [sys.executable, "-c", PEAK, str(source), str(out), json.dumps(options)]
    done = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True, timeout=280)
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 MB in matrices of 16 MB: more than the bound leaves for tensors."""
    return save_source(
        "llama", tmp_path_factory.mktemp("large") / "source", hidden_size=2048, intermediate_size=4096,
        head_dim=512, num_hidden_layers=9, shard_size="200MB",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "options", [{"method": "magnitude"}, {"method": "wanda", "samples": 4, "sequence_length": 64}], ids=str
)
def test_resident_memory_stays_within_the_bound(
    large: Path, tmp_path: Path, repository: Path, options: dict[str, Any]
) -> None:
    bound = 4 * 16 * 2**20 + 2**30 if options["method"] == "magnitude" else 1200 * 2**20
    peak = peak_bytes(large, tmp_path / "out", repository, **options, values="raw", memory=bound)
    assert peak <= bound


def test_bound_that_is_too_small_says_what_is_needed_and_that_is_enough(
    tmp_path: Path, repository: Path
) -> None:
    source = save_source("llama", tmp_path / "source")
    options: dict[str, Any] = {"values": "raw", "method": "wanda", "samples": 2, "sequence_length": 16}
    with pytest.raises(ConvertError, match=r"--memory 1 MiB is too small") as caught:
        endor.convert(source, tmp_path / "out", **options, memory=1 << 20)
    found = re.search(r"at least (\d+) MiB", str(caught.value))
    assert found is not None
    endor.convert(source, tmp_path / "out", **options, memory=(int(found[1]) + 64) << 20)


def test_activations_on_disk_give_the_same_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_source("llama", tmp_path / "source")
    options: dict[str, Any] = {"values": "raw", "method": "wanda", "samples": 5, "sequence_length": 24}
    endor.convert(source, tmp_path / "in-memory", **options)
    used: list[bool] = []
    original = ActivationStore.__init__

    def on_disk(self: ActivationStore, directory: Path, *, memory_bytes: int, total_bytes: int) -> None:
        original(self, directory, memory_bytes=0, total_bytes=total_bytes)
        used.append(self.on_disk)

    monkeypatch.setattr(ActivationStore, "__init__", on_disk)
    endor.convert(source, tmp_path / "on-disk", **options)
    assert used == [True]
    expected, found = dense_weights(tmp_path / "in-memory"), dense_weights(tmp_path / "on-disk")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((tmp_path / "on-disk").glob("*.tmp"))


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["disk", "memory"])
def test_store_gives_back_what_was_last_put(tmp_path: Path, memory_bytes: int) -> None:
    batches = [torch.randn(2, 3, 4).bfloat16(), torch.randn(1, 3, 4).bfloat16()]
    with ActivationStore(tmp_path / "tmp", memory_bytes=memory_bytes, total_bytes=100) as store:
        for number, batch in enumerate(batches):
            store[number] = batch + 1
        for number, batch in enumerate(batches):
            store[number] = batch
        assert all(torch.equal(store[number], batch) for number, batch in enumerate(batches))
    assert not (tmp_path / "tmp").exists()


def test_jobs_run_ahead_only_within_the_budget() -> None:
    running: list[int] = []
    most = 0

    def jobs() -> Iterator[Job[int]]:
        for number in range(20):
            running.append(number)
            yield Job(partial(int, number), 40)

    for expected, result in enumerate(run_in_order(jobs(), workers=4, memory_bytes=100)):
        assert result == expected
        most = max(most, len(running))
        running.remove(result)
    assert most <= 4, "two under way, one waiting, one given out"


def test_job_larger_than_the_budget_runs_alone() -> None:
    assert list(run_in_order([Job(lambda: 1, 10**9), Job(lambda: 2, 10**9)], workers=2, memory_bytes=1)) == [
        1,
        2,
    ]


def test_exception_of_a_job_arrives_in_its_place() -> None:
    def fail() -> int:
        raise ValueError("third")

    results = run_in_order([Job(lambda: 1, 1), Job(lambda: 2, 1), Job(fail, 1)], workers=2, memory_bytes=10)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(results)

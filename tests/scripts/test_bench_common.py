"""What the benchmarks share keeps its promises: turns rotate over copies, which share no memory."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from endor.kernels import encode


@pytest.fixture
def common(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("bench_common")


def test_each_call_gets_the_copy_whose_turn_it_is(common: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    runs = {name: lambda i, name=name: calls.append((name, i)) for name in ("first", "second")}

    timings = common.take_turns(runs, copies=3, rounds=2, turn_s=0.0, threads=torch.get_num_threads())

    assert [number for _, number in calls] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [name for name, _ in calls[::2]] == ["first", "second", "second", "first"]
    assert {name: len(taken) for name, taken in timings.items()} == {"first": 2, "second": 2}


def test_the_quieter_half_of_the_turns_counts(common: ModuleType) -> None:
    timings = [
        common.Timing(call_s, others) for call_s, others in ((9.0, 0.9), (1.0, 0.0), (3.0, 0.1), (8.0, 0.5))
    ]

    assert common.quiet_median_s(timings) == 2.0


def test_copies_share_no_memory_and_exceed_the_cache(common: ModuleType) -> None:
    packed = encode(torch.eye(4))

    first, second = common.clones(packed, 2)

    assert len({p.sections["values"].data_ptr() for p in (packed, first, second)}) == 3
    assert common.copies_beyond_cache(1_000_000) == 160
    assert common.copies_beyond_cache(1_000_000_000) == 3


def test_what_is_pruned_is_plus_zero(common: ModuleType) -> None:
    weight = common.random_pruned((64, 64), dtype=torch.bfloat16, density=0.25)

    assert not torch.signbit(weight[weight == 0]).any()
    assert 0.2 < (weight != 0).float().mean() < 0.3

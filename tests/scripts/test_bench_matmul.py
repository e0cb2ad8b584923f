"""The benchmark of products refuses wrong ones and measures each codec against dense in the same round."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from endor.kernels import matmul


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    monkeypatch.setattr(importlib.import_module("bench_common"), "CACHE_BYTES", 1)
    return importlib.import_module("bench_matmul")


def test_every_contender_is_within_its_rounding(bench: ModuleType) -> None:
    weights = bench.Weights.random((24, 192), 0.5, ["raw", "exponent", "int8", "int4"])
    x = torch.randn(2, 192).bfloat16()

    runs = bench.contenders(weights, x, list(matmul.instruction_sets()))

    bench.check(runs, weights, x)
    assert {codec for codec, _ in runs.values()} == {"", "raw", "exponent", "int8", "int4"}


def test_a_wrong_product_is_not_measured(bench: ModuleType) -> None:
    weights = bench.Weights.random((24, 192), 0.5, ["int4"])
    x = torch.randn(2, 192).bfloat16()
    wrong = {"int4 wrong": ("int4", lambda _i: 1.1 * x @ weights.decoded["int4"].T)}

    with pytest.raises(AssertionError, match="int4 wrong"):
        bench.check(wrong, weights, x)


def test_ratios_are_of_turns_of_the_same_round(bench: ModuleType) -> None:
    dense = [bench.Timing(6.0, 0.0), bench.Timing(2.0, 0.0), bench.Timing(3.0, 0.0)]
    ours = [bench.Timing(2.0, 0.0), bench.Timing(1.0, 0.0), bench.Timing(3.0, 0.0)]

    assert bench.times_faster(ours, dense) == 2.0

"""The codec benchmark knows its bound, refuses wrong bits, and reports every codec."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from endor.formats import CODECS
from endor.kernels import encode


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("bench_codecs")


def test_bound_is_the_entropy_of_mask_exponent_and_the_rest(bench: ModuleType) -> None:
    signs = torch.tensor([0.0, 0.0, 1.0, -1.0], dtype=torch.bfloat16)
    exponents = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float16)

    assert bench.bound_bits_per_weight([signs]) == 1.5
    assert bench.bound_bits_per_weight([exponents]) == 1.5
    assert bench.bound_bits_per_weight([torch.cat([signs, torch.zeros(4)]).bfloat16()]) == pytest.approx(
        0.811 + 0.25, abs=1e-3
    )


def test_wrong_bits_are_not_measured(bench: ModuleType) -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.bfloat16)

    bench.check(weight, encode(weight, values="exponent"))
    with pytest.raises(AssertionError, match="exponent"):
        bench.check(weight, encode(-weight, values="exponent"))


@pytest.mark.parametrize("kind", ["magnitude", "wanda"])
def test_half_of_every_row_is_pruned(bench: ModuleType, kind: str) -> None:
    weight = bench.random_weights((6, 128), kind, torch.bfloat16, distribution="student-t")

    assert (weight != 0).sum(dim=1).tolist() == [64] * 6


def test_every_codec_is_reported(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    words = (
        "--parts sizes speed --rows 32 --cols 256 --kinds magnitude none --dtypes bf16 --threads 1 --rounds 1"
    )
    monkeypatch.setattr(bench, "SIZES_SHAPE", (8, 128))
    monkeypatch.setattr(sys, "argv", ["bench", *words.split(), "--turn-ms", "1", "--json", str(report)])

    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)

    found = json.loads(report.read_text())
    pruned, unpruned, *_ = found["sizes"]
    assert set(CODECS) <= set(pruned)
    assert "raw" not in unpruned  # with mask `dense` it is the dense tensor itself
    measured = {row["what"].split()[0] for row in found["speed"]}
    assert measured >= {"memcpy"}
    assert all(row["gb_per_s"] > 0 for row in found["speed"])

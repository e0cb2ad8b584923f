"""How a loaded model multiplies: straight from packed weights, or with the bits of the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import PlanError
from endor.kernels import linear, matmul
from endor.runtime import runtime_of
from tests.support.models import dense_reference, tiny_llama, write_endor_checkpoint

IDS = torch.arange(3, 43)[None]
needs_native = pytest.mark.skipif(not matmul.instruction_sets(), reason="needs the native extension")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    base = tmp_path_factory.mktemp("matmul")
    model = tiny_llama(layers=2)
    return write_endor_checkpoint(model, base / "endor"), dense_reference(model, base / "dense")


def logits(model: Any, tokens: int) -> torch.Tensor:
    with torch.inference_mode():
        result = model(IDS[:, :tokens]).logits
    assert isinstance(result, torch.Tensor)
    return result


@pytest.fixture
def decoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every tile that is decoded."""
    rows: list[int] = []
    original = linear._tile

    def tile(*arguments: Any) -> torch.Tensor:
        found = original(*arguments)
        rows.append(found.shape[0])
        return found

    monkeypatch.setattr(linear, "_tile", tile)
    return rows


@pytest.mark.parametrize("host_memory", [0, None], ids=["disk", "host"])
@needs_native
def test_few_rows_are_multiplied_without_decoding(
    models: tuple[Path, Any], host_memory: int | None, decoded_rows: list[int]
) -> None:
    directory, dense = models
    model = endor.load(directory, host_memory=host_memory)
    torch.testing.assert_close(logits(model, 1), logits(dense, 1))
    assert decoded_rows == []
    assert model.endor_stats().decode_s == 0
    assert model.endor_stats().compute_s > 0
    runtime_of(model).close()


@pytest.mark.parametrize("tile_bytes", [1, 4000, 1 << 20], ids=["rows", "tiles", "whole"])
def test_many_rows_are_multiplied_tile_by_tile(
    models: tuple[Path, Any], tile_bytes: int, monkeypatch: pytest.MonkeyPatch, decoded_rows: list[int]
) -> None:
    monkeypatch.setattr(linear, "TILE_BYTES", tile_bytes)
    directory, dense = models
    model = endor.load(directory, host_memory=0)
    torch.testing.assert_close(logits(model, 40), logits(dense, 40))
    assert sum(decoded_rows) == 2 * (64 + 32 + 32 + 64 + 104 + 104 + 64)
    assert model.endor_stats().decode_s > 0
    runtime_of(model).close()


def test_decode_gives_the_bits_of_the_dense_model(models: tuple[Path, Any], decoded_rows: list[int]) -> None:
    directory, dense = models
    model = endor.load(directory, host_memory=0, matmul="decode")
    for tokens in (1, 40):
        assert torch.equal(logits(model, tokens), logits(dense, tokens))
    assert decoded_rows == []
    assert "matmul" not in runtime_of(model).kernel
    runtime_of(model).close()


@needs_native
def test_kernel_names_what_multiplies(models: tuple[Path, Any]) -> None:
    model = endor.load(models[0], host_memory=0)
    fastest = matmul.instruction_sets()[0]
    assert runtime_of(model).kernel.endswith(f" (matmul: {fastest})")
    runtime_of(model).close()
    half = endor.load(models[0], host_memory=0, dtype=torch.float16)
    assert "matmul" not in runtime_of(half).kernel
    runtime_of(half).close()


def test_scratch_is_a_tile_not_the_largest_weight(
    models: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = endor.load(models[0], host_memory=0).model.layers[0].mlp.up_proj.weight.packed_layout
    assert linear.tile_shape(layout) == (104, 64)
    monkeypatch.setattr(linear, "TILE_BYTES", 64 * 2 * layout.geometry.row_block)
    assert linear.tile_shape(layout) == (min(104, layout.geometry.row_block), 64)


@pytest.mark.parametrize("found", ["fast", "", None, 1])
def test_an_unknown_matmul_is_refused(models: tuple[Path, Any], found: Any) -> None:
    with pytest.raises(PlanError, match="matmul must be one of auto, decode"):
        endor.load(models[0], matmul=found)

"""Criteria choose what their formula says, on every dtype, and touch nothing else."""

from __future__ import annotations

import pytest
import torch

from endor.errors import ConvertError
from endor.pruning import CRITERIA, Magnitude, NofM, Unstructured, Wanda, criterion_named, prune_
from endor.pruning.observe import InputNorms

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8).view(*tensor.shape, -1)


def pruned(weight: torch.Tensor, **options: object) -> torch.Tensor:
    result = weight.clone()
    prune_(result, **options)  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77, 0.99])
def test_magnitude_prunes_the_exact_count_and_the_smallest(dtype: torch.dtype, sparsity: float) -> None:
    weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(1)).add(0.001).to(dtype)
    weight = torch.where(weight.float() == 0, torch.ones(()), weight.float()).to(dtype)
    result = pruned(weight, criterion=Magnitude(), pattern=Unstructured(sparsity))
    gone = (bits(result) == 0).all(-1)
    assert int(gone.sum()) == int(sparsity * weight.numel())
    assert torch.equal(bits(result)[~gone], bits(weight)[~gone])
    if gone.any():
        assert weight.float().abs()[gone].max() <= weight.float().abs()[~gone].min()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_pruned_is_plus_zero_and_what_stays_keeps_its_bits(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-0.0, 1.0, -2.0, float("nan"), -0.5, 0.25]]).to(dtype)
    result = pruned(weight, criterion=Magnitude(), pattern=Unstructured(0.5))
    assert not bits(result)[0, [0, 4, 5]].any()
    assert torch.equal(bits(result)[0, [1, 2, 3]], bits(weight)[0, [1, 2, 3]])


def test_nan_weights_are_kept_by_every_criterion() -> None:
    weight = torch.ones(4, 8)
    weight[:, 3] = float("nan")
    for criterion in CRITERIA.values():
        result = pruned(weight, criterion=criterion, pattern=Unstructured(0.5), input_norms=torch.ones(8))
        assert result[:, 3].isnan().all()


def test_wanda_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 40, generator=generator)
    inputs = torch.randn(100, 40, generator=generator) * torch.rand(40, generator=generator)
    result = pruned(weight, criterion=Wanda(), pattern=Unstructured(0.5), input_norms=inputs.norm(dim=0))
    score = weight.abs() * inputs.norm(dim=0)
    expected = weight.clone()
    expected.scatter_(1, score.argsort(dim=1, stable=True)[:, :20], 0.0)
    assert torch.equal(result, expected)


def test_wanda_competes_within_rows_and_magnitude_within_the_matrix() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    by_row = pruned(weight, criterion=Wanda(), pattern=Unstructured(0.5), input_norms=torch.ones(4))
    by_matrix = pruned(weight, criterion=Magnitude(), pattern=Unstructured(0.5))
    assert by_row.tolist() == [[0, 0, 3, 4], [0, 0, 30, 40]]
    assert by_matrix.tolist() == [[0, 0, 0, 0], [10, 20, 30, 40]]


def test_wanda_with_n_of_m() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    result = pruned(
        weight, criterion=Wanda(), pattern=NofM(2, 4), input_norms=torch.tensor([0.1, 0.1, 1.0, 10.0])
    )
    assert result.tolist() == [[0.0, 0.0, 2.0, 1.0]]


def test_chunks_of_rows_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    options = {"criterion": Wanda(), "pattern": Unstructured(0.4), "input_norms": torch.rand(30)}
    whole = pruned(weight, **options)
    monkeypatch.setattr("endor.pruning.criterion._CHUNK_ELEMENTS", 64)
    assert torch.equal(pruned(weight, **options), whole)


def test_stacked_matrices_are_pruned_one_by_one() -> None:
    stack = torch.stack([torch.randn(6, 8), torch.randn(6, 8) * 1000])
    result = pruned(stack, criterion=Magnitude(), pattern=Unstructured(0.5))
    assert [(matrix == 0).sum().item() for matrix in result] == [24, 24]


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty_weights_are_left_alone(shape: tuple[int, int]) -> None:
    weight = torch.empty(shape)
    prune_(weight, criterion=Magnitude(), pattern=Unstructured(0.5))


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ConvertError, match="unknown method 'guess'; use one of wanda, magnitude, none"):
        criterion_named("guess")


def test_norms_are_those_of_all_inputs_and_no_hook_is_left() -> None:
    linear, unused = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    batches = [torch.randn(2, 7, 5), torch.randn(1, 4, 5)]
    with InputNorms({"linear": linear, "unused": unused}) as seen:
        for batch in batches:
            linear(batch)
    linear(torch.full((1, 5), 100.0))
    rows = torch.cat([batch.reshape(-1, 5) for batch in batches])
    norms = seen.norms("linear")
    assert norms is not None
    torch.testing.assert_close(norms, rows.norm(dim=0))
    assert seen.norms("unused") is None
    assert not linear._forward_pre_hooks


def test_watching_does_not_change_the_inputs() -> None:
    linear = torch.nn.Linear(4, 4)
    x = torch.randn(3, 4)
    before = x.clone()
    with InputNorms({"linear": linear}):
        linear(x)
    assert torch.equal(x, before)

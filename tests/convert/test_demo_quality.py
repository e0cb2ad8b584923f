"""Pruning means something on the model that ships: Wanda costs less perplexity than magnitude."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import endor
from tests.support.evaluation import perplexity
from tests.support.sources import dense_weights


@pytest.fixture(scope="module")
def tokens(demo_model: Path, held_out_text: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    return torch.tensor(tokenizer(held_out_text.read_text(), verbose=False)["input_ids"])


def perplexity_of(
    demo_model: Path, tokens: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model)
    if weights is not None:
        model.load_state_dict(weights)
    return perplexity(model, tokens, windows=24)


def test_wanda_is_nearer_to_the_dense_model_than_magnitude(
    demo_model: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    dense = perplexity_of(demo_model, tokens)
    pruned = {}
    for method in ("wanda", "magnitude"):
        endor.convert(
            demo_model, tmp_path / method, method=method, values="raw", samples=32, sequence_length=256
        )
        pruned[method] = perplexity_of(demo_model, tokens, dense_weights(tmp_path / method))
    assert dense < pruned["wanda"] < pruned["magnitude"]
    assert pruned["wanda"] < 1.25 * dense

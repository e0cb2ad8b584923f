"""The demonstration model and its texts are what their card says: small, trained, and fairly split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.evaluation import perplexity

MODEL_LIMIT_BYTES = 8_000_000


@pytest.fixture(scope="module")
def card(demo_model: Path) -> dict[str, float]:
    """The figures in the model card, which the training script wrote."""
    text = (demo_model / "README.md").read_text(encoding="utf-8")
    figures: dict[str, float] = json.loads(text.split("```json")[1].split("```")[0])
    return figures


def test_model_stays_small(demo_model: Path) -> None:
    """It is in the history of the repository for ever, and in every wheel."""
    assert (demo_model / "model.safetensors").stat().st_size <= MODEL_LIMIT_BYTES


def test_weights_are_bf16_and_mostly_in_prunable_matrices(demo_model: Path) -> None:
    with safe_open(demo_model / "model.safetensors", framework="pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        assert {weights.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    in_blocks = sum(size for name, size in sizes.items() if "_proj." in name)
    assert in_blocks >= 0.8 * sum(sizes.values())


def test_model_has_the_perplexity_its_card_claims(
    demo_model: Path, held_out_text: Path, card: dict[str, float]
) -> None:
    """Far below what counting token pairs gives: pruning a model that learned nothing would show nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    token_ids = torch.tensor(tokenizer(held_out_text.read_text(encoding="utf-8"))["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    measured = perplexity(model, token_ids)
    assert measured == pytest.approx(card["perplexity"], rel=0.01)
    assert measured < card["perplexity_bigram"] / 3


def test_tokenizer_gives_every_text_back(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "def f(x):\n\treturn  'é🙂' # \x00 \r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_text_shares_no_paragraph_with_calibration(
    calibration_text: Path, held_out_text: Path
) -> None:
    calibration = set(calibration_text.read_text(encoding="utf-8").split("\n\n"))
    held_out = set(held_out_text.read_text(encoding="utf-8").split("\n\n"))
    assert min(len(calibration), len(held_out)) > 30
    assert not calibration & held_out


def test_calibration_paragraphs_are_documents_of_useful_length(calibration_text: Path) -> None:
    """A paragraph is a document; headings alone would calibrate on nothing but first tokens."""
    lengths = [len(text) for text in calibration_text.read_text(encoding="utf-8").strip().split("\n\n")]
    assert min(lengths) >= 400
    assert 200_000 <= sum(lengths) <= 400_000

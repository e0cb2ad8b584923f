"""Perplexity of a causal language model on a text: what `convert-model --evaluate` reports, before and
after."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from endor.errors import ConvertError
from endor.runtime import load, runtime_of

__all__ = ["perplexities", "read_text"]

_BATCH_TOKENS = 2048


def read_text(file: Path) -> str:
    """The text to evaluate on. Raises ConvertError if there is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConvertError(f"cannot read {file}, the text to evaluate on: {reason}") from error
    if not text.strip():
        raise ConvertError(f"{file}, the text to evaluate on, is empty")
    return text


def perplexities(
    source: Path, out: Path, text: str, *, sequence_length: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Perplexity of the source model and of the checkpoint made from it.

    Args:
        source: the Hugging Face model; its weights are mapped, so that memory holds what fits.
        out: the Endor checkpoint; its weights are streamed.
        text: cut into sequences without overlap; the first token of each is not predicted.
        sequence_length: tokens of each, shortened to what the model can take.
        say: told what is being done.

    Raises ConvertError if the text is too short.
    """
    say("evaluating the source model")
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    sequences = _sequences(source, text, dense.config, sequence_length)
    before = _perplexity(dense, sequences)
    del dense
    say("evaluating the converted model")
    converted = load(out)
    try:
        return {"dense": before, "converted": _perplexity(converted, sequences)}
    finally:
        runtime_of(converted).close()


def _sequences(source: Path, text: str, config: Any, sequence_length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or sequence_length
    length = min(sequence_length, limit, ids.numel())
    if length < 2:
        raise ConvertError(f"the text to evaluate on has {ids.numel()} tokens; at least 2 are needed")
    return ids[: ids.numel() // length * length].view(-1, length)


@torch.inference_mode()
def _perplexity(model: Any, sequences: torch.Tensor) -> float:
    loss, tokens = 0.0, 0
    for batch in sequences.split(max(1, _BATCH_TOKENS // sequences.shape[1])):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        targets = batch[:, 1:]
        loss += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
        tokens += targets.numel()
    return math.exp(loss / tokens)

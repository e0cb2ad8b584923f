"""Perplexity, the one number by which tests judge what pruning did to a model."""

from __future__ import annotations

import math
from typing import Any

import torch


@torch.no_grad()
def perplexity(model: Any, token_ids: torch.Tensor, *, window_tokens: int = 256, windows: int = 0) -> float:
    """exp of the mean negative log-likelihood over consecutive windows.

    `windows` > 0 takes only the first ones. `model` is any causal LM of transformers; it must be on the CPU.
    """
    whole = token_ids[: token_ids.numel() // window_tokens * window_tokens].view(-1, window_tokens)
    if windows:
        whole = whole[:windows]
    total, count = 0.0, 0
    for batch in whole.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss)
        count += batch[:, 1:].numel()
    return math.exp(total / count)

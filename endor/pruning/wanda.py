"""Wanda: a weight counts as much as it moves its output, |w| times the norm of its input (Sun et al., 2023).

Weights compete within their output row: at equal sparsity this loses far less than competing within the
matrix, since no output loses nearly all its inputs.
"""

from __future__ import annotations

import numpy as np
import torch

from endor.pruning.criterion import Criterion
from endor.pruning.patterns import Scores

__all__ = ["Wanda"]


class Wanda(Criterion):
    """|w| * ||x||, compared within each row."""

    name = "wanda"
    needs_activations = True
    per_row = True

    def scores(self, weight: torch.Tensor, input_norms: torch.Tensor | None) -> Scores:
        assert input_norms is not None, "Wanda needs the norms of the inputs"
        scores = weight.detach().to(torch.float32).abs() * input_norms
        return scores.numpy().view(np.uint32)

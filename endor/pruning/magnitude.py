"""Magnitude pruning: the weights closest to zero of each matrix go. Needs nothing but the weights."""

from __future__ import annotations

import torch

from endor.pruning.criterion import Criterion, bit_view
from endor.pruning.patterns import Scores

__all__ = ["Magnitude"]


class Magnitude(Criterion):
    """|w|, compared within the whole matrix."""

    name = "magnitude"
    needs_activations = False
    per_row = False

    def scores(self, weight: torch.Tensor, input_norms: torch.Tensor | None) -> Scores:  # noqa: ARG002
        bits = bit_view(weight)
        # Without the sign bit, the bits of floats are ordered as their magnitudes are.
        magnitudes: Scores = bits & bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)
        return magnitudes

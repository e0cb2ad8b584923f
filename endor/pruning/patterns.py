"""Patterns: which weights go, given a score for every weight.

Scores are unsigned integers whose order is the order of importance (the bits of a non-negative float have
that property, and NaN comes out above infinity, so a NaN weight is always kept). Choosing is exact and
deterministic: the count is met to the weight, and among equal scores the first ones in row-major order go.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endor.errors import ConvertError

__all__ = ["NofM", "Pattern", "Scores", "Unstructured", "parse_pattern"]

Scores = NDArray[Any]
"""uint8, uint16 or uint32 [rows, columns], C-contiguous; columns run along the input dimension."""
Mask = NDArray[np.bool_]
_ROUNDING = 1e-6
"""0.29 * 100 is 28.999…; a count is the floor of the product after this much is added."""


class Pattern(ABC):
    """A rule that keeps some weights of a matrix."""

    name: str

    @abstractmethod
    def check_shape(self, name: str, columns: int) -> None:
        """Raise ConvertError if a matrix called `name` with that many columns cannot be pruned this way."""

    @abstractmethod
    def keep(self, scores: Scores, *, per_row: bool) -> Mask:
        """True where a weight stays.

        Args:
            scores: of all weights; not changed.
            per_row: whether the count holds for every row by itself, or for the matrix.
        """

    @abstractmethod
    def kept_at_most(self, rows: int, columns: int, *, per_row: bool) -> int:
        """How many weights of a matrix stay."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may go; `sparsity` is the share that does."""

    sparsity: float
    name = "unstructured"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConvertError(f"sparsity must be at least 0 and below 1, found {self.sparsity}")

    def check_shape(self, name: str, columns: int) -> None:
        """Every shape will do."""

    def keep(self, scores: Scores, *, per_row: bool) -> Mask:
        rows = scores if per_row else scores.reshape(1, -1)
        return _keep_highest(rows, self._pruned(rows.shape[1])).reshape(scores.shape)

    def kept_at_most(self, rows: int, columns: int, *, per_row: bool) -> int:
        if per_row:
            return rows * (columns - self._pruned(columns))
        return rows * columns - self._pruned(rows * columns)

    def _pruned(self, count: int) -> int:
        return math.floor(self.sparsity * count + _ROUNDING)


@dataclass(frozen=True)
class NofM(Pattern):
    """Of every `m` neighbours along the input dimension, the `n` with the highest scores stay."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ConvertError(f"a pattern N:M needs 0 < N < M, found {self.n}:{self.m}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.n}:{self.m}"

    def check_shape(self, name: str, columns: int) -> None:
        if columns % self.m:
            raise ConvertError(
                f"{name}: its input width {columns} is not a multiple of {self.m}, as pattern {self.name} "
                f"needs. Leave the tensor out with --exclude '{name}', or use --pattern unstructured"
            )

    def keep(self, scores: Scores, *, per_row: bool) -> Mask:  # noqa: ARG002
        # One contiguous plane per place in the group, so that every comparison runs over contiguous memory.
        planes = np.ascontiguousarray(scores.reshape(-1, self.m).T)
        keep = np.empty(planes.shape, np.bool_)
        for i in range(self.m):
            ahead = np.zeros(planes.shape[1], np.uint8)
            for j in range(self.m):
                if j != i:
                    # Among equals the later place ranks higher: the first ones go, as in the other patterns.
                    ahead += planes[j] >= planes[i] if j > i else planes[j] > planes[i]
            np.less(ahead, self.n, out=keep[i])
        return np.ascontiguousarray(keep.T).reshape(scores.shape)

    def kept_at_most(self, rows: int, columns: int, *, per_row: bool) -> int:  # noqa: ARG002
        return rows * columns // self.m * self.n


def _keep_highest(scores: Scores, pruned: int) -> Mask:
    """Keep all but the `pruned` lowest of each row; among equals at the threshold the first ones go."""
    if pruned == 0 or scores.size == 0:
        return np.ones(scores.shape, np.bool_)
    # numpy selects with AVX-512 where there is: 16-bit values at 10 GB/s, a histogram runs at 0.75.
    threshold = np.partition(scores, pruned - 1, axis=1)[:, pruned - 1 : pruned]
    keep: Mask = scores > threshold
    below = _count_per_row(scores < threshold)
    not_above = scores.shape[1] - _count_per_row(keep)
    for row in np.flatnonzero(not_above > pruned):
        equal = scores[row] == threshold[row, 0]
        first_kept = np.flatnonzero(equal)[pruned - below[row]]
        keep[row, first_kept:] |= equal[first_kept:]
    return keep


def _count_per_row(mask: Mask) -> NDArray[np.intp]:
    if mask.shape[0] == 1:  # counting without an axis is 10x faster
        return np.array([np.count_nonzero(mask)])
    counts: NDArray[np.intp] = np.count_nonzero(mask, axis=1)
    return counts


def parse_pattern(text: str, *, sparsity: float) -> Pattern:
    """The pattern called `text`. Raises ConvertError, also for a sparsity that N:M cannot have."""
    if text == Unstructured.name:
        return Unstructured(sparsity)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ConvertError(f"unknown pattern {text!r}; use unstructured, 2:4 or 4:8")
    pattern = NofM(int(match[1]), int(match[2]))
    fixed = 1 - pattern.n / pattern.m
    if abs(sparsity - fixed) > _ROUNDING:
        raise ConvertError(
            f"pattern {text} always has sparsity {fixed:g}, but {sparsity:g} was asked for; leave it out"
        )
    return pattern

"""Pruning: criteria that score weights (one per file), patterns that choose by the scores, and
calibration."""

from __future__ import annotations

from endor.errors import ConvertError
from endor.pruning.criterion import Criterion, prune_
from endor.pruning.magnitude import Magnitude
from endor.pruning.patterns import NofM, Pattern, Unstructured, parse_pattern
from endor.pruning.wanda import Wanda

__all__ = [
    "CRITERIA",
    "METHODS",
    "Criterion",
    "Magnitude",
    "NofM",
    "Pattern",
    "Unstructured",
    "Wanda",
    "criterion_named",
    "parse_pattern",
    "prune_",
]

CRITERIA: dict[str, Criterion] = {criterion.name: criterion for criterion in (Wanda(), Magnitude())}
METHODS = (*CRITERIA, "none")
"""What `--method` takes; `none` keeps every weight."""


def criterion_named(method: str) -> Criterion | None:
    """The criterion of a method, None for `none`. Raises ConvertError for an unknown one."""
    if method not in METHODS:
        raise ConvertError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    return CRITERIA.get(method)

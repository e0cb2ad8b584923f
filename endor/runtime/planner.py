"""From what a model has, budgets and bandwidths to what goes where and what that gives: pure functions.

`endor.load` places by `decide`, which looks at sizes and budgets only; `endor plan` adds `predict`, which
takes bandwidths as well. Nothing here reads a file or looks at the machine.
"""

from __future__ import annotations

from endor.runtime.decision import Decision, Memory, decide
from endor.runtime.prediction import USUAL, USUAL_DEVICE, Overheads, Plan, Rates, Timing, Traffic, predict
from endor.runtime.room import check_room, default_device_bytes, default_pinned_bytes
from endor.runtime.sizes import BlockSize, Budgets, ExpertSize, ModelSizes, Piece, TableSize

__all__ = [
    "USUAL",
    "USUAL_DEVICE",
    "BlockSize",
    "Budgets",
    "Decision",
    "ExpertSize",
    "Memory",
    "ModelSizes",
    "Overheads",
    "Piece",
    "Plan",
    "Rates",
    "TableSize",
    "Timing",
    "Traffic",
    "check_room",
    "decide",
    "default_device_bytes",
    "default_pinned_bytes",
    "plan",
    "predict",
]


def plan(sizes: ModelSizes, budgets: Budgets, rates: Rates, *, depth: int, context_tokens: int = 0) -> Plan:
    """Decide what goes where, and predict bytes and seconds per token. Raises PlanError as `decide` does."""
    decision = decide(sizes, budgets, depth=depth, context_tokens=context_tokens)
    return predict(sizes, decision, rates, depth=depth)

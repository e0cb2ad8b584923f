"""Runs a model whose compressed weights are streamed: placement, hooks, decode scratch, statistics."""

from __future__ import annotations

from endor.runtime.load import load, runtime_of
from endor.runtime.placement import Placement, plan_placement
from endor.runtime.stats import RunStats
from endor.runtime.streaming import Runtime
from endor.runtime.trace import Trace

__all__ = ["Placement", "RunStats", "Runtime", "Trace", "load", "plan_placement", "runtime_of"]

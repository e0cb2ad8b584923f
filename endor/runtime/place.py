"""Carries out for a model, still without its bytes, what the planner decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from endor.checkpoint import Checkpoint
from endor.formats.packed import TensorLayout
from endor.kernels.tensor import BitmapTensor
from endor.loaders import available_bytes
from endor.runtime.blocks import WeightBlock
from endor.runtime.install import install_dense, is_direct
from endor.runtime.placement import Placement
from endor.runtime.planner import Budgets, Decision, check_room, decide
from endor.runtime.slices import ExpertStacks, Table
from endor.runtime.survey import Parts, matrix_of

__all__ = ["ModelPlan", "place"]


@dataclass(frozen=True)
class ModelPlan:
    """What is streamed, and how.

    Attributes:
        blocks: all of them; heads that are read by tiles among them.
        tables: embeddings of which rows are read, with tiles if they are heads too.
        experts: of each Mixture-of-Experts layer.
        decision: what goes where, and the memory it takes.
    """

    blocks: tuple[WeightBlock, ...]
    tables: tuple[Table, ...]
    experts: tuple[ExpertStacks, ...]
    decision: Decision

    @property
    def placement(self) -> Placement:
        return self.decision.placement

    @property
    def expert_slots(self) -> int:
        return self.decision.expert_slots

    def weights(self) -> Iterator[BitmapTensor]:
        """Every weight that is not dense in memory."""
        yield from (weight for block in self.blocks for weight in block.weights.values())
        yield from (table.weight for table in self.tables)
        yield from (weight for stacks in self.experts for weight in stacks.weights.values())

    def decoded(self) -> Iterator[tuple[TensorLayout, torch.dtype]]:
        """What may be decoded at once, with the dtype it is wanted in."""
        for block in self.blocks:
            if block.table:
                yield from _tiles_of(block.table)
            else:
                yield from ((w.packed_layout, w.dtype) for w in block.weights.values() if not is_direct(w))
        for table in self.tables:
            yield from _tiles_of(table)
        for stacks in self.experts:
            yield from ((matrix_of(weight), weight.dtype) for weight in stacks.weights.values())


def _tiles_of(table: Table) -> Iterator[tuple[TensorLayout, torch.dtype]]:
    if not is_direct(table.weight):
        yield from ((tile.layout, table.weight.dtype) for tile in table.tiles)


def place(
    model: Any,
    parts: Parts,
    checkpoint: Checkpoint,
    budgets: Budgets,
    *,
    depth: int,
    verify: bool,
    context_tokens: int = 0,
    device_free_bytes: int | None = None,
) -> ModelPlan:
    """Decide what stays, and prepare the model for that.

    Args:
        model: whose tables become dense parameters where they fit.
        parts: of it.
        checkpoint: open.
        budgets: for compressed weights that stay.
        depth: units that are read ahead.
        verify: compare what is read in parts with its checksums now, since parts have none: it is read once.
        context_tokens: that a device has to have room for.
        device_free_bytes: memory of the device that is free, if it has its own.

    Raises PlanError for a budget that cannot be met, and what reading raises.
    """
    decision = decide(parts.sizes, budgets, depth=depth, context_tokens=context_tokens)
    check_room(
        parts.sizes,
        budgets,
        depth=depth,
        free_bytes=available_bytes(),
        context_tokens=context_tokens,
        device_free_bytes=device_free_bytes,
    )
    for table in parts.tables:
        if table.name in decision.dense_tables:
            install_dense(model, checkpoint.entry(table.name), checkpoint)
    whole = {*decision.placement.host, *decision.placement.device}
    blocks = tuple(replace(b, table=None) if i in whole else b for i, b in enumerate(parts.blocks))
    tables = tuple(table for table in parts.tables if table.name not in decision.dense_tables)
    if parts.experts:
        model.set_experts_implementation("eager")  # the only one that takes experts one by one
    if verify:
        heads = [block.table.name for block in blocks if block.table]
        stacks = [name for layer in parts.experts for name in layer.weights]
        for name in (*heads, *(table.name for table in tables), *stacks):
            checkpoint.verify(name)
    return ModelPlan(blocks, tables, parts.experts, decision)

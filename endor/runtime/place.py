"""Decides, for a model without its bytes, what stays in memory and how the rest is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.formats.packed import TensorLayout
from endor.kernels.tensor import BitmapTensor
from endor.runtime.install import Installed, install_dense, is_direct
from endor.runtime.placement import Placement, plan_placement
from endor.runtime.sliced import SlicedWeight
from endor.runtime.slices import ExpertStacks, Table, open_rows
from endor.runtime.streaming import WeightBlock

__all__ = ["ModelPlan", "place"]

_TILE_BYTES = 16 << 20
"""Of a head, where no block says what is usual: requests of this size reach the disk's full speed."""


@dataclass(frozen=True)
class ModelPlan:
    """What is streamed, and how.

    Attributes:
        blocks: all of them; heads that are read by tiles among them.
        placement: of the blocks.
        tables: embeddings of which rows are read, with tiles if they are heads too.
        experts: of each Mixture-of-Experts layer.
        expert_slots: experts that are in memory at a time.
    """

    blocks: tuple[WeightBlock, ...]
    placement: Placement
    tables: tuple[Table, ...]
    experts: tuple[ExpertStacks, ...]
    expert_slots: int

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
            for weight in stacks.weights.values():
                yield _dense(weight.shape[1:], weight.packed_layout.dtype), weight.dtype


def _tiles_of(table: Table) -> Iterator[tuple[TensorLayout, torch.dtype]]:
    if not is_direct(table.weight):
        yield from ((tile.layout, table.weight.dtype) for tile in table.tiles)


def _dense(shape: Sequence[int], dtype: torch.dtype) -> TensorLayout:
    rows, cols = shape
    return TensorLayout((rows, cols), dtype, "dense", "raw", rows * cols)


def place(
    model: Any, installed: Installed, checkpoint: Checkpoint, *, host_bytes: int, depth: int, verify: bool
) -> ModelPlan:
    """Share out the memory: blocks first, since every token needs all of each; then tables, then experts.

    Args:
        model: whose tables become dense parameters where they fit.
        installed: what its weights are.
        checkpoint: open.
        host_bytes: for compressed weights that stay.
        depth: units that are read ahead.
        verify: compare what is read in parts with its checksums now.

    Raises PlanError for a budget that cannot be met, and what reading raises.
    """
    blocks = installed.blocks
    sizes = [block.nbytes for block in blocks]
    placement = plan_placement([block.name for block in blocks], sizes, host_bytes=host_bytes)
    left = host_bytes - sum(sizes[i] for i in placement.host)
    tile_bytes = max((b.nbytes for b in blocks if not _is_head(b)), default=_TILE_BYTES)
    tables = []
    for name, weight in sorted(installed.tables.items(), key=lambda item: item[1].nbytes):
        if weight.nbytes <= left:
            install_dense(model, checkpoint.entry(name), checkpoint)
            left -= weight.nbytes
        else:
            tables.append(_table(checkpoint, name, weight, tile_bytes=tile_bytes, verify=verify))
    experts = tuple(_experts(checkpoint, installed.experts, verify=verify))
    if experts:
        model.set_experts_implementation("eager")  # the only one that takes experts one by one
    return ModelPlan(
        tuple(
            _with_tiles(checkpoint, block, tile_bytes=tile_bytes, verify=verify)
            if i in placement.disk and _is_head(block) and block.nbytes > tile_bytes
            else block
            for i, block in enumerate(blocks)
        ),
        placement,
        tuple(tables),
        experts,
        _expert_slots(experts, left, depth=depth),
    )


def _is_head(block: WeightBlock) -> bool:
    """Whether one linear layer is the whole block."""
    return [type(weight) for weight in block.weights.values()] == [SlicedWeight]


def _with_tiles(checkpoint: Checkpoint, block: WeightBlock, *, tile_bytes: int, verify: bool) -> WeightBlock:
    ((name, weight),) = block.weights.items()
    assert isinstance(weight, SlicedWeight)
    rows = open_rows(checkpoint, name, verify=verify)
    return replace(block, table=Table(weight, rows, rows.tiles(tile_bytes)))


def _table(
    checkpoint: Checkpoint, name: str, weight: SlicedWeight, *, tile_bytes: int, verify: bool
) -> Table:
    rows = open_rows(checkpoint, name, verify=verify)
    is_head = bool(checkpoint.entry(name).aliases)
    return Table(weight, rows, rows.tiles(tile_bytes) if is_head else ())


def _experts(
    checkpoint: Checkpoint, found: Mapping[nn.Module, Mapping[str, SlicedWeight]], *, verify: bool
) -> Iterator[ExpertStacks]:
    for module, weights in found.items():
        yield ExpertStacks(module, weights, {n: open_rows(checkpoint, n, verify=verify) for n in weights})


def _expert_slots(experts: Sequence[ExpertStacks], left_bytes: int, *, depth: int) -> int:
    """As many as fit, up to all of them; one in use and those that are read ahead are there in any case."""
    if not experts:
        return 0
    slot_bytes = max(stacks.expert_bytes for stacks in experts)
    return max(2, depth + 1, min(sum(stacks.count for stacks in experts), left_bytes // slot_bytes))

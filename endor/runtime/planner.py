"""What a model would do with given memory on given links, before any of its weights are read.

`predict` is a pure function of sizes and bandwidths. What it gives is a bound: the links busy all the time,
reading hidden behind computing or the other way round; decoding that is slower than memory comes on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.errors import PlanError
from endor.kernels.tensor import BitmapTensor
from endor.loaders import LoadPlan, Unit
from endor.runtime.install import dense_bytes, install_weights, stored_dtype
from endor.runtime.load import default_host_bytes
from endor.runtime.place import ModelPlan, place
from endor.runtime.placement import Placement
from endor.runtime.skeleton import build_skeleton, check_complete

__all__ = ["Demand", "Forecast", "demand_of", "predict"]


@dataclass(frozen=True)
class Demand:
    """What one token needs and what is in memory meanwhile, in bytes.

    Attributes:
        placement: of the blocks.
        disk_bytes: read from disk per token. Experts count by their chance of being in memory when every
            expert is as likely as any other.
        host_bytes: used from memory per token: compressed blocks and experts, and dense parameters, of
            embeddings not worth counting.
        resident_bytes: compressed blocks and experts that stay.
        ring_bytes: staging memory.
        dense_bytes: parameters that are dense in memory.
    """

    placement: Placement
    disk_bytes: int
    host_bytes: int
    resident_bytes: int
    ring_bytes: int
    dense_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Of weights, in all."""
        return self.resident_bytes + self.ring_bytes + self.dense_bytes


@dataclass(frozen=True)
class Forecast:
    """Seconds of one token on each link; the slower one decides."""

    disk_s: float
    memory_s: float

    @property
    def bound(self) -> str:
        """The link that decides: `disk` or `memory`."""
        return "disk" if self.disk_s >= self.memory_s else "memory"

    @property
    def tokens_per_s(self) -> float:
        """At most."""
        return 1 / max(self.disk_s, self.memory_s)


def predict(demand: Demand, *, disk_bytes_per_s: float, memory_bytes_per_s: float) -> Forecast:
    """Time of a token if both links are busy all the time: everything crosses memory, the streamed part the
    disk as well.

    Raises PlanError for a bandwidth of 0 or less, or a model without weights.
    """
    if not (disk_bytes_per_s > 0 and memory_bytes_per_s > 0):
        raise PlanError(
            f"bandwidths are more than 0 bytes/s, found disk {disk_bytes_per_s}, memory {memory_bytes_per_s}"
        )
    used_bytes = demand.disk_bytes + demand.host_bytes
    if not used_bytes:
        raise PlanError("the model has no weights: nothing bounds its speed")
    return Forecast(demand.disk_bytes / disk_bytes_per_s, used_bytes / memory_bytes_per_s)


def demand_of(directory: str | os.PathLike[str], *, host_memory: int | None, depth: int = 2) -> Demand:
    """What `endor.load` would do with the model in `directory`; its weights are not read.

    Args:
        directory: an Endor checkpoint.
        host_memory: as for `endor.load`.
        depth: likewise.

    Raises what `endor.load` raises for the same arguments.
    """
    budget = default_host_bytes() if host_memory is None else host_memory
    with torch.device("cpu"), Checkpoint(directory) as checkpoint:
        model = build_skeleton(checkpoint.directory, dtype=None, stored=stored_dtype(checkpoint))
        installed = install_weights(model, checkpoint)
        check_complete(model, Path(directory))
        plan = place(model, installed, checkpoint, host_bytes=budget, depth=depth, verify=False)
        routed = getattr(model.config, "num_experts_per_tok", None)
    return _demand(model, plan, routed=routed, depth=depth)


def _demand(model: nn.Module, plan: ModelPlan, *, routed: int | None, depth: int) -> Demand:
    sizes = [block.nbytes for block in plan.blocks]
    units = tuple(_units(plan))
    layers = [(stacks.count, stacks.expert_bytes) for stacks in plan.experts]
    count = sum(number for number, _ in layers)
    slots = min(plan.expert_slots, count)
    used = sum((routed or number) * nbytes for number, nbytes in layers)
    missed = int(used * (1 - slots / count)) if count else 0
    resident = sum(sizes[i] for i in plan.placement.host)
    return Demand(
        plan.placement,
        disk_bytes=sum(unit.total_bytes for unit in units) + missed,
        host_bytes=resident + used - missed + _dense_bytes_used(model),
        resident_bytes=resident + slots * max((nbytes for _, nbytes in layers), default=0),
        ring_bytes=LoadPlan(units, min(depth, len(units))).ring_bytes if units else 0,
        dense_bytes=dense_bytes(model),
    )


def _units(plan: ModelPlan) -> Iterator[Unit]:
    """What is read for every token. The row of an embedding is not worth counting."""
    for i in plan.placement.disk:
        table = plan.blocks[i].table
        yield from table.units() if table else (plan.blocks[i].unit(),)
    for table in plan.tables:
        yield from table.units() if table.tiles else ()


def _dense_bytes_used(model: nn.Module) -> int:
    """Of the parameters that are dense, those that a token needs all of: not the table of an embedding."""
    used = {
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if not isinstance(parameter, BitmapTensor)
    }
    return sum(parameter.nbytes for parameter in used)

"""From what a model has, a memory budget and bandwidths to what goes where and what that gives: pure functions.

`endor.load` places by `decide`, which looks at sizes and budgets only; `endor plan` adds `predict`, which
takes bandwidths as well. Nothing here reads a file or looks at the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from endor.errors import PlanError
from endor.loaders import LoadPlan, ReadOp, Unit
from endor.loaders.plan import round_up
from endor.loaders.staging import HUGE_PAGE_BYTES
from endor.runtime.overlap import Step, overlap
from endor.runtime.placement import Placement, plan_placement

__all__ = [
    "BlockSize",
    "Budgets",
    "Decision",
    "ExpertSize",
    "Memory",
    "ModelSizes",
    "Piece",
    "Plan",
    "Rates",
    "TableSize",
    "Timing",
    "Traffic",
    "plan",
]


@dataclass(frozen=True)
class Piece:
    """What is read and used as one: a block, a tile of a head, an expert.

    Attributes:
        nbytes: that are read, and that the work goes through.
        span_bytes: staging memory, in whole pages.
        stored_bytes: dense, of the largest part that is decoded at a time; 0 if nothing is.
        cast_bytes: the same in the dtype that is computed in, where that is another one.
        kinds: bytes by kind of weight (`bitmap/exponent`), since kinds are multiplied at different rates.
    """

    nbytes: int
    span_bytes: int
    stored_bytes: int = 0
    cast_bytes: int = 0
    kinds: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class BlockSize:
    """A block, and the tiles it is read in if it is a head that does not stay."""

    name: str
    whole: Piece
    tiles: tuple[Piece, ...] = ()

    @property
    def streamed(self) -> tuple[Piece, ...]:
        return self.tiles or (self.whole,)


@dataclass(frozen=True)
class TableSize:
    """An embedding: dense in memory, or read by rows; with `tiles` if it is a head as well."""

    name: str
    nbytes: int
    row_bytes: int
    tiles: tuple[Piece, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class ExpertSize:
    """The experts of one layer, of which every token takes `routed`."""

    count: int
    routed: int
    expert: Piece

    def __post_init__(self) -> None:
        if not 0 < self.routed <= self.count:
            raise PlanError(f"of {self.count} experts a token takes 1 to {self.count}, found {self.routed}")


@dataclass(frozen=True)
class ModelSizes:
    """What a checkpoint has.

    Attributes:
        blocks: in execution order.
        tables: in any order.
        experts: one for each layer that has them.
        dense_bytes: parameters that are dense and stay in any case.
    """

    blocks: tuple[BlockSize, ...]
    tables: tuple[TableSize, ...] = ()
    experts: tuple[ExpertSize, ...] = ()
    dense_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Of everything that a budget can keep in memory."""
        blocks = sum(block.whole.nbytes for block in self.blocks)
        experts = sum(layer.count * layer.expert.span_bytes for layer in self.experts)
        return blocks + sum(table.nbytes for table in self.tables) + experts


@dataclass(frozen=True)
class Budgets:
    """Bytes of weights that may stay, on top of the ring and of what is dense in any case.

    Attributes:
        host_bytes: in host memory.
        device_bytes: in a device's own memory; None on a CPU, which computes where blocks are.
    """

    host_bytes: int
    device_bytes: int | None = None


@dataclass(frozen=True)
class Rates:
    """How fast bytes move and are worked on.

    Attributes:
        disk_bytes_per_s: from disk.
        work_bytes_per_s: at which compressed bytes are decoded and multiplied with one token, where `kinds`
            has nothing better.
        kinds: the same by kind of weight.
        copy_bytes_per_s: from host to a device with its own memory.
        block_s: the rest of a block's work: attention, norms, calls.
        token_s: what is outside the blocks: sampling, the position's embedding.
    """

    disk_bytes_per_s: float
    work_bytes_per_s: float
    kinds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    copy_bytes_per_s: float = float("inf")
    block_s: float = 0.0
    token_s: float = 0.0

    def __post_init__(self) -> None:
        named = {"disk": self.disk_bytes_per_s, "memory": self.work_bytes_per_s, **self.kinds}
        for name, rate in (named | {"copy": self.copy_bytes_per_s}).items():
            if not rate > 0:
                raise PlanError(f"the {name} bandwidth must be more than 0 bytes/s, found {rate}")

    def work_s(self, nbytes: int, kinds: Mapping[str, int]) -> float:
        """Of going once through so many bytes, `kinds` of which are known better."""
        known = {kind: n for kind, n in kinds.items() if kind in self.kinds}
        rest = max(0, nbytes - sum(known.values()))
        return rest / self.work_bytes_per_s + sum(n / self.kinds[kind] for kind, n in known.items())


@dataclass(frozen=True)
class Memory:
    """Bytes by part, as the runtime takes them; `total` is the peak, without libraries and activations."""

    ring: int
    resident: int
    experts: int
    scratch: int
    dense: int

    @property
    def total(self) -> int:
        return self.ring + self.resident + self.experts + self.scratch + self.dense


@dataclass(frozen=True)
class Traffic:
    """Compressed bytes that one token uses from each tier."""

    device: int
    host: int
    disk: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one token once the ring is full. `token_s` = max(read, copy, work) + `exposed_s`.

    Attributes:
        read_s: the disk's time.
        copy_s: of the link to a device with its own memory.
        work_s: decoding and computing.
        exposed_s: what overlaps with nothing.
    """

    read_s: float
    copy_s: float
    work_s: float
    exposed_s: float

    @property
    def token_s(self) -> float:
        return max(self.read_s, self.copy_s, self.work_s) + self.exposed_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s if self.token_s else float("inf")


@dataclass(frozen=True)
class Decision:
    """What goes where.

    Attributes:
        placement: of the blocks.
        dense_tables: names of those that become dense parameters.
        expert_slots: experts that are in memory at a time.
        memory: what that takes.
    """

    placement: Placement
    dense_tables: frozenset[str]
    expert_slots: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """A decision and what it gives per token."""

    decision: Decision
    traffic: Traffic
    timing: Timing


def plan(sizes: ModelSizes, budgets: Budgets, rates: Rates, *, depth: int) -> Plan:
    """Decide what goes where, and predict bytes and seconds per token. Raises PlanError as `decide` does."""
    decision = decide(sizes, budgets, depth=depth)
    return predict(sizes, decision, rates, depth=depth, own_memory=budgets.device_bytes is not None)

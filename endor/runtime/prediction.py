"""Bytes and seconds per token of a decision: a pure function of sizes, the decision and rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from endor.errors import PlanError
from endor.runtime.decision import Decision
from endor.runtime.overlap import Step, overlap
from endor.runtime.sizes import ExpertSize, ModelSizes, Piece

__all__ = ["USUAL", "USUAL_DEVICE", "Overheads", "Plan", "Rates", "Timing", "Traffic", "predict"]

_MOST_TOKENS: Final = 1 << 20


@dataclass(frozen=True)
class Overheads:
    """Work that does not depend on bytes.

    Attributes:
        block_s: the rest of a block: attention over a short context, norms, calls.
        cold_s: more, of a block of `cold_bytes` or more, which pushes everything else out of the caches.
        streamed_s: of lending a block's bytes, and threads that wake up.
        expert_s: of finding an expert's rows and adding its part.
        expert_read_s: of asking for an expert's sections and putting them together.
        expert_disk_share: of the disk's bandwidth, reached by the short reads of an expert.
        token_s: what a generation does between two forwards.
        slowdown: by this share work takes longer while bytes are read.
    """

    block_s: float = 0.0
    cold_s: float = 0.0
    cold_bytes: int = 0
    streamed_s: float = 0.0
    expert_s: float = 0.0
    expert_read_s: float = 0.0
    expert_disk_share: float = 1.0
    token_s: float = 0.0
    slowdown: float = 0.0

    def of_block(self, nbytes: int) -> float:
        return self.block_s + (self.cold_s if nbytes >= self.cold_bytes else 0.0)


USUAL: Final = Overheads(
    block_s=0.00015,
    cold_s=0.0006,
    cold_bytes=8 << 20,
    streamed_s=0.0003,
    expert_s=0.0003,
    expert_read_s=0.0003,
    expert_disk_share=0.6,
    token_s=0.0003,
    slowdown=0.2,
)
"""Measured on two cores of a Zen 5 server: docs/design/planner.md."""

USUAL_DEVICE: Final = Overheads(
    block_s=0.0003,
    streamed_s=0.00005,
    expert_s=0.0001,
    expert_read_s=0.0003,
    expert_disk_share=0.6,
    token_s=0.0005,
)
"""Arithmetic for a GPU, not measured: a block is 40 to 60 operations, launched by a host in 5 to 7 us each,
while bytes are copied; work is not slowed down by that, as a link takes a small share of a GPU's memory
bandwidth. Short reads of experts are taken to be as on `USUAL`'s machine."""


@dataclass(frozen=True)
class Rates:
    """How fast bytes move and are worked on.

    Attributes:
        disk_bytes_per_s: from disk.
        work_bytes_per_s: at which compressed bytes are decoded and multiplied with one token, where `kinds`
            has nothing better.
        kinds: the same by kind of weight.
        copy_bytes_per_s: from host to a device with its own memory.
        overheads: what does not depend on bytes.
    """

    disk_bytes_per_s: float
    work_bytes_per_s: float
    kinds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    copy_bytes_per_s: float = float("inf")
    overheads: Overheads = field(default_factory=Overheads)

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
    def bound(self) -> str:
        """What decides: `disk`, `copy` or `work`."""
        parts = {"disk": self.read_s, "copy": self.copy_s, "work": self.work_s}
        return max(parts, key=parts.__getitem__)

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s if self.token_s else float("inf")


@dataclass(frozen=True)
class Plan:
    """A decision and what it gives per token."""

    decision: Decision
    traffic: Traffic
    timing: Timing


def predict(sizes: ModelSizes, decision: Decision, rates: Rates, *, depth: int) -> Plan:
    """Bytes and seconds of one token, after a first one has filled the ring and warmed the experts."""
    if decision.host_memory is None:
        rates = replace(rates, copy_bytes_per_s=float("inf"))  # weights are used where they are read to
    experts = [
        _expert_time(layer, hits, held, rates, depth=depth)
        for (layer, hits), held in zip(_hits(sizes, decision), _held_shares(sizes, decision), strict=True)
    ]
    steps = [*_steps(sizes, decision, rates), Step(work_s=rates.overheads.token_s)]
    read_s = sum(step.read_s for step in steps) + sum(e.read_s for e in experts)
    copy_s = sum(step.copy_s for step in steps) + sum(e.copy_s for e in experts)
    work_s = sum(step.work_s for step in steps) + sum(e.work_s for e in experts)
    slower = 1.0 + rates.overheads.slowdown * min(1.0, read_s / work_s if work_s and depth else 0.0)
    steps = [replace(step, work_s=step.work_s * slower) for step in steps]
    in_order_s = overlap(steps, depth=depth).pass_s + sum(e.work_s * slower + e.exposed_s for e in experts)
    exposed_s = max(0.0, in_order_s - max(read_s, copy_s, work_s * slower))
    return Plan(decision, _traffic(sizes, decision), Timing(read_s, copy_s, work_s * slower, exposed_s))


def _steps(sizes: ModelSizes, decision: Decision, rates: Rates) -> Iterator[Step]:
    own_memory = decision.host_memory is not None
    device, host = set(decision.placement.device), set(decision.placement.host)
    for i, block in enumerate(sizes.blocks):
        stays, on_disk = i in device or (i in host and not own_memory), i not in device and i not in host
        pieces = block.streamed if on_disk else (block.whole,)
        rest_s = rates.overheads.of_block(block.whole.nbytes) / len(pieces)
        for piece in pieces:
            step = _step(piece, rates, on_disk=on_disk, copied=own_memory and not stays)
            yield replace(step, work_s=step.work_s + rest_s)
    for table in sizes.tables:
        away = table.name not in decision.dense_tables
        for piece in table.tiles:
            yield _step(piece, rates, on_disk=away, copied=own_memory and away)


def _step(piece: Piece, rates: Rates, *, on_disk: bool, copied: bool) -> Step:
    streamed_s = rates.overheads.streamed_s if on_disk or copied else 0.0
    return Step(
        work_s=rates.work_s(piece.nbytes, piece.kinds) + streamed_s,
        read_s=piece.nbytes / rates.disk_bytes_per_s if on_disk else 0.0,
        copy_s=piece.nbytes / rates.copy_bytes_per_s if copied else 0.0,
    )


def _hits(sizes: ModelSizes, decision: Decision) -> list[tuple[ExpertSize, float]]:
    """The share of each layer's routed experts that are still in memory, if the router takes all alike.

    The slots hold the experts of the last `tokens` tokens; one is hit if it was among these. Routers that
    have favourites do better.
    """
    slots = decision.expert_slots
    if slots >= sum(layer.count for layer in sizes.experts):
        return [(layer, 1.0) for layer in sizes.experts]
    if slots < sum(layer.routed for layer in sizes.experts):
        return [(layer, 0.0) for layer in sizes.experts]
    low, high = 1.0, float(_MOST_TOKENS)
    for _ in range(60):
        middle = (low + high) / 2
        held = sum(layer.count * _seen(layer, middle) for layer in sizes.experts)
        low, high = (middle, high) if held <= slots else (low, middle)
    return [(layer, _seen(layer, low)) for layer in sizes.experts]


def _seen(layer: ExpertSize, tokens: float) -> float:
    """The chance that an expert was routed to by any of so many tokens."""
    return 1.0 - math.pow(1.0 - layer.routed / layer.count, tokens)


def _held_shares(sizes: ModelSizes, decision: Decision) -> list[float]:
    """Of each layer's experts, the share that a device finds in the host's memory."""
    held = decision.host_experts or (0,) * len(sizes.experts)
    return [n / layer.count for layer, n in zip(sizes.experts, held, strict=True)]


def _expert_time(layer: ExpertSize, hits: float, held: float, rates: Rates, *, depth: int) -> Timing:
    """Of one layer's experts, which are asked for when the router has chosen.

    The share `held` of those that are missing is only copied. Layers in which some are and some are not wait
    for as long as the mean of one with all and one with none of them says.
    """
    extra, missing = rates.overheads, layer.routed * (1.0 - hits)
    read_s = layer.expert.nbytes / (rates.disk_bytes_per_s * extra.expert_disk_share)
    copy_s = layer.expert.nbytes / rates.copy_bytes_per_s
    product_s = rates.work_s(layer.expert.nbytes, layer.expert.kinds) + extra.expert_s
    late = [_late_s(layer, 1.0 - hits, s, copy_s, product_s, depth=depth) for s in (read_s, 0.0)]
    return Timing(
        read_s=missing * (1.0 - held) * read_s,
        copy_s=missing * copy_s,
        work_s=layer.routed * product_s + missing * extra.expert_read_s,
        exposed_s=(1.0 - held) * late[0] + held * late[1],
    )


def _late_s(
    layer: ExpertSize, missed: float, read_s: float, copy_s: float, product_s: float, *, depth: int
) -> float:
    """Of the time that one layer's missing experts take, what hides behind nothing.

    If the first is missing, nothing hides its read, nor its copy to a device; that of any other one hides
    behind the products since the one that was missing before it, and its copy behind the next one's read.
    """
    missing = layer.routed * missed
    if not depth or not missed:
        return missing * (read_s + copy_s)
    slower_s = max(read_s, copy_s)
    late_s = slower_s - min(slower_s, product_s / missed)
    return missed * (read_s + copy_s) + (missing - missed) * late_s


def _traffic(sizes: ModelSizes, decision: Decision) -> Traffic:
    placement, dense = decision.placement, decision.dense_tables
    hit = copied = read = 0.0
    for (layer, hits), held in zip(_hits(sizes, decision), _held_shares(sizes, decision), strict=True):
        routed_bytes = layer.routed * layer.expert.nbytes
        hit += routed_bytes * hits
        copied += routed_bytes * (1.0 - hits) * held
        read += routed_bytes * (1.0 - hits) * (1.0 - held)
    tables = [table for table in sizes.tables if table.name not in dense]
    rows = sum(table.row_bytes for table in tables)
    tiles = sum(piece.nbytes for table in tables for piece in table.tiles)
    blocks = {
        tier: sum(sizes.blocks[i].whole.nbytes for i in getattr(placement, tier))
        for tier in ("device", "host")
    }
    blocks["host" if decision.host_memory is None else "device"] += round(hit)
    blocks["host"] += round(copied)
    streamed = sum(p.nbytes for i in placement.disk for p in sizes.blocks[i].streamed)
    return Traffic(**blocks, disk=streamed + tiles + rows + round(read))

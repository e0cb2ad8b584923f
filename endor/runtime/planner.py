"""From what a model has, budgets and bandwidths to what goes where and what that gives: pure functions.

`endor.load` places by `decide`, which looks at sizes and budgets only; `endor plan` adds `predict`, which
takes bandwidths as well. Nothing here reads a file or looks at the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from endor.errors import PlanError
from endor.loaders.plan import ring_bytes_of, round_up
from endor.loaders.staging import HUGE_PAGE_BYTES
from endor.runtime.overlap import Step, overlap
from endor.runtime.placement import Placement, plan_placement

__all__ = [
    "USUAL",
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
    "plan",
    "predict",
]

_SCRATCHES: Final = ("stored_bytes", "cast_bytes")
_MOST_TOKENS: Final = 1 << 20


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
    """An embedding: dense in memory, or read by rows.

    Attributes:
        nbytes: on disk.
        dense_bytes: in memory, in the dtype that is computed in.
        row_bytes: read for each token.
        tiles: if it is a head as well.
    """

    name: str
    nbytes: int
    dense_bytes: int
    row_bytes: int
    tiles: tuple[Piece, ...] = ()


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
    def bound(self) -> str:
        """What decides: `disk`, `copy` or `work`."""
        parts = {"disk": self.read_s, "copy": self.copy_s, "work": self.work_s}
        return max(parts, key=parts.__getitem__)

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
        memory: what that takes where weights are used.
        host_memory: what it takes in the host's, if that is a device with its own memory.
    """

    placement: Placement
    dense_tables: frozenset[str]
    expert_slots: int
    memory: Memory
    host_memory: Memory | None = None


@dataclass(frozen=True)
class Plan:
    """A decision and what it gives per token."""

    decision: Decision
    traffic: Traffic
    timing: Timing


def plan(sizes: ModelSizes, budgets: Budgets, rates: Rates, *, depth: int) -> Plan:
    """Decide what goes where, and predict bytes and seconds per token. Raises PlanError as `decide` does."""
    return predict(sizes, decide(sizes, budgets, depth=depth), rates, depth=depth)


def decide(sizes: ModelSizes, budgets: Budgets, *, depth: int) -> Decision:
    """Share out the memory: blocks first, since every token needs all of each; then tables, then experts.

    Args:
        depth: units that are read ahead.

    Raises PlanError for a budget that holds nothing and is not 0; the message says what would do.
    """
    own_memory = budgets.device_bytes is not None
    here = budgets.host_bytes if budgets.device_bytes is None else budgets.device_bytes
    every = range(len(sizes.blocks))
    near = _choose(sizes, every, here, depth=depth)
    left = here - sum(sizes.blocks[i].whole.nbytes for i in near)
    rest = [i for i in every if i not in near]
    far = _choose(sizes, rest, budgets.host_bytes, depth=depth) if own_memory else ()
    dense, left = _dense_tables(sizes.tables, left)
    placement = Placement(
        host=far if own_memory else near,
        disk=tuple(i for i in rest if i not in far),
        device=near if own_memory else (),
    )
    slots = _expert_slots(sizes.experts, left, depth=depth)
    return Decision(
        placement, dense, slots, *_memory(sizes, placement, dense, slots, own_memory, depth=depth)
    )


def check_room(sizes: ModelSizes, budgets: Budgets, *, depth: int, free_bytes: int | None) -> None:
    """Refuse a budget whose plan needs more memory than is free once what is dense in any case is there.

    Raises PlanError, which says what is needed at least and which budget would fit.
    """
    decision = decide(sizes, budgets, depth=depth)
    needed = decision.memory.total - sizes.dense_bytes
    if free_bytes is None or needed <= free_bytes:
        return
    memory = decision.memory
    fits = _fitting(sizes, budgets.host_bytes, depth=depth, free_bytes=free_bytes)
    least = decide(sizes, Budgets(0), depth=0).memory.total - sizes.dense_bytes
    advice = (
        f"at least {least} bytes are needed, with host_memory=0 and depth=0"
        if fits is None
        else f"host_memory={fits} would fit"
    )
    raise PlanError(
        f"{needed} bytes of memory are needed, {free_bytes} are free: ring {memory.ring}, resident "
        f"{memory.resident}, experts {memory.experts}, scratch {memory.scratch}, embeddings "
        f"{memory.dense - sizes.dense_bytes}; {advice}"
    )


def _fitting(sizes: ModelSizes, host_bytes: int, *, depth: int, free_bytes: int) -> int | None:
    """A budget below `host_bytes` whose plan fits, or None if not even 0 does."""
    smallest = min((block.whole.nbytes for block in sizes.blocks), default=0)
    while True:
        needed = decide(sizes, Budgets(host_bytes), depth=depth).memory.total - sizes.dense_bytes
        if needed <= free_bytes:
            return host_bytes
        if host_bytes == 0:
            return None
        host_bytes -= needed - free_bytes
        host_bytes = host_bytes if host_bytes >= smallest else 0


def _choose(sizes: ModelSizes, among: Sequence[int], budget: int, *, depth: int) -> tuple[int, ...]:
    blocks = [sizes.blocks[i] for i in among]
    chosen = plan_placement(
        [block.name for block in blocks],
        [block.whole.nbytes for block in blocks],
        host_bytes=budget,
        pieces=[[piece.nbytes for piece in block.streamed] for block in blocks],
        depth=depth,
    ).host
    return tuple(among[i] for i in chosen)


def _dense_tables(tables: Iterable[TableSize], left: int) -> tuple[frozenset[str], int]:
    """Those that fit, the smallest first, and the bytes that are left then."""
    dense = set()
    for table in sorted(tables, key=lambda table: (table.nbytes, table.name)):
        if table.nbytes <= left:
            dense.add(table.name)
            left -= table.nbytes
    return frozenset(dense), left


def _expert_slots(experts: Sequence[ExpertSize], left: int, *, depth: int) -> int:
    """As many as fit, up to all of them; one in use and those that are read ahead are there in any case."""
    if not experts:
        return 0
    slot_bytes = max(layer.expert.span_bytes for layer in experts)
    return max(2, depth + 1, min(sum(layer.count for layer in experts), left // slot_bytes))


def _memory(
    sizes: ModelSizes,
    placement: Placement,
    dense: frozenset[str],
    slots: int,
    own_memory: bool,
    *,
    depth: int,
) -> tuple[Memory, Memory | None]:
    """Where weights are used and, if that is a device with its own memory, in the host's as well."""
    near = placement.device if own_memory else placement.host
    streamed = _streamed(sizes, {*near}, dense)
    ring = _arena(
        ring_bytes_of([p.span_bytes for p in streamed], min(depth, len(streamed))) if streamed else 0
    )
    resident = {i: sizes.blocks[i].whole for i in (*placement.device, *placement.host)}
    decoded = [*(resident[i] for i in near), *streamed, *(layer.expert for layer in sizes.experts)]
    here = Memory(
        ring=ring,
        resident=_arena(sum(resident[i].span_bytes for i in near)),
        experts=_arena(slots * max((layer.expert.span_bytes for layer in sizes.experts), default=0)),
        scratch=sum(_arena(max((getattr(p, use) for p in decoded), default=0)) for use in _SCRATCHES),
        dense=sizes.dense_bytes + sum(table.dense_bytes for table in sizes.tables if table.name in dense),
    )
    if not own_memory:
        return here, None
    return here, Memory(ring, _arena(sum(resident[i].span_bytes for i in placement.host)), 0, 0, 0)


def _streamed(sizes: ModelSizes, resident: set[int], dense: frozenset[str]) -> list[Piece]:
    """What goes through the ring, in the order of use."""
    pieces = [p for i, block in enumerate(sizes.blocks) if i not in resident for p in block.streamed]
    return pieces + [p for table in sizes.tables if table.name not in dense for p in table.tiles]


def _arena(nbytes: int) -> int:
    return round_up(nbytes, HUGE_PAGE_BYTES)


def predict(sizes: ModelSizes, decision: Decision, rates: Rates, *, depth: int) -> Plan:
    """Bytes and seconds of one token, after a first one has filled the ring and warmed the experts."""
    experts = [_expert_time(layer, hits, rates, depth=depth) for layer, hits in _hits(sizes, decision)]
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


def _expert_time(layer: ExpertSize, hits: float, rates: Rates, *, depth: int) -> Timing:
    """Of one layer's experts, which are asked for when the router has chosen.

    If the first is missing its read hides behind nothing; that of any other one hides behind the products
    since the one that was missing before it.
    """
    extra, missed = rates.overheads, 1.0 - hits
    missing = layer.routed * missed
    read_s = layer.expert.nbytes / (rates.disk_bytes_per_s * extra.expert_disk_share)
    product_s = rates.work_s(layer.expert.nbytes, layer.expert.kinds) + extra.expert_s
    hidden_s = (missing - missed) * min(read_s, product_s / missed) if depth and missed else 0.0
    return Timing(
        read_s=missing * read_s,
        copy_s=missing * layer.expert.nbytes / rates.copy_bytes_per_s,
        work_s=layer.routed * product_s + missing * extra.expert_read_s,
        exposed_s=missing * read_s - hidden_s,
    )


def _traffic(sizes: ModelSizes, decision: Decision) -> Traffic:
    placement, dense = decision.placement, decision.dense_tables
    hit, missed = 0.0, 0.0
    for layer, hits in _hits(sizes, decision):
        hit += layer.routed * hits * layer.expert.nbytes
        missed += layer.routed * (1.0 - hits) * layer.expert.nbytes
    tables = [table for table in sizes.tables if table.name not in dense]
    rows = sum(table.row_bytes for table in tables)
    tiles = sum(piece.nbytes for table in tables for piece in table.tiles)
    blocks = {
        tier: sum(sizes.blocks[i].whole.nbytes for i in getattr(placement, tier))
        for tier in ("device", "host")
    }
    blocks["host" if decision.host_memory is None else "device"] += round(hit)
    streamed = sum(p.nbytes for i in placement.disk for p in sizes.blocks[i].streamed)
    return Traffic(**blocks, disk=streamed + tiles + rows + round(missed))

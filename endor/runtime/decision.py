"""What goes where, and the memory that takes: a pure function of sizes and budgets.

On a CPU weights are used in host memory, and what is streamed comes from disk into a ring there. A device
with its own memory has its own ring, and three tiers: blocks on the device, blocks in (pinned) host memory
that are copied for each token, blocks on disk that are read into pinned memory first. Experts, too, are kept
in what is left of host memory, and copied to a slot of the device from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from endor.loaders.feed import feed_bytes_of
from endor.loaders.plan import ring_bytes_of, round_up
from endor.loaders.staging import HUGE_PAGE_BYTES
from endor.runtime.placement import Placement, plan_placement, plan_tiers
from endor.runtime.sizes import Budgets, ExpertSize, ModelSizes, Piece, TableSize

__all__ = ["Decision", "Memory", "budget_used", "decide", "expert_buffers", "host_budget_used"]

_SCRATCHES: Final = ("stored_bytes", "cast_bytes")


@dataclass(frozen=True)
class Memory:
    """Bytes by part, as the runtime takes them; `total` is the peak, without libraries.

    Attributes:
        ring: of what is streamed; of the host of a device, what is read from disk on its way to that.
        resident: blocks that stay.
        experts: their slots; of the host of a device, those that stay there, and buffers to read others.
        scratch: of what is decoded at a time.
        dense: parameters that are not compressed.
        cache: keys and values of the context; counted where `decide` was told of one, on a device.
        activations: of a prompt as long as that; the same.
    """

    ring: int
    resident: int
    experts: int
    scratch: int
    dense: int
    cache: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        weights = self.ring + self.resident + self.experts + self.scratch + self.dense
        return weights + self.cache + self.activations


@dataclass(frozen=True)
class Decision:
    """What goes where.

    Attributes:
        placement: of the blocks.
        dense_tables: names of those that become dense parameters.
        expert_slots: experts that are in memory at a time.
        memory: what that takes where weights are used.
        host_memory: what it takes of the host's, pinned, if that is a device with its own memory.
        host_experts: of each layer's experts the first so many stay in the host's memory, and are copied from
            there; empty where they are used there.
    """

    placement: Placement
    dense_tables: frozenset[str]
    expert_slots: int
    memory: Memory
    host_memory: Memory | None = None
    host_experts: tuple[int, ...] = ()


def decide(sizes: ModelSizes, budgets: Budgets, *, depth: int, context_tokens: int = 0) -> Decision:
    """Share out the memory: blocks first, since every token needs all of each; then tables, then experts.

    What blocks leave of the host's memory beside a device holds experts.

    On a device a table that is a head too comes before the blocks: every token needs all of it as well, and
    the rest of it would come from disk, where blocks have the host's memory.

    Args:
        depth: units that are read ahead.
        context_tokens: that a device has to have room for; a CPU's memory is not planned for them.

    Raises PlanError for a budget that holds nothing and is not 0; the message says what would do.
    """
    own_memory = budgets.device_bytes is not None
    left = budgets.host_bytes if budgets.device_bytes is None else budgets.device_bytes
    heads, left = _dense_tables([t for t in sizes.tables if t.tiles] if own_memory else [], left)
    if own_memory:
        smallest = min((block.whole.nbytes for block in sizes.blocks), default=0)
        budgets = replace(budgets, device_bytes=0 if heads and left < smallest else left)
    placement = _placed(sizes, budgets, depth=depth)
    near = placement.device if own_memory else placement.host
    left -= sum(sizes.blocks[i].whole.nbytes for i in near)
    others, left = _dense_tables([t for t in sizes.tables if t.name not in heads], left)
    dense = heads | others
    slots = _expert_slots(sizes.experts, left, depth=depth)
    memory = _memory(sizes, placement, dense, slots, own_memory, depth=depth)
    if not own_memory:
        return Decision(placement, dense, slots, memory)
    host_left = budgets.host_bytes - sum(sizes.blocks[i].whole.nbytes for i in placement.host)
    held = _host_experts(sizes.experts, host_left, slots)
    pinned = _pinned(sizes, placement, dense, slots, held, depth=depth)
    cache = sizes.cache_bytes_per_token * context_tokens
    activations = sizes.activation_bytes_per_token * context_tokens + sizes.logits_bytes
    memory = replace(memory, cache=cache, activations=activations)
    return Decision(placement, dense, slots, memory, pinned, held)


def budget_used(sizes: ModelSizes, decision: Decision, budget: int) -> int:
    """Of the budget for where weights are used, the bytes that the decision fills."""
    near = decision.placement.host if decision.host_memory is None else decision.placement.device
    used = sum(sizes.blocks[i].whole.nbytes for i in near)
    used += sum(table.nbytes for table in sizes.tables if table.name in decision.dense_tables)
    slot_bytes = _slot_bytes(sizes.experts)
    slots = min(decision.expert_slots, (budget - used) // slot_bytes) if slot_bytes else 0
    return used + slots * slot_bytes


def host_budget_used(sizes: ModelSizes, decision: Decision) -> int:
    """Of the budget for host memory beside a device, the bytes that the decision fills."""
    blocks = sum(sizes.blocks[i].whole.nbytes for i in decision.placement.host)
    return blocks + _held_bytes(sizes.experts, decision.host_experts)


def _streamed(
    sizes: ModelSizes, placement: Placement, dense: frozenset[str], *, own_memory: bool
) -> Iterator[tuple[Piece, bool]]:
    """What goes through the ring, in the order of use, and whether it is read from disk for that.

    A head is read from disk in tiles; one that is in host memory is there whole, and is copied whole.
    """
    for i, block in enumerate(sizes.blocks):
        if i in placement.disk:
            yield from ((piece, True) for piece in block.streamed)
        elif own_memory and i in placement.host:
            yield block.whole, False
    for table in sizes.tables:
        if table.name not in dense:
            yield from ((piece, True) for piece in table.tiles)


def _placed(sizes: ModelSizes, budgets: Budgets, *, depth: int) -> Placement:
    names = [block.name for block in sizes.blocks]
    nbytes = [block.whole.nbytes for block in sizes.blocks]
    pieces = [[piece.nbytes for piece in block.streamed] for block in sizes.blocks]
    host = budgets.host_bytes
    if budgets.device_bytes is None:
        return plan_placement(names, nbytes, host_bytes=host, pieces=pieces, depth=depth)
    device = budgets.device_bytes
    return plan_tiers(names, nbytes, device_bytes=device, host_bytes=host, pieces=pieces, depth=depth)


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
    return max(2, depth + 1, min(sum(layer.count for layer in experts), left // _slot_bytes(experts)))


def _host_experts(layers: Sequence[ExpertSize], left: int, slots: int) -> tuple[int, ...]:
    """How many of each layer's stay in host memory: as many of each as of any other, as far as they fit.

    None where the device has slots for all of them: there each is read once.
    """
    held = [0] * len(layers)
    open_layers = [] if slots >= sum(layer.count for layer in layers) else list(range(len(layers)))
    while open_layers:
        for i in tuple(open_layers):
            span = layers[i].span_bytes(held[i]) if held[i] < layers[i].count else left + 1
            if span > left:
                open_layers.remove(i)
            else:
                held[i] += 1
                left -= span
    return tuple(held)


def _held_bytes(layers: Sequence[ExpertSize], held: Sequence[int]) -> int:
    return sum(layer.span_bytes(number) for layer, n in zip(layers, held, strict=True) for number in range(n))


def _slot_bytes(experts: Iterable[ExpertSize]) -> int:
    return max((layer.expert.span_bytes for layer in experts), default=0)


def _memory(
    sizes: ModelSizes,
    placement: Placement,
    dense: frozenset[str],
    slots: int,
    own_memory: bool,
    *,
    depth: int,
) -> Memory:
    """Where weights are used, without what a context needs."""
    near = [sizes.blocks[i].whole for i in (placement.device if own_memory else placement.host)]
    streamed = [piece for piece, _ in _streamed(sizes, placement, dense, own_memory=own_memory)]
    decoded = [*near, *streamed, *(layer.expert for layer in sizes.experts)]
    return Memory(
        ring=_ring(streamed, depth=depth),
        resident=_arena(sum(piece.span_bytes for piece in near)),
        experts=_arena(slots * _slot_bytes(sizes.experts)),
        scratch=_scratch(decoded, own_memory=own_memory),
        dense=sizes.dense_bytes + sum(table.dense_bytes for table in sizes.tables if table.name in dense),
    )


def _pinned(
    sizes: ModelSizes,
    placement: Placement,
    dense: frozenset[str],
    slots: int,
    held: Sequence[int],
    *,
    depth: int,
) -> Memory:
    """The host's: what stays there, and what is read from disk on its way to the device.

    The disk has a ring of its own, so that it goes on while blocks from memory are in turn.
    """
    streamed = _streamed(sizes, placement, dense, own_memory=True)
    from_disk = [piece.span_bytes for piece, is_read in streamed if is_read]
    buffers = expert_buffers(depth, slots) if sum(held) < sum(layer.count for layer in sizes.experts) else 0
    return Memory(
        ring=_arena(feed_bytes_of(from_disk, depth)) if from_disk else 0,
        resident=_arena(sum(sizes.blocks[i].whole.span_bytes for i in placement.host)),
        experts=_arena(buffers * _slot_bytes(sizes.experts)) + _arena(_held_bytes(sizes.experts, held)),
        scratch=0,
        dense=0,
    )


def expert_buffers(depth: int, slots: int) -> int:
    """Pinned buffers through which experts are read on their way to so many slots of a device."""
    return min(slots, max(2, depth + 1))


def _scratch(decoded: Sequence[Piece], *, own_memory: bool) -> int:
    """For the largest of them, as stored and cast; in host memory on huge pages."""
    largest = [max((getattr(piece, use) for piece in decoded), default=0) for use in _SCRATCHES]
    return sum(largest) if own_memory else sum(map(_arena, largest))


def _ring(streamed: Sequence[Piece], *, depth: int) -> int:
    if not streamed:
        return 0
    return _arena(ring_bytes_of([piece.span_bytes for piece in streamed], min(depth, len(streamed))))


def _arena(nbytes: int) -> int:
    return round_up(nbytes, HUGE_PAGE_BYTES)

"""The memory that a runtime holds: blocks where they are used, blocks in host memory, a ring for the rest.

On a CPU blocks that stay are used where they are. A device with its own memory has three tiers: blocks that
stay on it, blocks in pinned host memory, which are copied to a slot each time, and blocks on disk, which are
read first; so have experts, whose slots keep those that were used last. Everything is allocated here, once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from endor.loaders import (
    Accelerator,
    DiskFeed,
    Event,
    HeldUnits,
    LoadPlan,
    Pool,
    Prefetcher,
    Reader,
    SlotPool,
    Source,
    StagingPool,
    Unit,
    read_unit,
)
from endor.runtime.blocks import WeightBlock
from endor.runtime.decision import expert_buffers
from endor.runtime.experts import ExpertCache, ExpertKey
from endor.runtime.placement import Placement
from endor.runtime.slices import ExpertStacks, Table, parts_of
from endor.runtime.stats import StatsRecorder

__all__ = ["Tiers", "close_anywhere", "close_parts"]


class Tiers:
    """Reads what stays, and starts the ring.

    Args:
        blocks: in execution order.
        placement: of them.
        heads: read tile by tile.
        experts: of Mixture-of-Experts layers, by layer.
        depth: units that are read ahead.
        reader: its owner's to close.
        accelerator: of a device with its own memory; None for a CPU.
        verify: `always`, `first` or `never`.
        expert_slots: how many experts are in memory at a time, where they are used.
        host_experts: of each layer's experts, beside a device, so many stay in host memory; empty for none.
        stats: where experts are counted.

    Raises what reading and allocating raises; then nothing is held.

    Attributes:
        unit_of: index of a streamed block's unit, by name.
        first_tile: index of the first unit of a head, by name.
        held: blocks in host memory that are copied to the device; None on a CPU, and if there are none.
    """

    def __init__(
        self,
        blocks: Sequence[WeightBlock],
        placement: Placement,
        heads: Sequence[Table],
        experts: Sequence[ExpertStacks],
        *,
        depth: int,
        reader: Reader,
        accelerator: Accelerator | None,
        verify: str,
        expert_slots: int,
        host_experts: Sequence[int] = (),
        stats: StatsRecorder,
    ) -> None:
        self._process = os.getpid()
        self._reader = reader
        self._stats = stats
        self._accelerator = accelerator
        self._verify_when = verify
        self._verified: set[int] = set()
        self.unit_of: dict[str, int] = {}
        self.first_tile: dict[str, int] = {}
        self._units: list[tuple[Unit, WeightBlock | None]] = []
        self.resident: Pool[Any] | None = None
        self.held: HeldUnits | None = None
        self.prefetcher: Prefetcher | None = None
        self.experts: ExpertCache | None = None
        self._expert_pool: Pool[Any] | None = None
        self._held_experts: HeldUnits | None = None
        self._feed: DiskFeed | None = None
        self._staging: StagingPool | None = None
        near = placement.device if accelerator is not None else placement.host
        far = placement.host if accelerator is not None else ()
        try:
            self.resident = self._read_resident([blocks[i] for i in near])
            self.held = self._read_held([blocks[i] for i in far])
            self._number([block for i, block in enumerate(blocks) if i not in near], heads)
            self.prefetcher = self._start_ring(depth)
            held = self._read_experts(experts, host_experts)
            self.experts = self._start_experts(experts, expert_slots, held, depth=depth)
        except BaseException:
            self.close()
            raise

    @property
    def ring_bytes(self) -> int:
        """Memory of the ring and of experts, where they are used."""
        experts = self.experts.capacity_bytes if self.experts else 0
        return (self.prefetcher.ring_bytes if self.prefetcher else 0) + experts

    @property
    def resident_bytes(self) -> int:
        """Memory that holds resident blocks, where they are used."""
        return self.resident.capacity_bytes if self.resident else 0

    @property
    def pinned_bytes(self) -> int:
        """Host memory for what is used on a device: blocks and experts that stay there, and what is read from
        disk."""
        staging = self._staging.capacity_bytes if self._staging else 0
        parts = (self._feed, self.held, self._held_experts)
        return staging + sum(part.nbytes for part in parts if part is not None)

    @property
    def streamed_bytes(self) -> int:
        """Compressed bytes that one pass brings through the ring; experts come on top."""
        return sum(unit.total_bytes for unit, _ in self._units)

    def is_held(self, unit: Unit) -> bool:
        """Whether the unit is in host memory, and only copied."""
        return self.held is not None and self.held.find(unit) is not None

    def close(self) -> None:
        """End threads and free memory. Idempotent. In a forked process there is nothing to end."""
        if os.getpid() != self._process:
            return
        # Slots first: closing them waits for the device, which may still copy from host memory.
        slots = (self.prefetcher, self.experts, self._expert_pool, self.resident)
        parts = (*slots, self._feed, self._staging, self.held, self._held_experts)
        close_parts([part for part in parts if part is not None])

    # Setting up.

    def _read_resident(self, blocks: Sequence[WeightBlock]) -> Pool[Any] | None:
        """Read blocks into one arena, where they are used in place."""
        if not blocks:
            return None
        units = [block.unit() for block in blocks]
        nbytes = sum(unit.span_bytes for unit in units)
        if self._accelerator is None:
            pool = StagingPool(nbytes)
            return self._filled(pool, self._read_in_place, blocks, units)
        slots = SlotPool(nbytes, self._accelerator)
        return self._filled(slots, self._read_and_copy, blocks, units)

    def _filled(
        self,
        pool: Pool[Any],
        fill: Callable[[Pool[Any], Sequence[WeightBlock], Sequence[Unit]], None],
        blocks: Sequence[WeightBlock],
        units: Sequence[Unit],
    ) -> Pool[Any]:
        """The pool with the blocks in it; closed if that fails."""
        try:
            fill(pool, blocks, units)
        except BaseException:
            pool.close()
            raise
        return pool

    def _read_in_place(self, pool: Pool[Any], blocks: Sequence[WeightBlock], units: Sequence[Unit]) -> None:
        for block, unit in zip(blocks, units, strict=True):
            buffer = pool.allocate(unit.span_bytes)
            read_unit(self._reader, unit, buffer.memory)
            parts = parts_of(unit, buffer.tensor())
            self._compare(block, parts)
            block.attach(parts)

    def _read_and_copy(self, pool: Pool[Any], blocks: Sequence[WeightBlock], units: Sequence[Unit]) -> None:
        """One block is read while the one before it is copied to the device."""
        assert self._accelerator is not None
        largest = max(unit.span_bytes for unit in units)
        with StagingPool(2 * largest, pin=self._accelerator.pin) as staging:
            turns = [staging.allocate(largest) for _ in range(2)]
            copied: list[Event | None] = [None, None]
            try:
                for number, (block, unit) in enumerate(zip(blocks, units, strict=True)):
                    before, turn = copied[number % 2], turns[number % 2]
                    if before is not None:
                        before.wait()
                    read_unit(self._reader, unit, turn.memory[: unit.span_bytes])
                    self._compare(block, parts_of(unit, turn.tensor()))
                    slot = pool.allocate(unit.span_bytes).tensor(0, unit.span_bytes)
                    pair = (slot, turn.tensor(0, unit.span_bytes))
                    copied[number % 2] = self._accelerator.copy([pair], after=()).ended
                    block.attach(parts_of(unit, slot))
            finally:  # the staging memory goes
                for event in copied:
                    if event is not None:
                        event.wait()

    def _read_held(self, blocks: Sequence[WeightBlock]) -> HeldUnits | None:
        if not blocks:
            return None
        assert self._accelerator is not None
        units = [block.unit() for block in blocks]

        def check(index: int, memory: memoryview) -> None:
            self._compare(blocks[index], parts_of(units[index], torch.frombuffer(memory, dtype=torch.uint8)))

        return HeldUnits(units, self._reader, check=check, pin=self._accelerator.pin)

    def _number(self, streamed: Sequence[WeightBlock], heads: Sequence[Table]) -> None:
        """Put what goes through the ring into the order of use."""
        for block in (block for block in streamed if not block.table):
            self.unit_of[block.name] = len(self._units)
            self._units.append((block.unit(), block))
        for head in heads:
            self.first_tile[head.name] = len(self._units)
            self._units += [(unit, None) for unit in head.units()]

    def _start_ring(self, depth: int) -> Prefetcher | None:
        if not self._units:
            return None
        units = tuple(unit for unit, _ in self._units)
        # Reading further ahead than once around would hold blocks twice.
        plan = LoadPlan(units, min(depth, len(units)))
        if self._accelerator is None:
            return Prefetcher(plan, self._reader, on_read=self._verify)
        pool = SlotPool(plan.ring_bytes, self._accelerator, reader=self._reader)
        try:
            if pool.into_slots is None:
                self._feed = self._start_feed(depth)
            return Prefetcher(plan, self._reader, pool, on_read=self._verify, source_of=self._source_of)
        except BaseException:
            pool.close()
            raise

    def _start_feed(self, depth: int) -> DiskFeed | None:
        """The ring of what comes from disk on its way to a device."""
        numbers = [number for number, (unit, _) in enumerate(self._units) if not self.is_held(unit)]
        if not numbers:
            return None
        assert self._accelerator is not None
        return DiskFeed(
            [self._units[number][0] for number in numbers],
            self._reader,
            depth=depth,
            accelerator=self._accelerator,
            on_read=lambda index, memory: self._verify(numbers[index], memory),
        )

    def _source_of(self, unit: Unit) -> Source | None:
        return self.held if self.is_held(unit) else self._feed

    def _read_experts(
        self, experts: Sequence[ExpertStacks], counts: Sequence[int]
    ) -> Mapping[ExpertKey, torch.Tensor]:
        """Read the experts that stay in host memory, the first ones of each layer.

        They were compared with their checksums when the model was placed: a single one has none. Those of a
        layer are read as one unit, many short reads at a time; it takes as much memory as theirs do.
        """
        each = {
            layer: [experts[layer].expert(number).unit for number in range(count)]
            for layer, count in enumerate(counts)
            if count
        }
        if not each:
            return {}
        assert self._accelerator is not None
        layers = {layer: _joined(units) for layer, units in each.items()}
        self._held_experts = HeldUnits(list(layers.values()), self._reader, pin=self._accelerator.pin)
        held: dict[ExpertKey, torch.Tensor] = {}
        for layer, units in each.items():
            memory = self._held_experts.find(layers[layer])
            assert memory is not None
            parts = memory.split([unit.span_bytes for unit in units])
            held |= {(layer, number): part for number, part in enumerate(parts)}
        return held

    def _start_experts(
        self,
        experts: Sequence[ExpertStacks],
        slots: int,
        held: Mapping[ExpertKey, torch.Tensor],
        *,
        depth: int,
    ) -> ExpertCache | None:
        if not experts:
            return None
        slot_bytes = max(stacks.expert_bytes for stacks in experts)
        if self._accelerator is not None:
            pool = SlotPool(slots * slot_bytes, self._accelerator, reader=self._reader)
            self._expert_pool = pool
            if pool.into_slots is None and len(held) < sum(stacks.count for stacks in experts):
                nbytes = expert_buffers(depth, slots) * slot_bytes
                self._staging = StagingPool(nbytes, pin=self._accelerator.pin)
        return ExpertCache(
            self._reader,
            lambda key: experts[key[0]].expert(key[1]),
            self._expert_pool,
            staging=self._staging,
            held=held,
            slot_bytes=slot_bytes,
            slots=slots,
            ahead=depth > 0,
            stats=self._stats,
        )

    def _compare(self, block: WeightBlock, parts: Sequence[torch.Tensor]) -> None:
        if self._verify_when != "never":
            block.verify(parts)

    def _verify(self, unit_index: int, memory: memoryview) -> None:
        """Compare a block with its checksums when it is read (in the prefetcher's thread)."""
        unit, block = self._units[unit_index]
        if block is None or self._verify_when == "never" or unit_index in self._verified:
            return
        block.verify(parts_of(unit, torch.frombuffer(memory, dtype=torch.uint8)))
        if self._verify_when == "first":
            self._verified.add(unit_index)


def _joined(units: Sequence[Unit]) -> Unit:
    """One unit of all reads, in which each of `units` takes its own span, one after another."""
    return Unit(f"{units[0].name} and {len(units) - 1} more", tuple(op for unit in units for op in unit.ops))


def close_anywhere(parts: Sequence[Any]) -> None:
    """`close_parts`, for a finalizer, which the collector runs in whatever thread it is needed in.

    In one of ours it would wait for that thread, or for a lock that the thread holds.
    """
    if threading.current_thread().name.startswith("endor-"):
        threading.Thread(target=close_parts, args=(parts,), name="closing").start()
    else:
        close_parts(parts)


def close_parts(parts: Sequence[Any]) -> None:
    """Close what holds threads, files and memory, all of it even when one fails; then raise the first
    error."""
    errors: list[Exception] = []
    for part in parts:
        try:
            part.close()
        except Exception as error:  # noqa: BLE001 - a device that failed fails again, and the rest must go
            errors.append(error)
    if errors:
        raise errors[0]

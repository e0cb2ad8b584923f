"""The experts that are in memory: those the router chose are read one by one, the ones used last stay.

A layer announces the experts it is about to use (`want`) and then takes one after another (`get`): while one
is computed with, the next ones are read into slots that no announced expert has, least recently used first.
On a device those that are held in host memory are copied to their slots from there.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from endor.errors import LoadError
from endor.formats.packed import PackedTensor
from endor.kernels.tensor import BitmapTensor
from endor.loaders import Buffer, Event, Pool, Reader, SlotPool, StagingPool, Ticket, Unit
from endor.loaders.reader import drain
from endor.runtime.stats import StatsRecorder

__all__ = ["Expert", "ExpertCache", "ExpertKey"]

ExpertKey = tuple[int, int]
"""Index of the layer's experts, number of the expert in it."""


@dataclass(frozen=True)
class Expert:
    """What has to be read for one expert, and how its weights come out of that."""

    unit: Unit
    unpack: Callable[[Sequence[torch.Tensor]], Mapping[str, PackedTensor]]
    """Weights by name from the bytes of the unit's reads."""


@dataclass
class _Slot:
    buffer: Buffer
    staging: Buffer | None = None  # what it is read to on its way to a device
    is_held: bool = False
    expert: Expert | None = None
    tickets: list[Ticket] = field(default_factory=list)
    weights: Mapping[str, PackedTensor] | None = None
    lent: list[weakref.ref[BitmapTensor]] = field(default_factory=list)


class ExpertCache:
    """Slots of equal size for experts; used by one thread at a time.

    Args:
        reader: its owner's to close.
        expert_of: by key; called once per read.
        pool: of the memory that experts are used in, of `slots * slot_bytes`; closed with the cache. Host
            memory by default.
        slot_bytes: of the largest expert, in whole pages.
        slots: at least two, so that one is read while another is used.
        ahead: read what is announced before it is asked for.
        staging: pinned host memory, of at least two experts, that experts are read to and copied to a
            device from; its owner's to close. None where they are used where they were read to, or if all
            are held.
        held: units of experts in pinned host memory, from which they are copied to a device; whose memory it
            is must keep it until the cache is closed.
        stats: where bytes and waiting are counted.
    """

    def __init__(
        self,
        reader: Reader,
        expert_of: Callable[[ExpertKey], Expert],
        pool: Pool[Any] | None = None,
        *,
        slot_bytes: int,
        slots: int,
        ahead: bool = True,
        staging: StagingPool | None = None,
        held: Mapping[ExpertKey, torch.Tensor] | None = None,
        stats: StatsRecorder,
    ) -> None:
        self._reader = reader
        self._staging = staging
        self._held = dict(held or {})
        self._copying: deque[tuple[Event, Buffer]] = deque()
        self._on_device = isinstance(pool, SlotPool)
        self._expert_of = expert_of
        self._ahead = ahead
        self._stats = stats
        self._pool: Pool[Any] = StagingPool(slots * slot_bytes) if pool is None else pool
        self._slot_bytes = slot_bytes
        self._all = [_Slot(self._pool.allocate(slot_bytes)) for _ in range(slots)]
        self._free = list(self._all)
        self._taken: OrderedDict[ExpertKey, _Slot] = OrderedDict()
        self._wanted: deque[ExpertKey] = deque()
        self._in_use: ExpertKey | None = None

    @property
    def slots(self) -> int:
        """Experts that have room."""
        return len(self._free) + len(self._taken)

    @property
    def held(self) -> int:
        """Experts that are in host memory, beside a device's slots."""
        return len(self._held)

    @property
    def capacity_bytes(self) -> int:
        return self._pool.capacity_bytes

    def want(self, keys: Sequence[ExpertKey]) -> None:
        """Announce what `get` will ask for next, in this order, and begin to read it."""
        if self.slots != len(self._all):  # Ctrl-C came between two of our steps
            taken = {id(slot) for slot in self._taken.values()}
            self._free = [slot for slot in self._all if id(slot) not in taken]
        if self._staging is not None:  # the same
            held = [slot.staging for slot in self._taken.values() if slot.staging is not None]
            self._staging.reclaim(keep=[*held, *(buffer for _, buffer in self._copying)])
        self._wanted = deque(keys)
        self._in_use = None
        self._fill()

    def get(self, key: ExpertKey) -> Mapping[str, PackedTensor]:
        """The weights of an expert, valid until the next call of `get` or `want`.

        Raises LoadError when they cannot be read; asking again tries again.
        """
        if key in self._wanted:
            while self._wanted.popleft() != key:
                pass
        again, self._in_use = key == self._in_use, key  # another of its weights
        slot = self._taken.get(key) or self._launch(key) or self._launch_instead(key)
        self._taken.move_to_end(key)
        self._fill()
        return self._finish(key, slot, again=again)

    def lend(self, key: ExpertKey, part: BitmapTensor) -> None:
        """Detach `part`, whose sections lie in the expert's slot, when the slot becomes another expert's."""
        slot = self._taken[key]
        slot.lent = [ref for ref in slot.lent if ref() is not None]
        slot.lent.append(weakref.ref(part))

    def close(self) -> None:
        """End all reads and free the memory. Idempotent."""
        for slot in self._taken.values():
            drain(self._reader, slot.tickets)
        while self._copying:
            self._end_oldest_copy()
        self._taken.clear()
        self._free.clear()
        self._pool.close()
        self._held.clear()

    def _finish(self, key: ExpertKey, slot: _Slot, *, again: bool) -> Mapping[str, PackedTensor]:
        assert slot.expert is not None
        unit = slot.expert.unit
        if slot.weights is not None:
            slot.buffer.arrive()  # perhaps in another stream than the first time
            if not again:
                self._count(unit)
            return slot.weights
        with self._stats.waiting(unit.name):
            try:
                for ticket in slot.tickets:
                    self._stats.on_demand_read_s += self._reader.wait(ticket).read_s
            except LoadError:
                self._abandon(key)
                raise
            self._copy(slot, unit)
        self._stats.copied(unit.name, slot.buffer.copied)
        if slot.is_held:
            self._stats.host_bytes += unit.total_bytes
        else:
            self._stats.disk_bytes += unit.total_bytes
        slot.tickets = []
        places = zip(slot.buffer.offsets_of(unit), unit.ops, strict=True)
        slot.weights = slot.expert.unpack([slot.buffer.tensor(at, op.length_bytes) for at, op in places])
        return slot.weights

    def _copy(self, slot: _Slot, unit: Unit) -> None:
        """Copy an expert that was read to the device, if that is where it is used; held ones are on their
        way."""
        if slot.staging is None:
            slot.buffer.arrive()
            return
        slot.buffer.land(unit, slot.staging.tensor(0, unit.span_bytes))
        slot.buffer.arrive()
        assert slot.buffer.copied is not None
        self._copying.append((slot.buffer.copied.ended, slot.staging))
        slot.staging = None

    def _count(self, unit: Unit) -> None:
        """Count an expert that was in memory already."""
        if self._on_device:
            self._stats.device_bytes += unit.total_bytes
        else:
            self._stats.host_bytes += unit.total_bytes

    def _fill(self) -> None:
        for key in self._wanted if self._ahead else ():
            if key in self._taken:
                self._taken.move_to_end(key)
            elif self._launch(key) is None:
                break

    def _launch(self, key: ExpertKey) -> _Slot | None:
        """Begin to read an expert, or to copy one that is held, if there is room for it."""
        held = self._held.get(key)
        is_staged = held is None and self._staging is not None
        staging = self._room_to_read() if is_staged else None
        slot = self._empty_slot() if staging is not None or not is_staged else None
        if slot is None:
            if staging is not None:
                staging.release()
            return None
        self._taken[key] = slot
        slot.staging, slot.is_held = staging, held is not None
        try:
            slot.expert = self._expert_of(key)
            if held is None:
                self._read(slot, slot.expert.unit)
            else:
                slot.buffer.land(slot.expert.unit, held)
        except BaseException:
            self._abandon(key)
            raise
        return slot

    def _read(self, slot: _Slot, unit: Unit) -> None:
        buffer = slot.buffer if slot.staging is None else slot.staging
        buffer.wait_writable()
        for op, start in zip(unit.ops, unit.op_offsets, strict=True):
            slot.tickets.append(buffer.submit(self._reader, op, start))

    def _room_to_read(self) -> Buffer | None:
        """Pinned memory for an expert on its way; None where all of it is taken, or none is needed."""
        if self._staging is None:
            return None
        while self._copying and self._copying[0][0].is_done:
            self._end_oldest_copy()
        buffer = self._staging.try_allocate(self._slot_bytes)
        if buffer is None and self._copying:
            self._end_oldest_copy()
            buffer = self._staging.try_allocate(self._slot_bytes)
        return buffer

    def _end_oldest_copy(self) -> None:
        ended, staging = self._copying.popleft()
        ended.wait()
        staging.release()

    def _launch_instead(self, key: ExpertKey) -> _Slot:
        """When announced experts have all room: the one that is announced for last gives way."""
        candidates = [k for k in (*reversed(self._wanted), *self._taken) if k in self._taken and k != key]
        if (
            self._staging is not None
            and key not in self._held
            and self._staging.lent_bytes + self._slot_bytes > self._staging.capacity_bytes
        ):
            candidates = [k for k in candidates if self._taken[k].staging is not None] or candidates
        self._abandon(candidates[0])
        slot = self._launch(key)
        assert slot is not None
        return slot

    def _empty_slot(self) -> _Slot | None:
        """A free slot, or that of the expert not used for longest that nobody announced."""
        if self._free:
            return self._free.pop()
        kept = {self._in_use, *self._wanted}
        oldest = next((key for key in self._taken if key not in kept), None)
        if oldest is None:
            return None
        self._abandon(oldest)
        return self._free.pop()

    def _abandon(self, key: ExpertKey) -> None:
        """Free the slot of an expert, whatever becomes of its reads."""
        slot = self._taken.pop(key)
        drain(self._reader, slot.tickets)
        slot.tickets, slot.weights, slot.expert = [], None, None
        if slot.staging is not None:
            slot.staging.release()
            slot.staging = None
        slot.buffer.reuse()
        while slot.lent:
            part = slot.lent.pop()()
            if part is not None:
                part.detach_sections()
        self._free.append(slot)

"""Streams the weights of any module tree from the files they lie in, ahead of the module that needs them.

The unit of use is a group: what one module needs during its forward. The unit of reading is a block: groups
used one after the other, some tens of megabytes together, so that a read is long enough for the disk. The
order of use is that of the groups until a forward has shown another one; it is planned anew when it changes.

Before each forward one of two ways from file to weight is chosen:

- *ring*: blocks are read ahead into staging memory, while earlier ones compute. Around the page cache if what
  went through it last time did not stay there, because then the model is larger than memory.
- *mapped*: when the page cache has all blocks, their pages are used in place. Nothing is copied.

Some groups go their own way: one of which single rows are used is always mapped, and only those rows are
read; small ones (norms, biases) are read once and stay, since a request for 4 KB costs as much as one for
256 KB.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch

from endor.errors import PlanError
from endor.kernels.scratch import ThreadScratch
from endor.loaders import (
    DirectMode,
    Lease,
    LoadPlan,
    PosixReader,
    Prefetcher,
    PrefetchStats,
    Reader,
    ReadOp,
    StagingPool,
    Unit,
    accelerator_for,
    available_bytes,
)
from endor.runtime.filemap import MappedFile
from endor.runtime.stored import StoredTensor

__all__ = ["OffloadStats", "WeightGroup", "WeightStream"]

BLOCK_BYTES: Final = 16 << 20
"""A block is at least this long where groups allow it; 32 MiB were no faster and took 88 MB more of staging
memory (1.1 B Llama, every token from disk)."""
DEPTH: Final = 2
_GAP_BYTES: Final = 64 << 10
"""Ranges of a file that are nearer than this are read as one: 0.03 ms of reading against a request."""
_ALL_CACHED: Final = 0.99
_SAMPLED: Final = 8
_STAYED_CACHED: Final = 0.5
_FITS_MEMORY: Final = 1.25
_RING_SHARE: Final = 0.5
_STAGING_SLACK: Final = 1.05
_SMALL_BYTES: Final = 64 << 10
_ALL_SMALL_BYTES: Final = 32 << 20
"""Groups up to the first size stay in memory, up to the second altogether."""
_MANY_ROWS: Final = 16
"""From a 16th of all rows on, reading a table from end to end is faster than a page for each row."""


@dataclass(frozen=True)
class WeightGroup:
    """What one module needs during its forward.

    Attributes:
        name: of the module, for messages and statistics.
        tensors: by the name that the module's owner gives them.
        by_rows: whether a forward uses single rows only, as an embedding does.
        ahead: whether it may be read ahead; not for a module that holds its weights while others run.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    by_rows: bool = False
    ahead: bool = True

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())


@dataclass(frozen=True)
class OffloadStats:
    """Totals since the stream was made; subtract two of them for what lies between.

    Attributes:
        forwards: of the whole model.
        read_bytes: read into the ring and used.
        discarded_bytes: read ahead and given up, because something else was asked for.
        mapped_bytes: of groups whose pages were used in place, in full even where only rows were touched.
        stall_s: time in which the model waited for bytes.
        read_s: time in which the disk was busy.
        ring_bytes: staging memory held now.
        plans: how often the order was planned.
    """

    forwards: int = 0
    read_bytes: int = 0
    discarded_bytes: int = 0
    mapped_bytes: int = 0
    stall_s: float = 0.0
    read_s: float = 0.0
    ring_bytes: int = 0
    plans: int = 0


_Range = tuple[Path, int, int]


@dataclass(frozen=True)
class _Block:
    """Groups that are read together, in as few reads as their places in the files allow."""

    uses: tuple[int, ...]
    """The groups in order of use; one may be used several times."""
    ops: tuple[ReadOp, ...]
    places: Mapping[_Range, tuple[int, int]]
    """Which read has a range, and how far behind its beginning."""


@dataclass
class _Hold:
    """A block in memory: its lease, how many of its groups are in use now, and how many uses there were."""

    block: _Block
    lease: Lease
    users: int = 0
    uses: int = 0


@dataclass
class _Parts:
    """What has threads, descriptors and memory: never copied, never pickled, made again where it is
    missing."""

    process: int = field(default_factory=os.getpid)
    files: dict[Path, MappedFile] = field(default_factory=dict)
    views: dict[_Range, torch.Tensor] = field(default_factory=dict)
    reader: Reader | None = None
    prefetcher: Prefetcher | None = None
    holds: list[_Hold] = field(default_factory=list)
    lent: dict[int, _Hold] = field(default_factory=dict)
    small: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def stop_ring(self) -> None:
        """Release every lease, end the threads, free the staging memory."""
        for hold in self.holds:
            hold.lease.release()
        self.holds.clear()
        self.lent.clear()
        prefetcher, self.prefetcher = self.prefetcher, None
        reader, self.reader = self.reader, None
        for part in (prefetcher, reader):
            if part is not None:
                part.close()

    def close(self) -> None:
        if self.process == os.getpid():  # a forked child owns nothing of it
            self.stop_ring()
        self.views.clear()
        self.small.clear()
        for file in self.files.values():
            file.close()
        self.files.clear()


Mode = Literal["ring", "mapped"]


def _open_reader(direct: DirectMode) -> Reader:
    return PosixReader(direct=direct)


class WeightStream:
    """Brings the weights of groups into memory while they are needed. One thread at a time.

    Copies and pickles as a value: the copy opens the files again when it is first used.

    Args:
        groups: in the order in which they are likely to be used.
        depth: blocks that are read ahead of the one in use; 0 reads each when it is needed.
        block_bytes: what groups are gathered to.
        small_stay: whether small groups are kept in memory.
        open_reader: makes the reader, given whether it may go around the page cache.
        device: that weights are copied to, if it has memory of its own: staging memory is then pinned for it.
    """

    def __init__(
        self,
        groups: Sequence[WeightGroup],
        *,
        depth: int = DEPTH,
        block_bytes: int = BLOCK_BYTES,
        small_stay: bool = True,
        open_reader: Callable[[DirectMode], Reader] = _open_reader,
        device: torch.device | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self._device = device
        self._depth = depth
        self._block_bytes = block_bytes
        self._open_reader = open_reader
        self._small = _small_groups(self.groups) if small_stay else frozenset()
        self._ahead = frozenset(
            index
            for index, group in enumerate(self.groups)
            if group.ahead and not group.by_rows and index not in self._small
        )
        self._shared = _shared_ranges([self.groups[index] for index in sorted(self._ahead)])
        self._order = tuple(sorted(self._ahead))
        self._blocks = tuple(_gather(self.groups, self._order, self._shared, block_bytes))
        self._ops = tuple(op for block in self._blocks for op in block.ops)
        self._scratch = ThreadScratch()
        self._start()

    def _start(self) -> None:
        """Everything that belongs to this object in this process."""
        self._parts = _Parts()
        self._finalizer = weakref.finalize(self, self._parts.close)
        self._mode: Mode | None = None
        self._direct = False
        self._cursor = 0
        self._observed: list[int] = []
        self._last_observed: tuple[int, ...] = ()
        self._forwards = 0
        self._plans = 0
        self._mapped_bytes = 0
        self._finished = PrefetchStats()

    # What its owner calls.

    @property
    def mode(self) -> Mode | None:
        """How the current or last forward got its blocks."""
        return self._mode

    @property
    def streamed_bytes(self) -> int:
        """What a forward that uses every block once reads."""
        return sum(op.length_bytes for op in self._ops)

    def begin_forward(self) -> None:
        """Before the model's forward: choose how its blocks will come. Forgets what an earlier one held."""
        self._check_process()
        self._observed = []
        self._cursor = 0
        self._release_all()
        for file in self._parts.files.values():
            file.check_unchanged()
        self._choose_mode()

    def end_forward(self) -> None:
        """After a forward that came to its end: learn the order it used."""
        self._release_all()
        observed = tuple(self._observed)
        if observed and observed != self._order and (not self._forwards or observed == self._last_observed):
            self._order = observed
            self._blocks = tuple(_gather(self.groups, observed, self._shared, self._block_bytes))
            self._stop_ring()
        self._last_observed = observed
        self._forwards += 1

    def abort_forward(self) -> None:
        """After a forward that raised: nothing stays in use."""
        self._observed = []
        self._release_all()

    def load(self, index: int, *, keep: bool = False) -> dict[str, torch.Tensor]:
        """The tensors of a group on the CPU, to be given back with `done`.

        Args:
            index: of the group.
            keep: whether they are used after `done` as well, as autograd does; they are copies then.

        Raises LoadError when they cannot be read.
        """
        self._check_process()
        if self._mode is None:
            self._choose_mode()
        # What is made in inference mode and kept could not be used outside of it.
        with torch.inference_mode(mode=False), torch.no_grad():
            return self._stay(index) if index in self._small else self._bring(index, keep=keep)

    def done(self, index: int) -> None:
        """Give the tensors of a group back."""
        hold = self._parts.lent.pop(index, None)
        if hold is None:
            return
        hold.users -= 1
        if not hold.users and hold.uses >= len(hold.block.uses):
            self._parts.holds.remove(hold)
            hold.lease.release()

    def expect_rows(self, index: int, count: int) -> None:
        """Before a group that is used by rows: how many of its rows are about to be used."""
        for stored in self.groups[index].tensors.values():
            if stored.shape and count * _MANY_ROWS > stored.shape[0]:
                self._file(stored.file).read_soon(stored.offset_bytes, stored.nbytes)

    def is_volatile(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor looks at staging memory, which is another block's soon."""
        if not self._parts.holds or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return False
        lease = self._parts.holds[0].lease
        return tensor.untyped_storage().data_ptr() == lease.tensor(0, 0).untyped_storage().data_ptr()

    def stats(self) -> OffloadStats:
        """Totals so far."""
        now = _sum(self._finished, self._parts.prefetcher)
        return OffloadStats(
            forwards=self._forwards,
            read_bytes=now.bytes_read,
            discarded_bytes=now.discarded_bytes,
            mapped_bytes=self._mapped_bytes,
            stall_s=now.stall_s,
            read_s=now.read_s,
            ring_bytes=self._parts.prefetcher.ring_bytes if self._parts.prefetcher else 0,
            plans=self._plans,
        )

    def close(self) -> None:
        """End threads, close files, free memory. It starts again when it is used again."""
        self._finished = _sum(self._finished, self._parts.prefetcher)
        self._parts.close()
        self._mode = None

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "_device",
            "_depth",
            "_block_bytes",
            "_open_reader",
            "_small",
            "_ahead",
            "_shared",
            "_order",
            "_blocks",
            "_ops",
        )
        return {name: getattr(self, name) for name in ("groups", *kept)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._scratch = ThreadScratch()
        self._start()

    # How it works.

    def _check_process(self) -> None:
        if self._parts.process != os.getpid():
            self._finalizer.detach()
            self._start()

    def _choose_mode(self) -> None:
        if self._mode == "mapped" and self._cached_fraction(sample=True) >= _ALL_CACHED:
            return
        cached = self._cached_fraction()
        # A device copies mapped pages through a small buffer of its driver, pinned memory by itself.
        if cached >= _ALL_CACHED and self._device is None:
            self._mode = "mapped"
            self._stop_ring()
            return
        if self._mode is None:
            free = available_bytes()
            self._set_direct(free is None or self.streamed_bytes * _FITS_MEMORY > free)
        elif not self._direct and cached < _STAYED_CACHED:
            self._set_direct(True)
        self._mode = "ring"

    def _set_direct(self, direct: bool) -> None:
        if direct != self._direct:
            self._direct = direct
            self._stop_ring()

    def _cached_fraction(self, *, sample: bool = False) -> float:
        """How much of all blocks the page cache has; 1 where there is nothing to read.

        The system counts pages: 4 ms for 2 GB. A `sample` is every eighth read, others each time.
        """
        total = cached = 0.0
        for op in self._ops[self._forwards % _SAMPLED :: _SAMPLED] if sample else self._ops:
            fraction = self._file(op.file).cached_fraction(op.offset_bytes, op.length_bytes)
            total += op.length_bytes
            cached += fraction * op.length_bytes
        return cached / total if total else 1.0

    def _bring(self, index: int, *, keep: bool) -> dict[str, torch.Tensor]:
        """A group from its block in the ring, or mapped."""
        group = self.groups[index]
        hold = self._hold(index) if index in self._ahead else None
        tensors: dict[str, torch.Tensor] = {}
        for name, stored in group.tensors.items():
            memory = None if hold is None else _in_ring(hold, stored)
            if memory is None:
                tensors[name] = self._mapped(stored, group)
            else:
                tensor = stored.tensor(memory, self._scratch)
                tensors[name] = _own(tensor) if keep else tensor
        return tensors

    def _stay(self, index: int) -> dict[str, torch.Tensor]:
        """A small group, read once and kept."""
        tensors = self._parts.small.get(index)
        if tensors is None:
            group = self.groups[index]
            tensors = {name: _own(self._mapped(stored, group)) for name, stored in group.tensors.items()}
            self._parts.small[index] = tensors
        return tensors

    def _hold(self, index: int) -> _Hold | None:
        """The block of a group in the ring, one user more; None where it is to be mapped."""
        self._observed.append(index)
        if self._mode != "ring":
            return None
        hold = next((hold for hold in self._parts.holds if index in hold.block.uses), None) or self._acquire(
            index
        )
        if hold is not None:
            hold.users += 1
            hold.uses += 1
            self._parts.lent[index] = hold
        return hold

    def _acquire(self, index: int) -> _Hold | None:
        positions = [position for position, block in enumerate(self._blocks) if index in block.uses]
        if not positions:
            return None
        self._release_idle()
        position = next((p for p in positions if p >= self._cursor), positions[0])
        try:
            lease = self._ring().acquire(position)
        except PlanError:  # so many blocks in use that the ring has no room left, or no memory for a ring
            return None
        self._cursor = position + 1
        hold = _Hold(self._blocks[position], lease)
        self._parts.holds.append(hold)
        return hold

    def _ring(self) -> Prefetcher:
        parts = self._parts
        if parts.prefetcher is None:
            plan = self._load_plan()
            parts.reader = self._open_reader("auto" if self._direct else False)
            try:
                pool = StagingPool(_staging_bytes(plan), pin=self._pin())
                parts.prefetcher = Prefetcher(plan, parts.reader, pool)
            except BaseException:
                parts.stop_ring()
                raise
            self._plans += 1
        return parts.prefetcher

    def _pin(self) -> Callable[[torch.Tensor], Callable[[], None]] | None:
        """For staging memory that a device copies from: it then does so at the link's full rate."""
        accelerator = None if self._device is None else accelerator_for(self._device)
        return None if accelerator is None else accelerator.pin

    def _load_plan(self) -> LoadPlan:
        units = tuple(
            Unit(f"{position} ({self.groups[block.uses[0]].name} ...)", block.ops)
            for position, block in enumerate(self._blocks)
        )
        free = available_bytes()
        plan = LoadPlan(units, 0)
        for depth in range(1, min(self._depth, len(units) - 1) + 1):
            deeper = LoadPlan(units, depth)
            if free is not None and _staging_bytes(deeper) > _RING_SHARE * free:
                break
            plan = deeper
        return plan

    def _stop_ring(self) -> None:
        self._finished = _sum(self._finished, self._parts.prefetcher)
        self._parts.stop_ring()

    def _mapped(self, stored: StoredTensor, group: WeightGroup) -> torch.Tensor:
        if not stored.nbytes:
            return stored.tensor(torch.empty(0, dtype=torch.uint8))
        self._mapped_bytes += stored.nbytes
        key = _range_of(stored)
        memory = self._parts.views.get(key)
        if memory is None:
            file = self._file(stored.file)
            memory = self._parts.views[key] = file.bytes_at(stored.offset_bytes, stored.nbytes)
            if group.by_rows:
                file.expect_rows(stored.offset_bytes, stored.nbytes)
        if not group.by_rows and self._mode == "ring":
            self._file(stored.file).read_soon(stored.offset_bytes, stored.nbytes)
        return stored.tensor(memory, self._scratch)

    def _file(self, path: Path) -> MappedFile:
        file = self._parts.files.get(path)
        if file is None:
            file = self._parts.files[path] = MappedFile(path)
        return file

    def _release_idle(self) -> None:
        for hold in [hold for hold in self._parts.holds if not hold.users]:
            self._parts.holds.remove(hold)
            hold.lease.release()

    def _release_all(self) -> None:
        self._parts.lent.clear()
        while self._parts.holds:
            self._parts.holds.pop().lease.release()


def _in_ring(hold: _Hold, stored: StoredTensor) -> torch.Tensor | None:
    place = hold.block.places.get(_range_of(stored))
    if place is None:
        return None
    op, behind = place
    return hold.lease.tensor(hold.lease.unit.op_offsets[op] + behind, stored.nbytes)


def _staging_bytes(plan: LoadPlan) -> int:
    """Memory for the block in use and those ahead of it, wherever in the order they are.

    Blocks whose lengths differ by a page leave holes that are a page too short: `plan.ring_bytes`, with which
    all of them fit at any time, was 1.7 times as much for equal layers. With a little room instead, one read
    now and then begins when the block before it is released.
    """
    spans = [unit.span_bytes for unit in plan.units]
    around = spans + spans[: plan.depth]
    together = max(sum(around[i : i + plan.depth + 1]) for i in range(len(spans)))
    return min(plan.ring_bytes, int(_STAGING_SLACK * together))


def _range_of(stored: StoredTensor) -> _Range:
    return (stored.file, stored.offset_bytes, stored.nbytes)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own. A packed one is decoded into such memory where autograd looks on."""
    return tensor.clone() if type(tensor) is torch.Tensor else tensor


def _sum(finished: PrefetchStats, prefetcher: Prefetcher | None) -> PrefetchStats:
    if prefetcher is None:
        return finished
    return prefetcher.stats() - (PrefetchStats() - finished)


def _small_groups(groups: Sequence[WeightGroup]) -> frozenset[int]:
    """Groups that are small enough to stay, as many as may."""
    small = [
        index for index, group in enumerate(groups) if group.nbytes <= _SMALL_BYTES and not group.by_rows
    ]
    left = _ALL_SMALL_BYTES
    chosen: set[int] = set()
    for index in small:
        left -= groups[index].nbytes
        if left >= 0:
            chosen.add(index)
    return frozenset(chosen)


def _shared_ranges(groups: Sequence[WeightGroup]) -> frozenset[_Range]:
    """Ranges that several groups use: tied weights. Read ahead, each group would read them again."""
    seen: set[_Range] = set()
    shared: set[_Range] = set()
    for group in groups:
        ranges = {_range_of(stored) for stored in group.tensors.values()}
        shared |= ranges & seen
        seen |= ranges
    return frozenset(shared)


def _gather(
    groups: Sequence[WeightGroup], order: Sequence[int], shared: frozenset[_Range], block_bytes: int
) -> Iterator[_Block]:
    """Cut the uses in `order` into blocks; a use of what a block has already makes it no longer."""
    uses: list[int] = []
    ranges: set[_Range] = set()
    for index in order:
        own = {_range_of(stored) for stored in groups[index].tensors.values() if stored.nbytes} - shared
        if own - ranges and sum(length for _, _, length in ranges) >= block_bytes:
            yield _block(uses, ranges)
            uses, ranges = [], set()
        if own:
            uses.append(index)
            ranges |= own
    if uses:
        yield _block(uses, ranges)


def _block(uses: Sequence[int], ranges: set[_Range]) -> _Block:
    ops: list[ReadOp] = []
    places: dict[_Range, tuple[int, int]] = {}
    for near in _neighbours(sorted(ranges)):
        file, begin, _ = near[0]
        end = max(offset + length for _, offset, length in near)
        places.update({found: (len(ops), found[1] - begin) for found in near})
        ops.append(ReadOp(file, begin, end - begin))
    return _Block(tuple(uses), tuple(ops), places)


def _neighbours(ranges: Sequence[_Range]) -> Iterator[list[_Range]]:
    """Runs of sorted ranges that are near enough to each other to be read as one."""
    run: list[_Range] = []
    for found in ranges:
        if run and (found[0] != run[-1][0] or found[1] > run[-1][1] + run[-1][2] + _GAP_BYTES):
            yield run
            run = []
        run.append(found)
    if run:
        yield run

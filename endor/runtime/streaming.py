"""Streams a model's blocks: each block's weights are in memory from its forward's beginning to its end.

Two public hooks per block (`register_forward_pre_hook`, `register_forward_hook(always_call=True)`) attach the
compressed sections of the block's weights and take them away; two on the model count what a forward cost.
`close` undoes all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from endor.errors import EndorError, PlanError
from endor.formats.checksums import tensor_bytes, verify_block, verify_section
from endor.formats.entries import Section
from endor.formats.packed import PackedTensor
from endor.formats.reader import BlockRange
from endor.kernels import active_backend
from endor.kernels.linear import compressed_kernel
from endor.kernels.tensor import BitmapTensor
from endor.loaders import Lease, LoadPlan, Prefetcher, Reader, ReadOp, StagingPool, Unit, read_unit
from endor.runtime.experts import ExpertCache
from endor.runtime.placement import Placement
from endor.runtime.scratch import DecodeScratch
from endor.runtime.sliced import SlicedWeight
from endor.runtime.slices import ExpertSource, ExpertStacks, Table, TiledSource, parts_of
from endor.runtime.stats import RunStats, StatsRecorder
from endor.runtime.turns import ThreadTurn

__all__ = ["Runtime", "WeightBlock"]


@dataclass(frozen=True)
class WeightBlock:
    """A block whose weights are packed.

    Attributes:
        module: that runs it.
        home: its bytes on disk.
        weights: by entry name.
        left_out: entries of the block that are read in parts, by others.
        table: set if the block is a head that is not resident: it is then read tile by tile.
    """

    module: nn.Module
    home: BlockRange
    weights: Mapping[str, BitmapTensor]
    left_out: frozenset[str] = frozenset()
    table: Table | None = None
    _views: dict[int, dict[str, PackedTensor]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.home.block.name

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(end - begin for begin, end in self.runs)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The ranges [begin, end) of the payload that are read: one, but for what is left out."""
        block = self.home.block
        if not self.left_out:
            return ((block.begin, block.end),)
        kept = [entry for entry in block.entries if entry.name in self.weights]
        runs: list[tuple[int, int]] = []
        for section in (section for entry in kept for section in entry.sections):
            begin, end = section.begin, section.end
            if runs and begin - runs[-1][1] <= _WORTH_A_READ_BYTES:
                begin = runs.pop()[0]
            runs.append((begin, end))
        return tuple((begin, end) for begin, end in runs if end > begin)

    def attach(self, parts: Sequence[torch.Tensor]) -> None:
        """Give every weight its sections.

        A ring has few places for a block, so the views of each are made once: they would cost 0.2 ms per
        block.

        Args:
            parts: uint8, the bytes of `runs`.
        """
        views = self._views.get(parts[0].data_ptr())
        if views is None:
            views = self._views[parts[0].data_ptr()] = self._unpack(parts)
        for name, packed in views.items():
            self.weights[name].attach(packed)

    def _unpack(self, parts: Sequence[torch.Tensor]) -> dict[str, PackedTensor]:
        if not self.left_out:
            return self.home.block.unpack(parts[0], names=self.weights)
        views = {}
        for entry in (entry for entry in self.home.block.entries if entry.name in self.weights):
            raw = [self._bytes_of(section, parts) for section in entry.sections]
            pairs = zip(entry.layout.sections, raw, strict=True)
            sections = {spec.name: part.view(spec.dtype).view(spec.shape) for spec, part in pairs}
            views[entry.name] = PackedTensor(entry.layout, sections)
        return views

    def _bytes_of(self, section: Section, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        for (begin, end), part in zip(self.runs, parts, strict=True):
            if begin <= section.begin and section.end <= end:
                return part[section.begin - begin : section.end - begin]
        return parts[0][:0]

    def verify(self, parts: Sequence[torch.Tensor]) -> None:
        """Compare what was read with the checksums. Raises ChecksumError."""
        file = str(self.home.file)
        if not self.left_out:
            return verify_block(self.home.block, tensor_bytes(parts[0]), file=file)
        for entry in (entry for entry in self.home.block.entries if entry.name in self.weights):
            for section in entry.sections:
                verify_section(entry, section, tensor_bytes(self._bytes_of(section, parts)), file=file)
        return None

    def forget(self) -> None:
        """Detach, and drop every view of memory that is about to go."""
        self.detach()
        self._views.clear()

    def detach(self) -> None:
        for weight in self.weights.values():
            weight.detach_sections()

    def unit(self) -> Unit:
        payload_begin = self.home.offset - self.home.block.begin
        return Unit(
            self.name,
            tuple(ReadOp(self.home.file, payload_begin + begin, end - begin) for begin, end in self.runs),
        )


_WORTH_A_READ_BYTES = 64 << 10
"""Shorter gaps are read and thrown away."""
_MODEL_ATTRIBUTES = ("endor_runtime", "endor_stats", "save_pretrained")


class Runtime:
    """Keeps a model's compressed blocks where the placement says and brings the streamed ones in time.

    A context manager; `close` (also called when the model is collected) removes the hooks, ends the threads
    and frees the memory. After it the model's streamed weights cannot be used.

    Args:
        model: whose blocks these are.
        blocks: in execution order.
        placement: which of them stay in host memory.
        depth: blocks that are read ahead; 0 reads each when it is needed.
        reader: reads byte ranges; closed with the runtime.
        reader_reason: why it is this one, for people.
        scratch: what weights are decoded into.
        stats: where everything is counted.
        tables: embeddings and tied heads that are not resident.
        experts: of Mixture-of-Experts layers, by layer.
        expert_slots: how many experts are in memory at a time.
        verify: when blocks are compared with their checksums: `always`, `first` (when they are first read) or
            `never`.
        dense_bytes: memory of the model's other, dense parameters, for reports.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[WeightBlock],
        placement: Placement,
        *,
        depth: int,
        reader: Reader,
        reader_reason: str = "",
        scratch: DecodeScratch,
        stats: StatsRecorder,
        tables: Sequence[Table] = (),
        experts: Sequence[ExpertStacks] = (),
        expert_slots: int = 2,
        verify: str = "first",
        dense_bytes: int = 0,
    ) -> None:
        self.placement = placement
        self.dense_bytes = dense_bytes
        self.reader = reader
        self.reader_reason = reader_reason
        self._blocks = tuple(blocks)
        self._heads = tuple(b.table for b in blocks if b.table) + tuple(t for t in tables if t.tiles)
        self._embeddings = tuple(t for t in tables if not t.tiles)
        self._experts = tuple(experts)
        self._verify_when = verify
        self._scratch = scratch
        self._stats = stats
        self._verified: set[int] = set()
        self._leases: list[tuple[WeightBlock, Lease]] = []
        self._turn = ThreadTurn()
        self._inside: list[WeightBlock] = []
        self._handles: list[RemovableHandle] = []
        self._entered_s: dict[str, float] = {}
        self._resident = self._load_resident()
        self._prefetcher: Prefetcher | None = None
        self._expert_cache: ExpertCache | None = None
        try:
            self._prefetcher = self._start_prefetcher(depth)
            self._expert_cache = self._start_expert_cache(expert_slots, ahead=depth > 0)
        except BaseException:
            _close_parts([part for part in (self._prefetcher, self._resident) if part])
            raise
        self._give_sources()
        self._finalizer = weakref.finalize(model, _close_parts, self._parts())
        self._model = weakref.ref(model)
        self._hook(model)
        vars(model).update(endor_runtime=self, endor_stats=self.stats, save_pretrained=_refuse_to_save)
        stats.sample_memory()

    @property
    def ring_bytes(self) -> int:
        """Staging memory of the ring."""
        ring = self._prefetcher.ring_bytes if self._prefetcher else 0
        return ring + (self._expert_cache.capacity_bytes if self._expert_cache else 0)

    @property
    def resident_bytes(self) -> int:
        """Memory that holds resident compressed blocks."""
        return self._resident.capacity_bytes if self._resident else 0

    @property
    def scratch_bytes(self) -> int:
        """Memory that weights are decoded into."""
        return self._scratch.nbytes

    @property
    def kernel(self) -> str:
        """The kernels that decode this model's weights, and that multiply without decoding, e.g.
        `native-avx512 (matmul: avx512bf16)`; several where codecs differ."""
        weights = [w for b in self._blocks for w in b.weights.values() if not w.packed_layout.is_plain]
        decoders = {active_backend("cpu", codec=weight.codec) for weight in weights}
        products: set[str | None] = set()
        if self._scratch.matmul == "auto":
            kinds = {(w.codec, w.mask, w.packed_layout.dtype, w.dtype): w for w in weights}
            products = {compressed_kernel(w.packed_layout, w.dtype) for w in kinds.values()}
        multiplied = ", ".join(sorted(filter(None, products)))
        text = ", ".join(sorted(decoders)) or "none"
        return f"{text} (matmul: {multiplied})" if multiplied else text

    @property
    def streamed_bytes(self) -> int:
        """Compressed bytes that one pass over all blocks and heads reads from disk; experts come on top."""
        return sum(unit.total_bytes for unit in self._prefetcher.plan.units) if self._prefetcher else 0

    @property
    def in_parts(self) -> str:
        """What is read in parts, for people; empty if nothing is."""
        said = [f"{table.name} by rows" for table in self._embeddings]
        said += [f"{head.name} in {len(head.tiles)} tiles" for head in self._heads]
        if self._expert_cache:
            total = sum(stacks.count for stacks in self._experts)
            said.append(f"room for {self._expert_cache.slots} of {total} experts")
        return ", ".join(said)

    @property
    def peak_anonymous_bytes(self) -> int:
        """Most anonymous memory of the process seen after loading and after each forward."""
        return self._stats.peak_anonymous_bytes

    def sample_memory(self) -> None:
        """Look at the process's memory now, for `peak_anonymous_bytes`."""
        self._stats.sample_memory()

    def stats(self) -> RunStats:
        """Totals since loading."""
        return self._stats.snapshot()

    def per_forward(self) -> tuple[RunStats, ...]:
        """One entry per forward of the model, of the last 4096: the first of a generation reads the prompt,
        each other makes one token. `stats` has the totals of all."""
        return tuple(self._stats.per_forward)

    def close(self) -> None:
        """Remove the hooks, end the threads, free the memory. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for weight in self._sliced_weights():
            weight.use_source(None)
        model = self._model()
        for name in _MODEL_ATTRIBUTES:
            if model is not None and name in vars(model):
                del vars(model)[name]
        self._release_leases()
        for block in self._blocks:
            block.forget()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # Setting up.

    def _load_resident(self) -> StagingPool | None:
        """Read the resident blocks into one arena, where they are used in place."""
        units = [self._blocks[i].unit() for i in self.placement.host]
        if not units:
            return None
        pool = StagingPool(sum(unit.span_bytes for unit in units))
        try:
            for index, unit in zip(self.placement.host, units, strict=True):
                buffer = pool.allocate(unit.span_bytes)
                read_unit(self.reader, unit, buffer.memory)
                block, parts = self._blocks[index], parts_of(unit, buffer.tensor())
                if self._verify_when != "never":
                    block.verify(parts)
                block.attach(parts)
        except BaseException:
            pool.close()
            raise
        return pool

    def _start_prefetcher(self, depth: int) -> Prefetcher | None:
        streamed = [self._blocks[i] for i in self.placement.disk]
        self._units: list[tuple[Unit, WeightBlock | None]] = [
            (block.unit(), block) for block in streamed if not block.table
        ]
        self._unit_of = {block.name: index for index, (_, block) in enumerate(self._units) if block}
        self._first_tile: dict[str, int] = {}
        for head in self._heads:
            self._first_tile[head.name] = len(self._units)
            self._units += [(unit, None) for unit in head.units()]
        if not self._units:
            return None
        # Reading further ahead than once around would hold blocks twice.
        units = tuple(unit for unit, _ in self._units)
        plan = LoadPlan(units, min(depth, len(units)))
        return Prefetcher(plan, self.reader, on_read=self._verify)

    def _start_expert_cache(self, slots: int, *, ahead: bool) -> ExpertCache | None:
        experts = self._experts
        if not experts:
            return None
        return ExpertCache(
            self.reader,
            lambda key: experts[key[0]].expert(key[1]),
            slot_bytes=max(stacks.expert_bytes for stacks in experts),
            slots=slots,
            ahead=ahead,
            stats=self._stats,
        )

    def _sliced_weights(self) -> Iterator[SlicedWeight]:
        yield from (table.weight for table in (*self._heads, *self._embeddings))
        yield from (weight for stacks in self._experts for weight in stacks.weights.values())

    def _give_sources(self) -> None:
        """Tell the weights that are read in parts where these come from."""
        for table in (*self._heads, *self._embeddings):
            first = self._first_tile.get(table.name, 0)
            lease = _TileLease(self, first)
            table.weight.use_source(
                TiledSource(table.rows, self.reader, tiles=table.tiles, lease=lease, stats=self._stats)
            )
        for layer, stacks in enumerate(self._experts):
            assert self._expert_cache is not None
            for name, weight in stacks.weights.items():
                weight.use_source(
                    ExpertSource(
                        self._expert_cache, layer, stacks.rows[name], reader=self.reader, stats=self._stats
                    )
                )

    def _verify(self, unit_index: int, memory: memoryview) -> None:
        """Compare a block with its checksums the first time it is read (in the prefetcher's thread)."""
        unit, block = self._units[unit_index]
        if block is None or self._verify_when == "never" or unit_index in self._verified:
            return
        block.verify(parts_of(unit, torch.frombuffer(memory, dtype=torch.uint8)))
        if self._verify_when == "first":
            self._verified.add(unit_index)

    def _hook(self, model: nn.Module) -> None:
        for block in self._blocks:
            if block.name in self._unit_of:
                self._before(block.module, _Hook(self, Runtime._acquire, block, self._unit_of[block.name]))
                self._after(block.module, _Hook(self, Runtime._release, block))
            elif not block.table:
                self._before(block.module, _Hook(self, Runtime._use_resident, block))
                if self._stats.trace is not None:
                    self._after(block.module, _Hook(self, Runtime._note_block, block))
        for layer, stacks in enumerate(self._experts):
            hook = _ExpertsHook(self, layer)
            self._handles.append(
                stacks.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            )
            self._after(stacks.module, _Hook(self, Runtime._leave_experts))
        self._before(model, _Hook(self, Runtime._begin_forward))
        self._after(model, _Hook(self, Runtime._end_forward))

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook, always_call=True))

    def _parts(self) -> list[Any]:
        return [
            part
            for part in (self._prefetcher, self._expert_cache, self.reader, self._scratch, self._resident)
            if part is not None
        ]

    # While the model runs.

    def _begin_forward(self) -> None:
        self._turn.begin()
        self._inside.clear()
        self._release_leases()  # of a forward that Ctrl-C ended: torch runs no hooks for it
        self._stats.begin_forward()

    def _end_forward(self) -> None:
        if self._prefetcher:
            self._stats.read_s = self._prefetcher.stats().read_s
        self._stats.end_forward()
        self._turn.leave()

    def _acquire(self, block: WeightBlock, unit_index: int) -> None:
        assert self._prefetcher is not None
        self._turn.enter()
        self._inside.append(block)
        lease = self._prefetcher.acquire(unit_index)
        self._leases.append((block, lease))
        self._stats.stalled(block.name, lease.stall_s)
        self._stats.disk_bytes += lease.unit.total_bytes
        self._entered_s[block.name] = perf_counter()
        block.attach([lease.op_tensor(i) for i in range(len(lease.unit.ops))])

    def _use_resident(self, block: WeightBlock) -> None:
        self._stats.host_bytes += block.nbytes
        self._entered_s[block.name] = perf_counter()

    def _release(self, block: WeightBlock) -> None:
        for held in [pair for pair in self._leases if pair[0] is block]:
            self._leases.remove(held)
            block.detach()
            held[1].release()
            self._note_block(block)
        if block in self._inside:
            self._inside.remove(block)
            self._turn.leave()

    def _note_block(self, block: WeightBlock) -> None:
        self._stats.note("block", block.name, self._entered_s[block.name], perf_counter())

    @contextmanager
    def _lease_tile(self, unit_index: int) -> Iterator[Sequence[torch.Tensor]]:
        """The bytes of one tile of a head."""
        assert self._prefetcher is not None
        self._turn.enter()
        try:
            with self._prefetcher.acquire(unit_index) as lease:
                self._stats.stalled(lease.unit.name, lease.stall_s)
                self._stats.disk_bytes += lease.unit.total_bytes
                yield [lease.op_tensor(i) for i in range(len(lease.unit.ops))]
        finally:
            self._turn.leave()

    def _enter_experts(self, layer: int, chosen: torch.Tensor | None) -> None:
        """All layers share one cache, so a thread has it for a whole layer, also where the layer is called by
        itself and its block is resident."""
        self._turn.enter()
        if chosen is None:
            return
        assert self._expert_cache is not None
        count = self._experts[layer].count
        self._expert_cache.want([(layer, e) for e in torch.unique(chosen).tolist() if 0 <= e < count])

    def _leave_experts(self) -> None:
        self._turn.leave()

    def _release_leases(self) -> None:
        while self._leases:
            block, lease = self._leases.pop()
            block.detach()
            lease.release()


def _refuse_to_save(*_: object, **__: object) -> None:
    """Stands for `save_pretrained`, which would begin by overwriting the config of what it cannot save."""
    raise PlanError(
        "a streamed model cannot be saved: its weights are in its Endor checkpoint, which can be copied as "
        "it is; endor.open(...).read_dense(name) gives them dense"
    )


class _Hook:
    """Calls a method of the runtime, which it does not keep alive, when torch calls it.

    What that does cannot be traced: torch.compile breaks its graph there.
    """

    def __init__(self, runtime: Runtime, method: Callable[..., None], *arguments: object) -> None:
        self._runtime = weakref.ref(runtime)
        self._method = method
        self._arguments = arguments

    def __call__(self, *_: object) -> None:
        self._run()  # pyright: ignore[reportCallIssue] - it does not see through the decorator

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        runtime = self._runtime()
        if runtime is not None:
            self._method(runtime, *self._arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise PlanError("a streamed model cannot be copied; load its checkpoint a second time")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise PlanError("a streamed model cannot be pickled; load its checkpoint where you need it")


class _ExpertsHook:
    """Reads the router's choice off the arguments of a layer's experts before they run."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self._runtime = weakref.ref(runtime)
        self._layer = layer

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._run(args, kwargs)  # pyright: ignore[reportCallIssue] - it does not see through the decorator

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime = self._runtime()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        chosen = next((t for t in tensors if t.dtype in (torch.int64, torch.int32)), None)
        if runtime is not None:
            runtime._enter_experts(self._layer, chosen)


class _TileLease:
    """Lends the tiles of one head; does not keep the runtime alive."""

    def __init__(self, runtime: Runtime, first_unit: int) -> None:
        self._runtime = weakref.ref(runtime)
        self._first_unit = first_unit

    def __call__(self, tile: int) -> AbstractContextManager[Sequence[torch.Tensor]]:
        runtime = self._runtime()
        if runtime is None:
            raise PlanError("the model was collected while one of its weights was used")
        return runtime._lease_tile(self._first_unit + tile)


def _close_parts(parts: list[Any]) -> None:
    """Close what holds threads, files and memory, all of it even when one fails."""
    errors: list[EndorError] = []
    for part in parts:
        try:
            part.close()
        except EndorError as error:
            errors.append(error)
    if errors:
        raise errors[0]

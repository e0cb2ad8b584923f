"""Streams a model's blocks: each block's weights are in memory from its forward's beginning to its end.

Two public hooks per block (`register_forward_pre_hook`, `register_forward_hook(always_call=True)`) attach the
compressed sections of the block's weights and take them away; two on the model count what a forward cost.
`close` undoes all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from endor.kernels import active_backend
from endor.kernels.linear import compressed_kernel
from endor.loaders import Accelerator, Event, Lease, Reader
from endor.runtime.blocks import WeightBlock
from endor.runtime.device_scratch import DeviceScratch
from endor.runtime.hooks import ExpertsHook, RuntimeHook, TileLease, refuse_to_save
from endor.runtime.placement import Placement
from endor.runtime.scratch import DecodeScratch
from endor.runtime.sliced import SlicedWeight
from endor.runtime.slices import ExpertSource, ExpertStacks, Table, TiledSource
from endor.runtime.stats import RunStats, StatsRecorder
from endor.runtime.tiers import Tiers, close_anywhere
from endor.runtime.turns import ThreadTurn

__all__ = ["Runtime", "WeightBlock"]

_MODEL_ATTRIBUTES = ("endor_runtime", "endor_stats", "save_pretrained")


class Runtime:
    """Keeps a model's compressed blocks where the placement says and brings the streamed ones in time.

    A context manager; `close` (also called when the model is collected) removes the hooks, ends the threads
    and frees the memory. After it the model's streamed weights cannot be used.

    Args:
        model: whose blocks these are.
        blocks: in execution order.
        placement: which of them stay, and where.
        depth: blocks that are read ahead; 0 reads each when it is needed.
        reader: reads byte ranges; closed with the runtime.
        reader_reason: why it is this one, for people.
        scratch: what weights are decoded into.
        stats: where everything is counted.
        tables: embeddings and tied heads that are not resident.
        experts: of Mixture-of-Experts layers, by layer.
        expert_slots: how many experts are in memory at a time, where they are used.
        host_experts: see `Tiers`.
        verify: when blocks are compared with their checksums: `always`, `first` (when they are first read) or
            `never`.
        dense_bytes: memory of the model's other, dense parameters, for reports.
        accelerator: of the device that computes, if that has memory of its own.
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
        scratch: DecodeScratch | DeviceScratch,
        stats: StatsRecorder,
        tables: Sequence[Table] = (),
        experts: Sequence[ExpertStacks] = (),
        expert_slots: int = 2,
        host_experts: Sequence[int] = (),
        verify: str = "first",
        dense_bytes: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.placement = placement
        self.dense_bytes = dense_bytes
        self.reader = reader
        self.reader_reason = reader_reason
        self._blocks = tuple(blocks)
        self._heads = tuple(b.table for b in blocks if b.table) + tuple(t for t in tables if t.tiles)
        self._embeddings = tuple(t for t in tables if not t.tiles)
        self._experts = tuple(experts)
        self._scratch = scratch
        self._stats = stats
        self._accelerator = accelerator
        self._leases: list[tuple[WeightBlock, Lease]] = []
        self._turn = ThreadTurn()
        self._inside: list[WeightBlock] = []
        self._handles: list[RemovableHandle] = []
        self._entered_s: dict[str, float] = {}
        self._last_forward: Event | None = None
        self._tiers = Tiers(
            self._blocks,
            placement,
            self._heads,
            self._experts,
            depth=depth,
            reader=reader,
            accelerator=accelerator,
            verify=verify,
            expert_slots=expert_slots,
            host_experts=host_experts,
            stats=stats,
        )
        self._finalizer = weakref.finalize(model, close_anywhere, [self._tiers, reader, scratch])
        self._give_sources()
        if accelerator is not None:
            self._last_forward = accelerator.mark()  # of loading, which the first one has to wait for as well
        self._model = weakref.ref(model)
        self._hook(model)
        vars(model).update(endor_runtime=self, endor_stats=self.stats, save_pretrained=refuse_to_save)
        stats.sample_memory()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device("cpu") if self._accelerator is None else self._accelerator.device

    @property
    def ring_bytes(self) -> int:
        """Memory of the ring, and of experts, where they are used."""
        return self._tiers.ring_bytes

    @property
    def resident_bytes(self) -> int:
        """Memory that holds resident compressed blocks, where they are used."""
        return self._tiers.resident_bytes

    @property
    def pinned_bytes(self) -> int:
        """Host memory of what is used on a device: blocks that stay there, and buffers on the way."""
        return self._tiers.pinned_bytes

    @property
    def scratch_bytes(self) -> int:
        """Memory that weights are decoded into."""
        return self._scratch.nbytes

    @property
    def kernel(self) -> str:
        """The kernels that decode this model's weights, and that multiply without decoding, e.g.
        `native-avx512 (matmul: avx512bf16)`; several where codecs differ."""
        weights = [w for b in self._blocks for w in b.weights.values() if not w.packed_layout.is_plain]
        triton = self._scratch.status is not None
        decoders = (
            {"triton"}
            if triton and weights
            else {active_backend(self.device, codec=w.codec) for w in weights}
        )
        products: set[str | None] = set()
        if self._scratch.matmul == "auto":
            kinds = {(w.codec, w.mask, w.packed_layout.dtype, w.dtype): w for w in weights}
            products = {
                compressed_kernel(w.packed_layout, w.dtype, self.device, status=triton)
                for w in kinds.values()
            }
        multiplied = ", ".join(sorted(filter(None, products)))
        text = ", ".join(sorted(decoders)) or "none"
        return f"{text} (matmul: {multiplied})" if multiplied else text

    @property
    def streamed_bytes(self) -> int:
        """Compressed bytes that one pass over all blocks and heads brings to where they are used; experts
        come on top."""
        return self._tiers.streamed_bytes

    @property
    def in_parts(self) -> str:
        """What is read in parts, for people; empty if nothing is."""
        said = [f"{table.name} by rows" for table in self._embeddings]
        said += [f"{head.name} in {len(head.tiles)} tiles" for head in self._heads]
        if self._tiers.experts:
            total = sum(stacks.count for stacks in self._experts)
            held = f", {self._tiers.experts.held} in host memory" if self._tiers.experts.held else ""
            said.append(f"room for {self._tiers.experts.slots} of {total} experts{held}")
        return ", ".join(said)

    @property
    def peak_anonymous_bytes(self) -> int:
        """Most anonymous memory of the process seen after loading and after each forward."""
        return self._stats.peak_anonymous_bytes

    @property
    def peak_device_bytes(self) -> int:
        """Most memory of the device that the process had at a time; 0 on a CPU."""
        return 0 if self._accelerator is None else self._accelerator.peak_bytes()

    def sample_memory(self) -> None:
        """Look at the process's memory now, for `peak_anonymous_bytes`."""
        self._stats.sample_memory()

    def stats(self) -> RunStats:
        """Totals since loading. Waits for the device, and raises FormatError if it met a damaged weight."""
        totals = self._stats.snapshot()
        self._check_device(wait=True)
        return totals

    def per_forward(self) -> tuple[RunStats, ...]:
        """One entry per forward of the model, of the last 4096: the first of a generation reads the prompt,
        each other makes one token. `stats` has the totals of all. Waits for the device."""
        self._stats.snapshot()
        return tuple(self._stats.per_forward)

    def close(self) -> None:
        """Remove the hooks, end the threads, free the memory. Idempotent.

        Raises FormatError, when that is done, if the last forward on a device met a damaged weight.
        """
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
        try:
            if self._finalizer.alive:
                self._check_device(wait=True)
        finally:
            self._stats.forget_device()
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # Setting up.

    def _sliced_weights(self) -> Iterator[SlicedWeight]:
        yield from (table.weight for table in (*self._heads, *self._embeddings))
        yield from (weight for stacks in self._experts for weight in stacks.weights.values())

    def _give_sources(self) -> None:
        """Tell the weights that are read in parts where these come from."""
        for table in (*self._heads, *self._embeddings):
            first = self._tiers.first_tile.get(table.name, 0)
            lease = TileLease(self, table.name, first)
            table.weight.use_source(
                TiledSource(table.rows, self.reader, tiles=table.tiles, lease=lease, stats=self._stats)
            )
        for layer, stacks in enumerate(self._experts):
            assert self._tiers.experts is not None
            for name, weight in stacks.weights.items():
                weight.use_source(
                    ExpertSource(
                        self._tiers.experts, layer, stacks.rows[name], reader=self.reader, stats=self._stats
                    )
                )

    def _hook(self, model: nn.Module) -> None:
        for block in self._blocks:
            unit_index = self._tiers.unit_of.get(block.name)
            if unit_index is not None:
                self._before(block.module, RuntimeHook(self, Runtime._acquire, block, unit_index))
                self._after(block.module, RuntimeHook(self, Runtime._release, block))
            elif not block.table:
                self._before(block.module, RuntimeHook(self, Runtime._use_resident, block))
                if self._stats.trace is not None or self._accelerator is not None:
                    self._after(block.module, RuntimeHook(self, Runtime._leave_resident, block))
        for layer, stacks in enumerate(self._experts):
            hook = ExpertsHook(self, layer)
            self._handles.append(
                stacks.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            )
            self._after(stacks.module, RuntimeHook(self, Runtime._leave_experts))
        self._before(model, RuntimeHook(self, Runtime._begin_forward))
        self._after(model, RuntimeHook(self, Runtime._end_forward))

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook, always_call=True))

    # While the model runs.

    def _begin_forward(self) -> None:
        self._turn.begin()
        self._inside.clear()
        self._release_leases()  # of a forward that Ctrl-C ended: torch runs no hooks for it
        if self._accelerator is not None and self._last_forward is not None:
            # Forwards of several threads may be in several streams, and share scratch and experts.
            self._accelerator.follow(self._last_forward)
            self._check_device(wait=False)
        self._stats.begin_forward()

    def _end_forward(self) -> None:
        if self._tiers.prefetcher:
            self._stats.read_s = self._tiers.prefetcher.stats().read_s
        self._stats.end_forward()
        if self._accelerator is not None:
            if isinstance(self._scratch, DeviceScratch):
                self._scratch.watch()
            self._last_forward = self._accelerator.mark()
        self._turn.leave()

    def _check_device(self, *, wait: bool) -> None:
        if isinstance(self._scratch, DeviceScratch):
            self._scratch.check(wait=wait)

    def _enter_block(self, name: str) -> None:
        if isinstance(self._scratch, DeviceScratch):
            self._scratch.enter(name)
        self._entered_s[name] = perf_counter()

    def _acquire(self, block: WeightBlock, unit_index: int) -> None:
        self._turn.enter()
        self._inside.append(block)
        lease = self._lend(unit_index)
        self._leases.append((block, lease))
        self._enter_block(block.name)
        block.attach([lease.op_tensor(i) for i in range(len(lease.unit.ops))])

    def _lend(self, unit_index: int) -> Lease:
        """A unit of the ring, counted."""
        assert self._tiers.prefetcher is not None
        unit = self._tiers.prefetcher.plan.units[unit_index]
        with self._stats.waiting(unit.name):
            lease = self._tiers.prefetcher.acquire(unit_index)
        self._stats.copied(unit.name, lease.copied)
        if self._tiers.is_held(unit):
            self._stats.host_bytes += unit.total_bytes
        else:
            self._stats.disk_bytes += unit.total_bytes
        return lease

    def _use_resident(self, block: WeightBlock) -> None:
        if self._accelerator is None:
            self._stats.host_bytes += block.nbytes
        else:
            self._turn.enter()  # threads that call layers by themselves share the scratch
            self._stats.device_bytes += block.nbytes
        self._enter_block(block.name)

    def _leave_resident(self, block: WeightBlock) -> None:
        self._note_block(block)
        if self._accelerator is not None:
            self._turn.leave()

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
    def lease_tile(self, name: str, unit_index: int) -> Iterator[Sequence[torch.Tensor]]:
        """The bytes of one tile of a head, for its source."""
        self._turn.enter()
        try:
            with self._lend(unit_index) as lease:
                self._enter_block(name)
                yield [lease.op_tensor(i) for i in range(len(lease.unit.ops))]
        finally:
            self._turn.leave()

    def enter_experts(self, layer: int, chosen: torch.Tensor | None) -> None:
        """A layer's experts are about to run; for its hook.

        All layers share one cache, so a thread has it for a whole layer, also where the layer is called by
        itself and its block is resident.
        """
        self._turn.enter()
        if chosen is None:
            return
        assert self._tiers.experts is not None
        count = self._experts[layer].count
        self._tiers.experts.want([(layer, e) for e in torch.unique(chosen).tolist() if 0 <= e < count])

    def _leave_experts(self) -> None:
        self._turn.leave()

    def _release_leases(self) -> None:
        while self._leases:
            block, lease = self._leases.pop()
            block.detach()
            lease.release()

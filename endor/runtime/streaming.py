"""Streams a model's blocks: each block's weights are in memory from its forward's beginning to its end.

Two public hooks per block (`register_forward_pre_hook`, `register_forward_hook(always_call=True)`) attach the
compressed sections of the block's weights and take them away; two on the model count what a forward cost.
`close` undoes all of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from endor.errors import EndorError, PlanError
from endor.formats.checksums import verify_block
from endor.formats.packed import PackedTensor
from endor.formats.reader import BlockRange
from endor.kernels import active_backend
from endor.kernels.tensor import BitmapTensor
from endor.loaders import Lease, LoadPlan, Prefetcher, Reader, ReadOp, StagingPool, Unit, read_unit
from endor.runtime.placement import Placement
from endor.runtime.scratch import DecodeScratch
from endor.runtime.stats import RunStats, StatsRecorder
from endor.runtime.turns import ThreadTurn

__all__ = ["Runtime", "WeightBlock"]


@dataclass(frozen=True)
class WeightBlock:
    """A block whose weights are packed: the module that runs it, its bytes on disk, its weights by entry
    name."""

    module: nn.Module
    home: BlockRange
    weights: Mapping[str, BitmapTensor]
    _views: dict[int, dict[str, PackedTensor]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.home.block.name

    def attach(self, memory: torch.Tensor) -> None:
        """Give every weight its sections in `memory`, uint8 [nbytes of the block].

        A ring has few places for a block, so the views of each are made once: they would cost 0.2 ms per
        block.
        """
        views = self._views.get(memory.data_ptr())
        if views is None:
            views = self._views[memory.data_ptr()] = self.home.block.unpack(memory, names=self.weights)
        for name, packed in views.items():
            self.weights[name].attach(packed)

    def forget(self) -> None:
        """Detach, and drop every view of memory that is about to go."""
        self.detach()
        self._views.clear()

    def detach(self) -> None:
        for weight in self.weights.values():
            weight.detach_sections()

    def unit(self) -> Unit:
        return Unit(self.name, (ReadOp(self.home.file, self.home.offset, self.home.nbytes),))


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
        scratch: what weights are decoded into.
        stats: where everything is counted.
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
        scratch: DecodeScratch,
        stats: StatsRecorder,
        dense_bytes: int = 0,
    ) -> None:
        self.placement = placement
        self.dense_bytes = dense_bytes
        self.reader = reader
        self._blocks = tuple(blocks)
        self._scratch = scratch
        self._stats = stats
        self._verified: set[int] = set()
        self._leases: list[tuple[WeightBlock, Lease]] = []
        self._turn = ThreadTurn()
        self._inside: list[WeightBlock] = []
        self._handles: list[RemovableHandle] = []
        self._resident = self._load_resident()
        try:
            self._prefetcher = self._start_prefetcher(depth)
        except BaseException:
            _close_parts([self._resident] if self._resident else [])
            raise
        self._finalizer = weakref.finalize(model, _close_parts, self._parts())
        self._model = weakref.ref(model)
        self._hook(model)
        vars(model).update(endor_runtime=self, endor_stats=self.stats, save_pretrained=_refuse_to_save)
        stats.sample_memory()

    @property
    def ring_bytes(self) -> int:
        """Staging memory of the ring."""
        return self._prefetcher.ring_bytes if self._prefetcher else 0

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
        """The kernels that decode this model's weights, e.g. `native-avx512`; several where codecs differ."""
        layouts = [w.packed_layout for b in self._blocks for w in b.weights.values()]
        codecs = {layout.codec for layout in layouts if not layout.is_plain}
        return ", ".join(sorted({active_backend("cpu", codec=codec) for codec in codecs})) or "none"

    @property
    def streamed_bytes(self) -> int:
        """Compressed bytes that one pass over all blocks reads from disk."""
        return sum(self._blocks[i].home.nbytes for i in self.placement.disk)

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
        """One entry per forward of the model: the first of a generation reads the prompt, each other makes
        one token."""
        return tuple(self._stats.per_forward)

    def close(self) -> None:
        """Remove the hooks, end the threads, free the memory. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
                block = self._blocks[index]
                verify_block(block.home.block, buffer.memory[: block.home.nbytes], file=str(block.home.file))
                block.attach(buffer.tensor(0, block.home.nbytes))
        except BaseException:
            pool.close()
            raise
        return pool

    def _start_prefetcher(self, depth: int) -> Prefetcher | None:
        if not self.placement.disk:
            return None
        # Reading further ahead than once around would hold blocks twice.
        units = tuple(self._blocks[i].unit() for i in self.placement.disk)
        plan = LoadPlan(units, min(depth, len(units)))
        return Prefetcher(plan, self.reader, on_read=self._verify)

    def _verify(self, unit_index: int, memory: memoryview) -> None:
        """Compare a block with its checksums the first time it is read (in the prefetcher's thread)."""
        if unit_index in self._verified:
            return
        block = self._blocks[self.placement.disk[unit_index]]
        verify_block(block.home.block, memory[: block.home.nbytes], file=str(block.home.file))
        self._verified.add(unit_index)

    def _hook(self, model: nn.Module) -> None:
        unit_of = {index: unit for unit, index in enumerate(self.placement.disk)}
        for index, block in enumerate(self._blocks):
            if index in unit_of:
                self._before(block.module, _Hook(self, Runtime._acquire, block, unit_of[index]))
                self._after(block.module, _Hook(self, Runtime._release, block))
            else:
                self._before(block.module, _Hook(self, Runtime._use_resident, block))
        self._before(model, _Hook(self, Runtime._begin_forward))
        self._after(model, _Hook(self, Runtime._end_forward))

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True))

    def _after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._handles.append(module.register_forward_hook(hook, always_call=True))

    def _parts(self) -> list[Any]:
        return [
            part
            for part in (self._prefetcher, self.reader, self._scratch, self._resident)
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
        self._stats.stall_s += lease.stall_s
        self._stats.disk_bytes += block.home.nbytes
        block.attach(lease.op_tensor(0))

    def _use_resident(self, block: WeightBlock) -> None:
        self._stats.host_bytes += block.home.nbytes

    def _release(self, block: WeightBlock) -> None:
        for held in [pair for pair in self._leases if pair[0] is block]:
            self._leases.remove(held)
            block.detach()
            held[1].release()
        if block in self._inside:
            self._inside.remove(block)
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

"""`endor.load`: an Endor checkpoint becomes a transformers model whose blocks are streamed or resident."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.errors import PlanError
from endor.formats import CheckpointReader
from endor.kernels.linear import check_matmul
from endor.loaders import (
    READER_NAMES,
    Accelerator,
    ReaderChoice,
    accelerator_for,
    available_bytes,
    choose_reader,
)
from endor.runtime.device_scratch import DeviceScratch
from endor.runtime.install import dense_bytes, install_weights, move_dense, stored_dtype
from endor.runtime.place import ModelPlan, place
from endor.runtime.planner import Budgets, default_device_bytes, default_pinned_bytes
from endor.runtime.scratch import DecodeScratch
from endor.runtime.skeleton import build_skeleton, check_complete
from endor.runtime.stats import StatsRecorder
from endor.runtime.streaming import Runtime
from endor.runtime.survey import Parts, find_parts
from endor.runtime.tiers import close_parts
from endor.runtime.trace import Trace, TracedReader

__all__ = ["default_host_bytes", "load", "runtime_of"]

_CPU = torch.device("cpu")
_HOST_SHARE = 0.7
"""Share of the free memory that resident blocks take by default; the rest is for activations and others."""
_VERIFY = ("first", "always", "never")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": None}


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | Accelerator = "auto",
    device_memory: int | None = None,
    host_memory: int | None = None,
    context_length: int | None = None,
    reader: str = "auto",
    depth: int = 2,
    dtype: torch.dtype | str | None = None,
    verify: str = "first",
    matmul: str = "auto",
    trace: Trace | None = None,
) -> Any:
    """Load a converted model so that it runs with only a part of it in memory.

    Args:
        directory: an Endor checkpoint, as `endor.convert` writes it.
        device: where to compute: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`; or an
            `endor.loaders.Accelerator` for a device that Endor does not know.
        device_memory: bytes of compressed weights that may stay in the memory of a GPU: blocks first, then
            embeddings, then the experts used last; 0 keeps none, None as much as fits beside everything else
            that has to be there.
        host_memory: the same in host memory. On a GPU these are blocks that are copied to it for each token
            from pinned memory; the rest is read from disk. 0 keeps none, None as much as fits in 70 % of the
            memory that is free now.
        context_length: tokens, prompt included, that a GPU's memory has to have room for: keys, values and
            activations are planned for so many. By default 4096, or what the model can do if that is less.
        reader: how blocks are read from disk: `auto`, `posix`, `kvikio` or `mmap`.
        depth: blocks that are read ahead of the one that runs; 0 reads each when it is needed.
        dtype: to compute in; the model's own by default.
        verify: when weights are compared with their checksums: `first` (when a block is first read; what will
            be read in parts, such as experts, now), `always` (every time a block is read) or `never`.
        matmul: `auto` multiplies straight from the compressed weights where that is faster, which adds in
            another order and so may change the last bits of the logits; `decode` gives those of the dense
            pruned model, bit for bit.
        trace: collects what happens when, to be saved and looked at in Perfetto.

    Returns:
        The transformers model; `model.generate` works (with inputs on `model.device`), `model.endor_stats()`
        gives totals, and `endor.runtime.runtime_of(model)` the runtime with everything else. Streaming ends
        when the model is collected, or at `runtime_of(model).close()`. Threads that call the model take
        turns.

    Raises:
        LoadError: a file is missing or unreadable, or transformers does not know the model.
        FormatError: a file is damaged, or does not fit the model. On a GPU damage that no checksum shows is
            noticed by the forward after the one that met it, by `endor_stats`, or by `close`.
        PlanError: a budget or option cannot be met.
    """
    options = _Options(
        device_memory=device_memory,
        host_memory=host_memory,
        context_length=context_length,
        reader=reader,
        depth=depth,
        dtype=_checked_dtype(dtype),
        verify=verify,
        matmul=check_matmul(matmul),
    )
    accelerator = _accelerator(device)
    if accelerator is None and device_memory:
        raise PlanError("device_memory is for a device with its own memory; on the CPU give host_memory")
    try:
        model, plan, file = _prepare(directory, options, accelerator)
        choice = choose_reader(reader, device_memory=_takes_gds(accelerator), file=file)
        _start(model, plan, options, choice, accelerator=accelerator, trace=trace)
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"the device's memory is not enough ({error}); lower device_memory, context_length or depth"
        ) from error
    return model


@dataclass(frozen=True)
class _Options:
    """What `load` was asked for, of which a device is not a part. Raises PlanError for what cannot be."""

    device_memory: int | None
    host_memory: int | None
    context_length: int | None
    reader: str
    depth: Any
    dtype: torch.dtype | None
    verify: str
    matmul: str

    def __post_init__(self) -> None:
        if self.verify not in _VERIFY:
            raise PlanError(f"verify must be one of {', '.join(_VERIFY)}, found {self.verify!r}")
        if self.reader not in READER_NAMES:
            raise PlanError(f"reader {self.reader!r} is unknown; use {', '.join(READER_NAMES)}")
        if not isinstance(self.depth, int) or self.depth < 0:
            raise PlanError(f"depth must be a whole number from 0, found {self.depth!r}")
        for name, unit in (
            ("device_memory", "bytes"),
            ("host_memory", "bytes"),
            ("context_length", "tokens"),
        ):
            value: object = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise PlanError(f"{name} must be a number of {unit} or None, found {value!r}")
        if self.context_length is not None and self.context_length < 1:
            raise PlanError(f"context_length must be 1 or more, found {self.context_length}")


def _prepare(
    directory: str | os.PathLike[str], options: _Options, accelerator: Accelerator | None
) -> tuple[Any, ModelPlan, Path | None]:
    """The model without its packed bytes, what goes where, and one of the files."""
    where = _CPU if accelerator is None else accelerator.device
    with torch.device("cpu"), Checkpoint(directory) as checkpoint:
        stored = stored_dtype(checkpoint)
        model = build_skeleton(checkpoint.directory, dtype=options.dtype, stored=stored)
        _check_room(checkpoint)
        installed = install_weights(model, checkpoint, device=where)
        check_complete(model, Path(directory))
        if accelerator is not None:
            _check_dense(model, accelerator)
        move_dense(model, where)
        own_memory = accelerator is not None
        parts = find_parts(model, installed, checkpoint, matmul=options.matmul, own_memory=own_memory)
        tokens = parts.context_tokens(options.context_length)
        free = accelerator.free_bytes() if accelerator is not None else None
        plan = place(
            model,
            parts,
            checkpoint,
            _budgets(parts, options, tokens, free),
            depth=options.depth,
            verify=options.verify != "never",
            context_tokens=tokens,
            device_free_bytes=free,
        )
        move_dense(model, where)  # embeddings that stay
        return model, plan, checkpoint.blocks[0].file if checkpoint.blocks else None


def _budgets(parts: Parts, options: _Options, tokens: int, device_free_bytes: int | None) -> Budgets:
    """As asked for, or what fits."""
    host = options.host_memory
    if device_free_bytes is None:
        return Budgets(default_host_bytes() if host is None else host)
    device = options.device_memory
    if device is None:
        device = default_device_bytes(
            parts.sizes, depth=options.depth, context_tokens=tokens, free_bytes=device_free_bytes
        )
    if host is None:
        room = default_host_bytes()
        host = default_pinned_bytes(parts.sizes, device, depth=options.depth, free_bytes=room)
    return Budgets(host, device)


def _start(
    model: nn.Module,
    plan: ModelPlan,
    options: _Options,
    choice: ReaderChoice,
    *,
    accelerator: Accelerator | None,
    trace: Trace | None,
) -> None:
    """Start the runtime, which the model then owns; if that fails nothing is left open."""
    reader = choice.reader if trace is None else TracedReader(choice.reader, trace)
    parts: list[Any] = [reader]
    try:
        stats = StatsRecorder(trace, accelerator=accelerator)
        scratch = _scratch(plan, stats, options.matmul, accelerator)
        parts.append(scratch)
        for weight in plan.weights():
            weight.use_scratch(scratch)
            weight.use_matmul(options.matmul)
        Runtime(
            model,
            list(plan.blocks),
            plan.placement,
            depth=options.depth,
            reader=reader,
            reader_reason=choice.reason,
            scratch=scratch,
            stats=stats,
            tables=plan.tables,
            experts=plan.experts,
            expert_slots=plan.expert_slots,
            host_experts=plan.decision.host_experts,
            verify=options.verify,
            dense_bytes=dense_bytes(model),
            accelerator=accelerator,
        )
    except BaseException:
        close_parts(parts)
        raise


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a model that `load` returned. Raises PlanError for any other model."""
    runtime = getattr(model, "endor_runtime", None)
    if not isinstance(runtime, Runtime):
        raise PlanError(f"this {type(model).__name__} was not loaded by endor.load, or its runtime is closed")
    return runtime


def default_host_bytes(*, to_come: int = 0) -> int:
    """What compressed weights may take when nobody says, of what is free once `to_come` bytes of others are
    loaded."""
    return int(_HOST_SHARE * max(0, (available_bytes() or 0) - to_come))


def _accelerator(device: object) -> Accelerator | None:
    """What drives the device; None for the CPU. Raises PlanError for one that is not there."""
    if not isinstance(device, (str, torch.device)):
        if isinstance(getattr(device, "device", None), torch.device):
            return device  # type: ignore[return-value]
        raise PlanError(f"device must be auto, cpu, cuda, cuda:N or an Accelerator, found {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return accelerator_for(torch.device(device))
    except RuntimeError as error:
        raise PlanError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from error


def _takes_gds(accelerator: Accelerator | None) -> bool:
    """Whether a reader could write to the device's memory itself."""
    return accelerator is not None and accelerator.device.type == "cuda"


def _scratch(
    plan: ModelPlan, stats: StatsRecorder, matmul: str, accelerator: Accelerator | None
) -> DecodeScratch | DeviceScratch:
    if accelerator is None:
        return DecodeScratch(plan.decoded(), stats, matmul=matmul)
    names = [block.name for block in plan.blocks] + [table.name for table in plan.tables]
    return DeviceScratch(plan.decoded(), stats, matmul=matmul, accelerator=accelerator, blocks=names)


def _checked_dtype(dtype: object) -> torch.dtype | None:
    """The dtype to compute in; None for the model's own. Raises PlanError for one that cannot be."""
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in _DTYPES.values():
        raise PlanError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}")
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype


def _check_dense(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse a device that has no room even for what is dense in any case, before anything is moved there."""
    needed, free = dense_bytes(model), accelerator.free_bytes()
    if needed > free:
        raise PlanError(
            f"{needed} bytes of parameters are not packed and have to be in the memory of "
            f"{accelerator.device}, {free} are free; use device cpu"
        )


def _check_room(checkpoint: CheckpointReader) -> None:
    """Refuse a checkpoint whose largest block is more than all memory, before anything is read."""
    free = available_bytes()
    largest = max((home.nbytes for home in checkpoint.blocks), default=0)
    if free is not None and largest > free:
        name = max(checkpoint.blocks, key=lambda home: home.nbytes).block.name
        raise PlanError(f"block {name!r} alone needs {largest} bytes of memory, {free} are free")

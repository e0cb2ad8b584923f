"""`endor.load`: an Endor checkpoint becomes a transformers model whose blocks are streamed or resident."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.errors import PlanError
from endor.formats import CheckpointReader
from endor.kernels.linear import check_matmul
from endor.loaders import READER_NAMES, Accelerator, accelerator_for, available_bytes, choose_reader
from endor.runtime.device_scratch import DeviceScratch
from endor.runtime.install import dense_bytes, install_weights, move_dense, stored_dtype
from endor.runtime.place import ModelPlan, place
from endor.runtime.planner import Budgets, default_device_bytes
from endor.runtime.scratch import DecodeScratch
from endor.runtime.skeleton import build_skeleton, check_complete
from endor.runtime.stats import StatsRecorder
from endor.runtime.streaming import Runtime
from endor.runtime.survey import Parts, find_parts
from endor.runtime.trace import Trace, TracedReader

__all__ = ["context_tokens", "default_host_bytes", "load", "runtime_of"]

_CPU = torch.device("cpu")
_USUAL_CONTEXT: Final = 4096
"""Tokens, where nobody says how many: what most prompts and answers stay below."""
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
    matmul = check_matmul(matmul)
    wanted = _check_options(reader=reader, depth=depth, dtype=dtype)
    _check_sizes(device_memory=device_memory, host_memory=host_memory, context_length=context_length)
    if verify not in _VERIFY:
        raise PlanError(f"verify must be one of {', '.join(_VERIFY)}, found {verify!r}")
    accelerator = _accelerator(device)
    if accelerator is None and device_memory:
        raise PlanError("device_memory is for a device with its own memory; on the CPU give host_memory")
    stats = StatsRecorder(trace, accelerator=accelerator)
    where = _CPU if accelerator is None else accelerator.device
    with torch.device("cpu"), Checkpoint(directory) as checkpoint:
        file = checkpoint.blocks[0].file if checkpoint.blocks else None
        model = build_skeleton(checkpoint.directory, dtype=wanted, stored=stored_dtype(checkpoint))
        _check_room(checkpoint)
        installed = install_weights(model, checkpoint, device=where)
        check_complete(model, Path(directory))
        if accelerator is not None:
            move_dense(model, accelerator.device)
        host_bytes = default_host_bytes() if host_memory is None else host_memory
        parts = find_parts(model, installed, checkpoint, matmul=matmul, own_memory=accelerator is not None)
        if accelerator is None:
            plan = place(model, parts, checkpoint, Budgets(host_bytes), depth=depth, verify=verify != "never")
        else:
            plan = _place_on(
                accelerator,
                model,
                parts,
                checkpoint,
                Budgets(host_bytes, device_memory),
                depth=depth,
                verify=verify != "never",
                context_tokens=context_tokens(model, context_length),
            )
    choice = choose_reader(reader, device_memory=_takes_gds(accelerator), file=file)
    opened = choice.reader if trace is None else TracedReader(choice.reader, trace)
    scratch: DecodeScratch | DeviceScratch | None = None
    try:
        scratch = _scratch(plan, stats, matmul=matmul, accelerator=accelerator)
        for weight in plan.weights():
            weight.use_scratch(scratch)
            weight.use_matmul(matmul)
        if accelerator is not None:
            move_dense(model, accelerator.device)  # embeddings that stay
        Runtime(
            model,
            list(plan.blocks),
            plan.placement,
            reader=opened,
            reader_reason=choice.reason,
            scratch=scratch,
            stats=stats,
            depth=depth,
            tables=plan.tables,
            experts=plan.experts,
            expert_slots=plan.expert_slots,
            verify=verify,
            dense_bytes=dense_bytes(model),
            accelerator=accelerator,
        )
    except BaseException as error:
        opened.close()
        if scratch is not None:
            scratch.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise PlanError(
                f"the memory of {where} is not enough ({error}); lower device_memory, context_length or depth"
            ) from error
        raise
    return model


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


def context_tokens(model: Any, wanted: int | None) -> int:
    """Tokens that there has to be room for: as wanted, or a usual number; never more than the model can."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _USUAL_CONTEXT
    return min(wanted, most) if wanted is not None else min(_USUAL_CONTEXT, most)


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


def _place_on(
    accelerator: Accelerator,
    model: Any,
    parts: Parts,
    checkpoint: Checkpoint,
    budgets: Budgets,
    **options: Any,
) -> ModelPlan:
    """`place` on a device with its own memory, whose budget is what fits if nobody says."""
    free = accelerator.free_bytes()
    if budgets.device_bytes is None:
        fits = default_device_bytes(
            parts.sizes, depth=options["depth"], context_tokens=options["context_tokens"], free_bytes=free
        )
        budgets = replace(budgets, device_bytes=fits)
    return place(model, parts, checkpoint, budgets, device_free_bytes=free, **options)


def _scratch(
    plan: ModelPlan, stats: StatsRecorder, *, matmul: str, accelerator: Accelerator | None
) -> DecodeScratch | DeviceScratch:
    if accelerator is None:
        return DecodeScratch(plan.decoded(), stats, matmul=matmul)
    names = [block.name for block in plan.blocks] + [table.name for table in plan.tables]
    return DeviceScratch(plan.decoded(), stats, matmul=matmul, accelerator=accelerator, blocks=names)


def _check_options(*, reader: object, depth: object, dtype: object) -> torch.dtype | None:
    """Refuse what cannot be, in words; gives the dtype to compute in."""
    if reader not in READER_NAMES:
        raise PlanError(f"reader {reader!r} is unknown; use {', '.join(READER_NAMES)}")
    if not isinstance(depth, int) or depth < 0:
        raise PlanError(f"depth must be a whole number from 0, found {depth!r}")
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in _DTYPES.values():
        raise PlanError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}")
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype


def _check_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        what = "tokens" if name == "context_length" else "bytes"
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise PlanError(f"{name} must be a number of {what} or None, found {value!r}")
    if isinstance(tokens := sizes["context_length"], int) and tokens < 1:
        raise PlanError(f"context_length must be 1 or more, found {tokens}")


def _check_room(checkpoint: CheckpointReader) -> None:
    """Refuse a checkpoint whose largest block is more than all memory, before anything is read."""
    free = available_bytes()
    largest = max((home.nbytes for home in checkpoint.blocks), default=0)
    if free is not None and largest > free:
        name = max(checkpoint.blocks, key=lambda home: home.nbytes).block.name
        raise PlanError(f"block {name!r} alone needs {largest} bytes of memory, {free} are free")

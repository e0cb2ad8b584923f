"""`endor.load`: an Endor checkpoint becomes a transformers model whose blocks are streamed or resident."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.errors import PlanError
from endor.formats import CheckpointReader
from endor.kernels.linear import check_matmul
from endor.loaders import READER_NAMES, available_bytes, choose_reader
from endor.runtime.install import dense_bytes, install_weights, stored_dtype
from endor.runtime.place import place
from endor.runtime.placement import Placement
from endor.runtime.scratch import DecodeScratch
from endor.runtime.skeleton import build_skeleton, check_complete
from endor.runtime.stats import StatsRecorder
from endor.runtime.streaming import Runtime, WeightBlock
from endor.runtime.survey import find_parts
from endor.runtime.trace import Trace, TracedReader

__all__ = ["default_host_bytes", "load", "runtime_of"]

_HOST_SHARE = 0.7
"""Share of the free memory that resident blocks take by default; the rest is for activations and others."""
_VERIFY = ("first", "always", "never")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": None}


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    host_memory: int | None = None,
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
        device: where to compute: `auto` or `cpu`.
        host_memory: bytes of compressed weights that may stay in memory: blocks first, then embeddings, then
            the experts used last; 0 streams everything from disk, None keeps as much as fits in 70 % of the
            memory that is free now.
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
        The transformers model; `model.generate` works, `model.endor_stats()` gives totals, and
        `endor.runtime.runtime_of(model)` the runtime with everything else. Streaming ends when the model is
        collected, or at `runtime_of(model).close()`. Threads that call the model take turns.

    Raises:
        LoadError: a file is missing or unreadable, or transformers does not know the model.
        FormatError: a file is damaged, or does not fit the model.
        PlanError: a budget or option cannot be met.
    """
    matmul = check_matmul(matmul)
    wanted = _check_options(device=device, reader=reader, depth=depth, host_memory=host_memory, dtype=dtype)
    if verify not in _VERIFY:
        raise PlanError(f"verify must be one of {', '.join(_VERIFY)}, found {verify!r}")
    stats = StatsRecorder(trace)
    with torch.device("cpu"), Checkpoint(directory) as checkpoint:
        model = build_skeleton(checkpoint.directory, dtype=wanted, stored=stored_dtype(checkpoint))
        _check_room(checkpoint)
        installed = install_weights(model, checkpoint)
        check_complete(model, Path(directory))
        budget = default_host_bytes() if host_memory is None else host_memory
        parts = find_parts(model, installed, checkpoint, matmul=matmul)
        plan = place(model, parts, checkpoint, host_bytes=budget, depth=depth, verify=verify != "never")
    scratch = DecodeScratch(plan.decoded(), stats, matmul=matmul)
    for weight in plan.weights():
        weight.use_scratch(scratch)
        weight.use_matmul(matmul)
    choice = choose_reader(reader)
    _start(
        model,
        list(plan.blocks),
        plan.placement,
        reader=choice.reader if trace is None else TracedReader(choice.reader, trace),
        reader_reason=choice.reason,
        scratch=scratch,
        stats=stats,
        depth=depth,
        tables=plan.tables,
        experts=plan.experts,
        expert_slots=plan.expert_slots,
        verify=verify,
        dense_bytes=dense_bytes(model),
    )
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


def _check_options(
    *, device: object, reader: object, depth: object, host_memory: object, dtype: object
) -> torch.dtype | None:
    """Refuse what cannot be, in words; gives the dtype to compute in."""
    if str(device) not in ("auto", "cpu"):
        raise PlanError(f"device {str(device)!r} is not supported; use auto or cpu")
    if reader not in READER_NAMES:
        raise PlanError(f"reader {reader!r} is unknown; use {', '.join(READER_NAMES)}")
    if not isinstance(depth, int) or depth < 0:
        raise PlanError(f"depth must be a whole number from 0, found {depth!r}")
    if host_memory is not None and not isinstance(host_memory, int):
        raise PlanError(f"host_memory must be a number of bytes or None, found {host_memory!r}")
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in _DTYPES.values():
        raise PlanError(f"dtype must be one of {', '.join(_DTYPES)}, found {dtype!r}")
    assert dtype is None or isinstance(dtype, torch.dtype)
    return dtype


def _check_room(checkpoint: CheckpointReader) -> None:
    """Refuse a checkpoint whose largest block is more than all memory, before anything is read."""
    free = available_bytes()
    largest = max((home.nbytes for home in checkpoint.blocks), default=0)
    if free is not None and largest > free:
        name = max(checkpoint.blocks, key=lambda home: home.nbytes).block.name
        raise PlanError(f"block {name!r} alone needs {largest} bytes of memory, {free} are free")


def _start(model: nn.Module, blocks: list[WeightBlock], placement: Placement, **parts: Any) -> None:
    """Start the runtime, which the model then owns; what it was given is closed if that fails."""
    try:
        Runtime(model, blocks, placement, **parts)
    except BaseException:
        parts["reader"].close()
        parts["scratch"].close()
        raise

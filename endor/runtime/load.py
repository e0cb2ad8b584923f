"""`endor.load`: an Endor checkpoint becomes a transformers model whose blocks are streamed or resident."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.errors import PlanError
from endor.formats.header import TensorEntry
from endor.formats.reader import BlockRange
from endor.kernels.tensor import BitmapTensor
from endor.loaders import PosixReader, available_bytes
from endor.runtime.placement import Placement, plan_placement
from endor.runtime.scratch import DecodeScratch
from endor.runtime.skeleton import build_skeleton, check_complete, find_module, install
from endor.runtime.stats import StatsRecorder
from endor.runtime.streaming import Runtime, WeightBlock

__all__ = ["load", "runtime_of"]

_HOST_SHARE = 0.7
"""Share of the available memory that resident blocks may take by default; the rest is for activations and
others."""


def load(
    directory: str | os.PathLike[str],
    *,
    device: str = "auto",
    host_memory: int | None = None,
    reader: str = "auto",
    depth: int = 2,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a converted model so that it runs with only a part of it in memory.

    Args:
        directory: an Endor checkpoint, as `endor.convert` writes it.
        device: where to compute: `auto` or `cpu`.
        host_memory: bytes of compressed blocks that may stay in memory; 0 streams every block from disk, None
            keeps as
            many as fit in 70 % of the memory available now.
        reader: how blocks are read from disk: `auto` or `posix`.
        depth: blocks that are read ahead of the one that runs; 0 reads each when it is needed.
        dtype: to compute in; the model's own by default.

    Returns:
        The transformers model; `model.generate` works, `model.endor_stats()` gives totals, and
        `endor.runtime.runtime_of(model)` the runtime with everything else. Streaming ends when the model is
        collected, or at `runtime_of(model).close()`.

    Raises:
        LoadError: a file is missing or unreadable, or transformers does not know the model.
        FormatError: a file is damaged, or does not fit the model.
        PlanError: a budget or option cannot be met.
    """
    _check_options(device=device, reader=reader, depth=depth)
    stats = StatsRecorder()
    with Checkpoint(directory) as checkpoint:
        stored = _stored_dtype(checkpoint)
        model = build_skeleton(checkpoint.directory, dtype=dtype, stored=stored)
        blocks = list(_install_weights(model, checkpoint, dtype))
        check_complete(model, Path(directory))
    sizes = [block.home.nbytes for block in blocks]
    budget = default_host_bytes() if host_memory is None else host_memory
    placement = plan_placement([block.name for block in blocks], sizes, host_bytes=budget)
    weights = [w for block in blocks for group in block.weights.values() for w in group]
    scratch = DecodeScratch([(w.packed_layout, w.dtype) for w in weights if not _is_direct(w)], stats)
    for weight in weights:
        weight.use_scratch(scratch)
    _start(model, blocks, placement, depth=depth, reader=PosixReader(), scratch=scratch, stats=stats)
    return model


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a model that `load` returned. Raises PlanError for any other model."""
    runtime = getattr(model, "endor_runtime", None)
    if not isinstance(runtime, Runtime):
        raise PlanError(f"this {type(model).__name__} was not loaded by endor.load, or its runtime is closed")
    return runtime


def default_host_bytes() -> int:
    """Bytes of resident blocks that `host_memory=None` allows now."""
    return int(_HOST_SHARE * (available_bytes() or 0))


def _check_options(*, device: str, reader: str, depth: int) -> None:
    if device not in ("auto", "cpu"):
        raise PlanError(f"device {device!r} is not supported; use auto or cpu")
    if reader not in ("auto", "posix"):
        raise PlanError(f"reader {reader!r} is unknown; use auto or posix")
    if depth < 0:
        raise PlanError(f"depth must be 0 or more, found {depth}")


def _start(model: nn.Module, blocks: list[WeightBlock], placement: Placement, **parts: Any) -> None:
    """Start the runtime, which the model then owns; what it was given is closed if that fails."""
    try:
        Runtime(model, blocks, placement, **parts)
    except BaseException:
        parts["reader"].close()
        parts["scratch"].close()
        raise


def _install_weights(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[WeightBlock]:
    """Put every tensor of the checkpoint into the model; yields the blocks whose weights are packed."""
    for home in checkpoint.blocks:
        module = find_module(model, home.block.name)
        weights: dict[str, tuple[BitmapTensor, ...]] = {}
        for entry in home.block.entries:
            if module is not None and _is_streamable(model, entry, home):
                weights[entry.name] = (_install_packed(model, entry, dtype),)
            else:
                _install_dense(model, entry, checkpoint, dtype)
        if weights:
            assert module is not None
            yield WeightBlock(module, home, weights)


def _is_streamable(model: nn.Module, entry: TensorEntry, home: BlockRange) -> bool:
    """Whether only one Linear inside the block's module uses the weight, so that it is needed there and then
    only."""
    if entry.aliases or not entry.name.startswith(home.block.name + "."):
        return False
    parent, _, leaf = entry.name.rpartition(".")
    return leaf == "weight" and isinstance(find_module(model, parent), nn.Linear)


def _shown_dtype(stored: torch.dtype, model: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a stored tensor has in the model: weights are floating point and follow it, other tensors do
    not."""
    if not stored.is_floating_point:
        return stored
    if dtype is not None:
        return dtype
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) else stored


def _install_packed(model: nn.Module, entry: TensorEntry, dtype: torch.dtype | None) -> BitmapTensor:
    shown = _shown_dtype(entry.layout.dtype, model, dtype)
    parameter = nn.Parameter(BitmapTensor(entry.layout, dtype=shown), requires_grad=False)
    install(model, entry.name, parameter)
    assert isinstance(parameter, BitmapTensor)
    return parameter


def _install_dense(
    model: nn.Module, entry: TensorEntry, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> None:
    dense = checkpoint.read_dense(entry.name)
    shared = nn.Parameter(dense.to(_shown_dtype(dense.dtype, model, dtype)), requires_grad=False)
    for name in (entry.name, *entry.aliases):
        install(model, name, shared)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most floating-point weights."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in checkpoint.entries.values():
        if entry.layout.dtype.is_floating_point:
            sizes[entry.layout.dtype] += entry.layout.geometry.numel
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _is_direct(weight: BitmapTensor) -> bool:
    """Whether a matmul reads the sections as they are, without decoding."""
    return weight.packed_layout.is_plain and weight.packed_layout.dtype == weight.dtype

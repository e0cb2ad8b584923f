"""Puts the tensors of a checkpoint into a model: packed where a block can be streamed, dense elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.formats.header import TensorEntry
from endor.formats.reader import BlockRange
from endor.kernels.tensor import BitmapTensor
from endor.models import is_linear
from endor.runtime.blocks import WeightBlock
from endor.runtime.skeleton import find_module, install
from endor.runtime.sliced import SlicedWeight

__all__ = [
    "Installed",
    "dense_bytes",
    "install_dense",
    "install_unread",
    "install_weights",
    "is_direct",
    "move_dense",
    "stored_dtype",
]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Installed:
    """What of a model is not dense in memory, still without its bytes.

    Attributes:
        blocks: in execution order.
        tables: embeddings by entry name, perhaps tied to a head.
        experts: by the module that computes with them and the entry's name: stacks of matrices.
    """

    blocks: tuple[WeightBlock, ...]
    tables: dict[str, SlicedWeight]
    experts: dict[nn.Module, dict[str, SlicedWeight]]


_Weight = TypeVar("_Weight", bound=BitmapTensor)


def install_weights(
    model: Any,
    checkpoint: Checkpoint,
    *,
    dense: Callable[[Any, TensorEntry, Checkpoint], None] | None = None,
    device: torch.device = _CPU,
) -> Installed:
    """Put every tensor of `checkpoint` into `model`, a skeleton whose dtypes are those that are wanted.

    Args:
        device: where packed weights will be used; dense ones are moved there by `move_dense`.
        dense: what is done with those that stay as they are: `install_dense`, or `install_unread` for a model
            that is only planned for.

    Raises FormatError, ChecksumError and LoadError for what cannot be read or does not fit.
    """
    dense = install_dense if dense is None else dense
    blocks = []
    tables: dict[str, SlicedWeight] = {}
    experts: dict[nn.Module, dict[str, SlicedWeight]] = {}
    for home in checkpoint.blocks:
        module = find_module(model, home.block.name)
        weights: dict[str, BitmapTensor] = {}
        apart: set[str] = set()
        for entry in home.block.entries:
            owner = find_module(model, entry.name.rpartition(".")[0])
            if module is not None and _is_streamable(model, entry, home):
                head = owner is module
                weights[entry.name] = _install_packed(
                    model, entry, SlicedWeight if head else BitmapTensor, device
                )
            elif owner is not None and _is_experts(owner, entry):
                experts.setdefault(owner, {})[entry.name] = _install_packed(
                    model, entry, SlicedWeight, device
                )
                apart.add(entry.name)
            elif _is_table(model, entry):
                tables[entry.name] = _install_packed(model, entry, SlicedWeight, device)
            else:
                dense(model, entry, checkpoint)
        if weights:
            assert module is not None
            blocks.append(WeightBlock(module, home, weights, left_out=frozenset(apart)))
    return Installed(tuple(blocks), tables, experts)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most floating-point weights."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in checkpoint.entries.values():
        if entry.layout.dtype.is_floating_point:
            sizes[entry.layout.dtype] += entry.layout.geometry.numel
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def move_dense(model: nn.Module, device: torch.device) -> None:
    """Move everything that is not packed to `device`; tied parameters stay tied."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            tensors: dict[str, Any] = kept
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, BitmapTensor) or tensor.device == device:
                    continue
                there = moved.get(id(tensor))
                if there is None:
                    there = tensor.to(device)
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=False)
                    moved[id(tensor)] = there
                tensors[name] = there


def dense_bytes(model: nn.Module) -> int:
    """Memory of the parameters that are dense and stay: embeddings, norms, biases, and what cannot be
    streamed."""
    return sum(p.nbytes for p in model.parameters() if not isinstance(p, BitmapTensor))


def is_direct(weight: BitmapTensor) -> bool:
    """Whether a matmul reads the sections as they are, without decoding."""
    return weight.packed_layout.is_plain and weight.packed_layout.dtype == weight.dtype


def _is_streamable(model: nn.Module, entry: TensorEntry, home: BlockRange) -> bool:
    """Whether one linear layer inside the block's module alone uses the weight: it is needed there and then
    only."""
    if entry.aliases or not entry.name.startswith(home.block.name + "."):
        return False
    parent, _, leaf = entry.name.rpartition(".")
    return leaf == "weight" and is_linear(find_module(model, parent))


def _is_experts(owner: nn.Module, entry: TensorEntry) -> bool:
    """Whether it is a stack of matrices, one for each expert, that the module takes one by one."""
    shape = entry.layout.shape
    return len(shape) == 3 and getattr(owner, "num_experts", None) == shape[0] and not entry.aliases


def _is_table(model: nn.Module, entry: TensorEntry) -> bool:
    """Whether only embeddings look it up, and perhaps linear layers that are tied to them."""
    owners = [find_module(model, name.rpartition(".")[0]) for name in (entry.name, *entry.aliases)]
    return (
        entry.layout.is_plain
        and len(entry.layout.shape) == 2
        and isinstance(owners[0], nn.Embedding)
        and owners[0].max_norm is None
        and all(isinstance(owner, (nn.Embedding, nn.Linear)) for owner in owners)
        and all(name.endswith(".weight") for name in (entry.name, *entry.aliases))
    )


def _shown_dtype(model: Any, name: str, stored: torch.dtype) -> torch.dtype:
    """The dtype the tensor has in the model: the skeleton's, but float32 where the model class asks for
    it."""
    parent, _, leaf = name.rpartition(".")
    module = find_module(model, parent)
    current = None if module is None else module._parameters.get(leaf, module._buffers.get(leaf))
    if current is None or not stored.is_floating_point:
        return stored
    if any(re.search(rf"(^|\.){re.escape(kept)}(\.|$)", name) for kept in _kept_in_float32(model)):
        return torch.float32
    return current.dtype


def _kept_in_float32(model: Any) -> set[str]:
    """Names of modules that transformers keeps in float32, for the dtype of this model."""
    kept: set[str] = set()
    if model.dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if model.dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return kept


def _install_packed(model: Any, entry: TensorEntry, kind: type[_Weight], device: torch.device) -> _Weight:
    shown = _shown_dtype(model, entry.name, entry.layout.dtype)
    parameter: Any = nn.Parameter(kind(entry.layout, dtype=shown, device=device), requires_grad=False)
    for name in (entry.name, *entry.aliases):
        install(model, name, parameter)
    weight: _Weight = parameter
    return weight


def install_dense(model: Any, entry: TensorEntry, checkpoint: Checkpoint) -> None:
    """Read an entry, decode it and make it the model's parameter or buffer of that name."""
    dense = checkpoint.read_dense(entry.name)
    shared = nn.Parameter(dense.to(_shown_dtype(model, entry.name, dense.dtype)), requires_grad=False)
    for name in (entry.name, *entry.aliases):
        install(model, name, shared)


def install_unread(model: Any, entry: TensorEntry, _: Checkpoint) -> None:
    """Make a tensor on meta, as large as `install_dense` would make it, the model's parameter or buffer."""
    layout = entry.layout
    shown = torch.empty(layout.shape, dtype=_shown_dtype(model, entry.name, layout.dtype), device="meta")
    shared = nn.Parameter(shown, requires_grad=False)
    for name in (entry.name, *entry.aliases):
        install(model, name, shared)

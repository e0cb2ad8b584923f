"""The model as transformers builds it, on the meta device: blocks in execution order, Linear weights, tied
weights.

Nothing here knows an architecture by name. Blocks are the elements of the outermost ModuleLists of equal
modules that own Linear weights (decoder layers, encoder layers); every other module that owns tensors is a
block of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from endor.errors import ConvertError
from endor.models import is_linear, read_model_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LinearWeight", "ModelTree", "TreeBlock", "build_model_tree", "runnable_copy"]


@dataclass(frozen=True)
class TreeBlock:
    """A module that is streamed as a unit, or the tensors a module owns itself.

    Attributes:
        name: path of the module.
        tensors: state-dict names, in the model's order.
        repeated: whether it is an element of a block list, so that its Linear weights are pruned by default.
    """

    name: str
    tensors: tuple[str, ...]
    repeated: bool


@dataclass(frozen=True)
class LinearWeight:
    """A matrix that multiplies activations.

    Attributes:
        name: state-dict name.
        module: path of the module that owns it.
        input_dim: the dimension that the activations' features run along.
        fused: whether it is a stack of matrices, one per expert; `input_dim` then says nothing.
    """

    name: str
    module: str
    input_dim: int
    fused: bool = False


@dataclass(frozen=True)
class ModelTree:
    """A model on the meta device with what conversion needs to know of it.

    Attributes:
        model: transformers' own module tree; its parameters are on meta.
        shapes: of every tensor of the state dict.
        ties: name -> name of the tensor it is tied to.
        segments: names of the block lists in execution order, each with the names of its blocks.
        blocks: every block, in execution order; a tied tensor stands in the block of the tensor it is tied
            to.
        linears: the matrices of the repeated blocks by name.
        linear_names: names of the weights of all Linears, such as a head that is not tied.
    """

    model: PreTrainedModel
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    segments: Mapping[str, tuple[str, ...]]
    blocks: tuple[TreeBlock, ...]

    @cached_property
    def linears(self) -> Mapping[str, LinearWeight]:
        found = (w for b in self.blocks if b.repeated for w in _linear_weights(self.model, b))
        return {weight.name: weight for weight in found}

    @cached_property
    def linear_names(self) -> frozenset[str]:
        found = (w for b in self.blocks for w in _linear_weights(self.model, b))
        return frozenset(weight.name for weight in found if not weight.fused)


def build_model_tree(directory: Path) -> ModelTree:
    """Build the model that config.json in `directory` describes.

    Raises ConvertError if transformers does not know it.
    """
    cls, parsed = read_model_class(directory, error=ConvertError)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls(parsed).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise ConvertError(
            f"{directory}: {cls.__name__} cannot be built from its config.json ({error})"
        ) from error
    state = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    ties = _resolve_ties(dict(model.all_tied_weights_keys), shapes)
    segments = {
        name: tuple(f"{name}.{i}" for i in range(len(module))) for name, module in _block_lists(model)
    }
    return ModelTree(model, shapes, ties, segments, _order_blocks(model, list(shapes), ties, segments))


def runnable_copy(tree: ModelTree, *, dtype: torch.dtype) -> PreTrainedModel:
    """The same model once more with real buffers, as running it takes; its parameters are on meta, of
    `dtype`."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = type(tree.model)._from_config(tree.model.config, dtype=dtype)
    model.eval().requires_grad_(False)
    return model


def _resolve_ties(tied: Mapping[str, str], shapes: Mapping[str, Any]) -> dict[str, str]:
    """Follow chains of ties to their end; drop what the state dict does not have."""
    resolved = {}
    for name in tied:
        end = name
        while end in tied:
            end = tied[end]
        if name in shapes and end in shapes and end != name:
            resolved[name] = end
    return resolved


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost ModuleLists of equal modules that own Linear weights below them."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList) and _is_block_list(child):
                yield below, child
            else:
                yield from walk(child, below)

    return walk(model, "")


def _is_block_list(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and all(any(is_linear(m) for m in e.modules() if m is not e) for e in modules)


def _linear_weights(model: nn.Module, block: TreeBlock) -> Iterator[LinearWeight]:
    for name in block.tensors:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute == "weight" and is_linear(module):
            yield LinearWeight(name, path, input_dim=1 if isinstance(module, nn.Linear) else 0)
        elif isinstance(parameter := getattr(module, attribute), nn.Parameter) and parameter.dim() == 3:
            yield LinearWeight(name, path, input_dim=2, fused=True)


def _order_blocks(
    model: PreTrainedModel, names: list[str], ties: Mapping[str, str], segments: Mapping[str, tuple[str, ...]]
) -> tuple[TreeBlock, ...]:
    """Blocks in the order in which their modules first run; in the order of the tree where that cannot be
    found."""
    repeated = {block for blocks in segments.values() for block in blocks}
    owners: dict[str, list[str]] = {}
    for name in names:
        if name not in ties:
            owners.setdefault(_owner(name, repeated), []).append(name)
    ran = _execution_order(model, repeated)
    order = {name: position for position, name in enumerate(ran)}
    unseen = _unseen_rank(model, repeated)
    ranked = sorted(owners, key=lambda name: (0, order[name]) if name in order else unseen(name, order))
    return tuple(TreeBlock(name, tuple(owners[name]), name in repeated) for name in ranked)


def _owner(name: str, repeated: set[str]) -> str:
    parts = name.split(".")
    for i in range(1, len(parts)):
        if (prefix := ".".join(parts[:i])) in repeated:
            return prefix
    # A tensor of the model itself, such as BART's final_logits_bias, is a block of its own name.
    return name.rpartition(".")[0] or name


def _unseen_rank(model: nn.Module, repeated: set[str]) -> Callable[[str, Mapping[str, int]], tuple[int, int]]:
    """Where modules go that the trial run did not see: embeddings first, the others where the tree has
    them."""
    tree = {name: position for position, (name, _) in enumerate(model.named_modules())}

    def rank(name: str, order: Mapping[str, int]) -> tuple[int, int]:
        if order:
            earlier = [order[n] for n in order if tree[n] < tree.get(name, len(tree))]
            return (0, max(earlier, default=-1))
        if name not in tree:
            return (0, len(tree))
        embedding = name not in repeated and isinstance(model.get_submodule(name), nn.Embedding)
        return (-1 if embedding else 0, tree[name])

    return rank


def _execution_order(model: PreTrainedModel, repeated: set[str]) -> list[str]:
    """Names of modules in the order of their first call, from a run on meta with blocks that pass their
    input on.

    Empty if the model cannot run that way.
    """
    ran: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)))
    attention = model.config._attn_implementation
    try:
        # A meta tensor has no values to look at. Eager masks do without: in decoders only if a mask is
        # given, in encoders only if none is.
        model.set_attn_implementation("eager")
        for with_mask, as_tuple in product((True, False), (False, True)):
            ran.clear()
            if _trial_run(model, repeated, with_mask=with_mask, as_tuple=as_tuple):
                return list(dict.fromkeys(ran))
    finally:
        if attention is not None:
            model.set_attn_implementation(attention)
        for handle in handles:
            handle.remove()
    return []


def _trial_run(model: PreTrainedModel, repeated: set[str], *, with_mask: bool, as_tuple: bool) -> bool:
    def pass_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None, None, None) if as_tuple else hidden

    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "use_cache": False, **({"attention_mask": ids} if with_mask else {})}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    blocks = [model.get_submodule(name) for name in repeated]
    try:
        for block in blocks:
            block.forward = pass_on
        with torch.no_grad():
            model(**inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False  # the order of the tree is the fallback, and only the layout of the file depends on it
    finally:
        for block in blocks:
            del block.forward
    return True

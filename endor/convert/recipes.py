"""How each tensor of the model is made from tensors of the source: renamed, or merged by transformers' own
operations.

Checkpoints differ from the module tree: a base model's prefix present or absent, names of older releases,
experts stored one by one. transformers has the rules for all of that, and this module asks it instead of
repeating them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from endor.convert.modeltree import ModelTree
from endor.convert.weight_files import SourceTensor
from endor.errors import ConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Recipe", "plan_recipes"]

Read = Callable[[str], torch.Tensor]
_SHOWN = 5


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the model comes out of the source.

    Attributes:
        name: state-dict name.
        shape: of the tensor.
        dtype: of the tensor, which is the source's.
        sources: names of the source tensors it is made from.
        source_bytes: bytes of all of them: what making the tensor reads.
        merge: makes it from the sources, where that takes more than one reading.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    source_bytes: int
    merge: Callable[[Read], torch.Tensor] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def make(self, read: Read) -> torch.Tensor:
        """The tensor, from sources that `read` gives."""
        return read(self.sources[0]) if self.merge is None else self.merge(read)


def plan_recipes(tree: ModelTree, tensors: Mapping[str, SourceTensor], read: Read) -> dict[str, Recipe]:
    """A recipe for every tensor of the model that is not tied to another one.

    Args:
        tree: the model.
        tensors: of the source checkpoint.
        read: reads one of them; used where the source has both of two tied tensors, to compare them.

    Warns about tensors that the model has no use for.

    Raises ConvertError if a tensor of the model has no source, or one of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(tree.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    direct, merged, unexpected = _match(tree, tensors, renamings, converters)
    recipes = {target: _direct(target, tensors[source]) for target, source in direct.items()}
    for converter, sources in merged.items():
        recipes.update(_merged(tree.model, converter, sources, tensors))
    _check_shapes(tree, recipes)
    recipes = _keep_one_of_tied(tree, recipes, read)
    _check_missing(tree, recipes)
    _report_unexpected(tree.model, unexpected)
    return recipes


@dataclass(frozen=True)
class _Conversion:
    """A converter of transformers that makes the targets that start with `first_target`."""

    first_target: str
    converter: Any = field(hash=False, compare=False)


def _match(
    tree: ModelTree, tensors: Iterable[str], renamings: list[Any], converters: list[Any]
) -> tuple[dict[str, str], dict[_Conversion, list[tuple[str, str]]], list[str]]:
    """Sort the source's names into direct matches, inputs of converters (name, pattern), and what matches
    nothing."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    model, state = tree.model, dict.fromkeys(tree.shapes, True)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    direct: dict[str, str] = {}
    merged: dict[_Conversion, list[tuple[str, str]]] = {}
    unexpected: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            unexpected.append(name)
        elif pattern is None:
            if target in direct:
                raise ConvertError(
                    f"the source has {name!r} and {direct[target]!r}, which both stand for {target!r}"
                )
            direct[target] = name
        else:
            merged.setdefault(_Conversion(target, by_pattern[pattern]), []).append((name, pattern))
    return direct, merged, unexpected


def _direct(target: str, tensor: SourceTensor) -> Recipe:
    return Recipe(target, tensor.shape, tensor.dtype, (tensor.name,), tensor.nbytes)


def _merged(
    model: PreTrainedModel,
    conversion: _Conversion,
    sources: list[tuple[str, str]],
    tensors: Mapping[str, SourceTensor],
) -> dict[str, Recipe]:
    """Recipes of all tensors that one converter makes; shapes come from a run of it on meta tensors."""

    def on_meta(name: str) -> torch.Tensor:
        return torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta")

    made = _convert(model, conversion, sources, on_meta)
    names = tuple(name for name, _ in sources)
    total = sum(tensors[name].nbytes for name in names)
    return {
        target: Recipe(
            target,
            tuple(tensor.shape),
            tensor.dtype,
            names,
            total,
            partial(_convert_one, model, conversion, sources, target),
        )
        for target, tensor in made.items()
    }


def _convert_one(
    model: PreTrainedModel, conversion: _Conversion, sources: list[tuple[str, str]], target: str, read: Read
) -> torch.Tensor:
    return _convert(model, conversion, sources, read)[target].contiguous()


def _convert(
    model: PreTrainedModel, conversion: _Conversion, sources: list[tuple[str, str]], read: Read
) -> dict[str, torch.Tensor]:
    converter = deepcopy(conversion.converter)
    for name, pattern in sources:
        converter.add_tensor(conversion.first_target, name, pattern, partial(read, name))
    try:
        made = converter.convert(conversion.first_target, model=model, config=model.config)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ConvertError(
            f"{type(model).__name__}: transformers could not make {conversion.first_target!r} from "
            f"{sources[0][0]!r} and {len(sources) - 1} more ({error})"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _check_shapes(tree: ModelTree, recipes: Mapping[str, Recipe]) -> None:
    for name, recipe in recipes.items():
        if name in tree.shapes and recipe.shape != tree.shapes[name]:
            raise ConvertError(
                f"tensor {recipe.sources[0]!r} has shape {list(recipe.shape)}, but config.json makes "
                f"{name!r} {list(tree.shapes[name])}; config and weights do not belong together"
            )


def _keep_one_of_tied(tree: ModelTree, recipes: Mapping[str, Recipe], read: Read) -> dict[str, Recipe]:
    """Each group of tied tensors under the name the others are tied to, whichever of its names the source
    has."""
    kept = {name: recipe for name, recipe in recipes.items() if name not in tree.ties}
    for name, end in tree.ties.items():
        if name not in recipes:
            continue
        if end not in kept:
            kept[end] = replace(recipes[name], name=end)
        elif not _same_bits(recipes[name], kept[end], read):
            raise ConvertError(
                f"config.json ties {name!r} to {end!r}, but the source has both and they differ. If the "
                "model is not tied, set tie_word_embeddings to false in its config.json"
            )
    return kept


def _same_bits(one: Recipe, other: Recipe, read: Read) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.make(read).view(torch.uint8), other.make(read).view(torch.uint8))


def _check_missing(tree: ModelTree, recipes: Mapping[str, Recipe]) -> None:
    ignored = _pattern(tree.model._keys_to_ignore_on_load_missing)
    missing = [
        n
        for n in tree.shapes
        if n not in recipes and n not in tree.ties and not (ignored and ignored.search(n))
    ]
    if missing:
        raise ConvertError(
            f"the source lacks {len(missing)} tensors that {type(tree.model).__name__} needs: "
            f"{_some(missing)}. config.json (architectures) and the weights do not belong together, or the "
            "download is incomplete"
        )


def _report_unexpected(model: PreTrainedModel, unexpected: list[str]) -> None:
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    # Buffers that older releases stored and that transformers now computes, as its own loading has it.
    ignored = _pattern(
        {*patterns, r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"}
    )
    left = [name for name in unexpected if not (ignored and ignored.search(name))]
    if left:
        warnings.warn(
            f"{len(left)} tensors of the source are not part of {type(model).__name__} and are left out: "
            f"{_some(left)}",
            stacklevel=2,
        )


def _pattern(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({p})" for p in sorted(patterns))) if patterns else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

"""The plan of a conversion: which tensor goes where, pruned or not, decided before anything is read or
written.

The plan follows from names, shapes and options alone, so that an interrupted conversion plans the same
shards again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from endor.convert.modeltree import LinearWeight, ModelTree
from endor.convert.options import ConvertOptions
from endor.convert.recipes import Recipe
from endor.errors import ConvertError
from endor.formats.dtypes import PACKABLE, dtype_name
from endor.formats.layout import BLOCK_ALIGNMENT_BYTES, SECTION_ALIGNMENT_BYTES, Geometry, align_up
from endor.formats.packed import PackedTensor, TensorLayout
from endor.formats.writer import header_bytes_bound
from endor.pruning import Criterion, NofM

__all__ = ["BlockPlan", "ConversionPlan", "Packed", "ShardPlan", "TensorPlan", "plan_conversion"]

_SECTIONS_AT_MOST = 8
# A pruned tensor of 16-bit values is in memory with its scores, a copy of them to select in, and the mask;
# later with its packed form and the decoded one. Both stay below four times the tensor.
_SELECTED_COST = 4
# One that is only coded is in memory with its coded form and what coding it takes: 2.5 times the tensor was
# measured for codec `exponent`, 3 where coding does not pay.
_CODED_COST = 3


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        recipe: how it is made from the source; gives name, shape and dtype.
        aliases: names of tensors tied to it.
        linear: set if the tensor is to be pruned and packed.
        coded: whether it is not pruned, but losslessly coded.
        stored_bytes: how many bytes its sections have at most.
    """

    recipe: Recipe
    aliases: tuple[str, ...]
    linear: LinearWeight | None
    coded: bool
    stored_bytes: int

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def memory_bytes(self) -> int:
        """Memory that making, pruning and packing it takes."""
        made = self.recipe.nbytes + (self.recipe.source_bytes if self.recipe.merge else 0)
        cost = _SELECTED_COST if self.linear else _CODED_COST if self.coded else 1
        return max(made, self.recipe.nbytes * cost)


Packed = tuple[TensorPlan, PackedTensor]
"""A tensor of the plan in the form that is written."""


@dataclass(frozen=True)
class BlockPlan:
    """One block of the output and whether it is an element of a block list."""

    name: str
    tensors: tuple[TensorPlan, ...]
    repeated: bool

    @property
    def stored_bytes(self) -> int:
        sections = sum(t.stored_bytes + _SECTIONS_AT_MOST * SECTION_ALIGNMENT_BYTES for t in self.tensors)
        return align_up(sections, BLOCK_ALIGNMENT_BYTES)


@dataclass(frozen=True)
class ShardPlan:
    """One file of the output."""

    number: int
    blocks: tuple[BlockPlan, ...]

    @property
    def header_bytes(self) -> int:
        """Room its header needs at most."""
        names = [n for b in self.blocks for t in b.tensors for n in (t.name, *t.aliases)]
        return header_bytes_bound([*names, *(b.name for b in self.blocks)])

    @property
    def stored_bytes(self) -> int:
        return self.header_bytes + sum(block.stored_bytes for block in self.blocks)


@dataclass(frozen=True)
class ConversionPlan:
    """All shards of the output."""

    tree: ModelTree
    shards: tuple[ShardPlan, ...]

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        return (tensor for shard in self.shards for block in shard.blocks for tensor in block.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.recipe.nbytes for tensor in self.tensors)

    @property
    def largest_tensor_bytes(self) -> int:
        return max((max(t.recipe.nbytes, t.recipe.source_bytes) for t in self.tensors), default=0)


def plan_conversion(
    tree: ModelTree, recipes: Mapping[str, Recipe], options: ConvertOptions
) -> ConversionPlan:
    """Decide on tensors, blocks and shards.

    Raises ConvertError for a pattern or a selection that does not fit the model.
    """
    selected = _select(tree, recipes, options)
    aliases: dict[str, list[str]] = {}
    for name, end in tree.ties.items():
        aliases.setdefault(end, []).append(name)
    blocks = []
    for block in tree.blocks:
        tensors = tuple(
            _plan_tensor(tree, recipes[name], tuple(aliases.get(name, ())), selected.get(name), options)
            for name in block.tensors
            if name in recipes
        )
        if tensors:
            blocks.append(BlockPlan(block.name, tensors, block.repeated))
    return ConversionPlan(tree, tuple(_cut(blocks, options.shard_bytes)))


def _select(
    tree: ModelTree, recipes: Mapping[str, Recipe], options: ConvertOptions
) -> dict[str, LinearWeight]:
    """The matrices to prune and pack, by name."""
    for option, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in tree.shapes):
                raise ConvertError(
                    f"--{option} {pattern!r} matches no tensor of the model; names look like {_sample(tree)}"
                )
    selected = {}
    for name, recipe in recipes.items():
        linear = _linear_of(tree, recipe, included=_matches(name, options.include))
        wanted = _matches(name, options.include) if options.include else linear is not None
        if wanted and linear is not None and not _matches(name, options.exclude):
            _check_rule(linear, recipe, options)
            selected[name] = linear
    return selected


def _linear_of(tree: ModelTree, recipe: Recipe, *, included: bool) -> LinearWeight | None:
    linear = tree.linears.get(recipe.name)
    if linear is None and included:
        linear = LinearWeight(recipe.name, recipe.name.rpartition(".")[0], input_dim=1)
    if linear is None:
        return None
    problem = None
    if len(recipe.shape) != (3 if linear.fused else 2):
        problem = f"has shape {list(recipe.shape)}; only matrices can be pruned"
    elif recipe.dtype not in PACKABLE:
        problem = f"is {recipe.dtype}; weights can be {', '.join(dtype_name(d) for d in PACKABLE)}"
    if problem and included:
        raise ConvertError(f"--include selects {recipe.name!r}, which {problem}")
    return None if problem else linear


def _check_rule(linear: LinearWeight, recipe: Recipe, options: ConvertOptions) -> None:
    if options.criterion is None:
        return
    if linear.fused and isinstance(options.rule, NofM):
        raise ConvertError(
            f"{recipe.name}: pattern {options.pattern} is not supported for experts stored as one tensor. "
            f"Leave them out with --exclude '{recipe.name}', or use --pattern unstructured"
        )
    options.rule.check_shape(recipe.name, recipe.shape[linear.input_dim])


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sample(tree: ModelTree) -> str:
    names = list(tree.linears) or list(tree.shapes)
    return ", ".join(names[:2])


def _plan_tensor(
    tree: ModelTree,
    recipe: Recipe,
    aliases: tuple[str, ...],
    linear: LinearWeight | None,
    options: ConvertOptions,
) -> TensorPlan:
    stored = recipe.nbytes
    if linear is not None and options.criterion is not None:
        kept = _kept_at_most(recipe, linear, options.criterion, options)
        stored = min(stored, TensorLayout(recipe.shape, recipe.dtype, "bitmap", "raw", kept).nbytes)
    # A tied weight is also looked up by rows or used elsewhere: it is decoded once, when it is loaded.
    coded = linear is None and not aliases and recipe.name in tree.linear_names and options.values != "raw"
    return TensorPlan(recipe, aliases, linear, coded, stored)


def _kept_at_most(recipe: Recipe, linear: LinearWeight, criterion: Criterion, options: ConvertOptions) -> int:
    rows, cols = recipe.shape[-2:]
    if linear.input_dim == 0:
        rows, cols = cols, rows
    per_matrix = [
        options.rule.kept_at_most(rows, cols, per_row=per_row) for per_row in {criterion.per_row, False}
    ]
    matrices = Geometry.of(recipe.shape).rows // recipe.shape[-2] if recipe.shape[-2] else 0
    return matrices * max(per_matrix)


def _cut(blocks: Sequence[BlockPlan], shard_bytes: int) -> Iterator[ShardPlan]:
    """Fill shards with whole blocks up to the size."""
    open_blocks: list[BlockPlan] = []
    number = 0
    for block in blocks:
        if open_blocks and ShardPlan(number, (*open_blocks, block)).stored_bytes > shard_bytes:
            yield ShardPlan(number, tuple(open_blocks))
            number, open_blocks = number + 1, []
        open_blocks.append(block)
    yield ShardPlan(number, tuple(open_blocks))

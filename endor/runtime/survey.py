"""What of a model can be streamed, in which pieces, and how large they are: what the planner decides on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from endor.checkpoint import Checkpoint
from endor.formats.packed import TensorLayout
from endor.kernels.tensor import BitmapTensor
from endor.loaders import Unit
from endor.runtime.install import (
    Installed,
    dense_bytes,
    install_unread,
    install_weights,
    is_direct,
    stored_dtype,
)
from endor.runtime.planner import BlockSize, ExpertSize, ModelSizes, Piece, TableSize
from endor.runtime.scratch import decoded_bytes
from endor.runtime.skeleton import build_skeleton, check_complete
from endor.runtime.sliced import SlicedWeight
from endor.runtime.slices import ExpertStacks, Table, open_rows
from endor.runtime.streaming import WeightBlock

__all__ = [
    "USUAL_CONTEXT_TOKENS",
    "ContextSizes",
    "Parts",
    "context_sizes",
    "find_parts",
    "keeps_latent",
    "kind_of",
    "matrix_of",
    "survey",
]

USUAL_CONTEXT_TOKENS = 4096
"""Where nobody says how many: what most prompts and answers stay below."""
_TILE_BYTES = 16 << 20
"""Of a head, where no block says what is usual: requests of this size reach the disk's full speed."""
_HIDDEN_TENSORS = 8
"""As wide as the model: the residual, a norm in float32 and out of it, queries, keys, values, what attention
gives."""
_INNER_TENSORS = 3
"""As wide as an MLP: gate, up, and their product."""


@dataclass(frozen=True)
class Parts:
    """What of a model can be streamed, and its sizes.

    Attributes:
        blocks: in execution order; a head larger than every layer has its tiles as `table`.
        tables: embeddings, with tiles if they are heads too.
        experts: of each Mixture-of-Experts layer.
        sizes: of all these, in the same order.
        longest_context: tokens that the model can do, if its config says so.
    """

    blocks: tuple[WeightBlock, ...]
    tables: tuple[Table, ...]
    experts: tuple[ExpertStacks, ...]
    sizes: ModelSizes
    longest_context: int | None = None

    def context_tokens(self, wanted: int | None) -> int:
        """Tokens that there has to be room for: as wanted, or a usual number; no more than the model can."""
        tokens = USUAL_CONTEXT_TOKENS if wanted is None else wanted
        return tokens if self.longest_context is None else min(tokens, self.longest_context)


def survey(
    directory: str | os.PathLike[str], *, dtype: torch.dtype | None, matmul: str, own_memory: bool = False
) -> Parts:
    """The parts of the model in `directory`, of which only headers and offsets are read.

    Args:
        directory: an Endor checkpoint.
        dtype: to compute in; the model's own by default.
        matmul: as for `find_parts`; so is `own_memory`.

    Raises LoadError and FormatError as `endor.load` does.
    """
    with torch.device("cpu"), Checkpoint(directory) as checkpoint:
        model = build_skeleton(checkpoint.directory, dtype=dtype, stored=stored_dtype(checkpoint))
        installed = install_weights(model, checkpoint, dense=install_unread)
        names = {n for entry in checkpoint.entries.values() for n in (entry.name, *entry.aliases)}
        check_complete(model, Path(directory), unread=names)
        return find_parts(model, installed, checkpoint, matmul=matmul, own_memory=own_memory)


def find_parts(
    model: Any, installed: Installed, checkpoint: Checkpoint, *, matmul: str, own_memory: bool = False
) -> Parts:
    """What of `model` can be streamed; its checksums are still to be looked at.

    Args:
        model: whose dense parameters are there.
        installed: what its weights are.
        checkpoint: open.
        matmul: `auto` or `decode`, which need other scratch.
        own_memory: for a device with its own memory, which decodes whole weights with either.

    Raises what reading offsets raises.
    """
    tile_bytes = max((b.nbytes for b in installed.blocks if not _is_head(b)), default=_TILE_BYTES)
    blocks = tuple(_with_tiles(checkpoint, block, tile_bytes) for block in installed.blocks)
    tables = tuple(_table(checkpoint, name, w, tile_bytes) for name, w in installed.tables.items())
    experts = tuple(_experts(checkpoint, installed.experts))
    matmul = "decode" if own_memory else matmul
    config = model.config.get_text_config()
    context = context_sizes(config, model.dtype, latent=keeps_latent(model))
    sizes = ModelSizes(
        tuple(_block_size(block, matmul) for block in blocks),
        tuple(_table_size(table, matmul) for table in tables),
        tuple(_expert_size(stacks, _routed(model), matmul) for stacks in experts),
        dense_bytes(model),
        context.cache_bytes_per_token,
        context.activation_bytes_per_token,
        context.logits_bytes,
    )
    return Parts(blocks, tables, experts, sizes, _number(config, "max_position_embeddings") or None)


def kind_of(layout: TensorLayout) -> str:
    """What decides how fast a weight is multiplied: `bitmap/exponent`."""
    return f"{layout.mask}/{layout.codec}"


def matrix_of(stack: BitmapTensor) -> TensorLayout:
    """One dense matrix of a stack: what is decoded at a time."""
    rows, cols = stack.shape[1:]
    return TensorLayout((rows, cols), stack.packed_layout.dtype, "dense", "raw", rows * cols)


def _is_head(block: WeightBlock) -> bool:
    """Whether one linear layer is the whole block."""
    return [type(weight) for weight in block.weights.values()] == [SlicedWeight]


def _with_tiles(checkpoint: Checkpoint, block: WeightBlock, tile_bytes: int) -> WeightBlock:
    if not _is_head(block) or block.nbytes <= tile_bytes:
        return block
    ((name, weight),) = block.weights.items()
    assert isinstance(weight, SlicedWeight)
    rows = open_rows(checkpoint, name, verify=False)
    return replace(block, table=Table(weight, rows, rows.tiles(tile_bytes)))


def _table(checkpoint: Checkpoint, name: str, weight: SlicedWeight, tile_bytes: int) -> Table:
    rows = open_rows(checkpoint, name, verify=False)
    is_head = bool(checkpoint.entry(name).aliases)
    return Table(weight, rows, rows.tiles(tile_bytes) if is_head else ())


def _experts(
    checkpoint: Checkpoint, found: Mapping[nn.Module, Mapping[str, SlicedWeight]]
) -> Iterator[ExpertStacks]:
    for module, weights in found.items():
        yield ExpertStacks(module, weights, {n: open_rows(checkpoint, n, verify=False) for n in weights})


def _routed(model: Any) -> int | None:
    """Experts that a token takes, where the config says so in the usual way."""
    routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    return routed if isinstance(routed, int) and routed > 0 else None


# Sizes.


@dataclass(frozen=True)
class ContextSizes:
    """What a model needs beyond its weights, by token of the context: fields of `ModelSizes`."""

    cache_bytes_per_token: int
    activation_bytes_per_token: int
    logits_bytes: int


def context_sizes(config: Any, dtype: torch.dtype, *, latent: bool = False) -> ContextSizes:
    """From a transformers config; what it does not say counts as 0.

    Every layer is taken to keep keys and values of the whole context: sliding windows and layers without
    attention need less. Activations are an estimate: some tensors as wide as the model, some as wide as an
    MLP, held at a time of a prompt; attention is taken to make no matrix of scores (torch's SDPA makes none).

    Args:
        config: of the text model.
        dtype: that is computed in.
        latent: whether one vector is kept, from which keys and values are made when they are used.
    """
    hidden, vocabulary = _number(config, "hidden_size"), _number(config, "vocab_size")
    inner = max(_number(config, name) for name in ("intermediate_size", "moe_intermediate_size"))
    elements = _HIDDEN_TENSORS * hidden + _INNER_TENSORS * inner
    kept = _key_value_elements(config)
    if latent:
        elements += kept  # of one layer at a time
        kept = _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
    return ContextSizes(
        cache_bytes_per_token=_number(config, "num_hidden_layers") * kept * dtype.itemsize,
        activation_bytes_per_token=elements * dtype.itemsize,
        logits_bytes=vocabulary * torch.float32.itemsize,
    )


def keeps_latent(model: nn.Module) -> bool:
    """Whether attention makes keys and values from what is kept: newer versions of transformers."""
    return any(hasattr(module, "expand_kv") for module in model.modules())


def _key_value_elements(config: Any) -> int:
    """Of one token in one layer. Models with a low rank for both name the two dimensions of a head."""
    heads = _number(config, "num_attention_heads")
    usual = _number(config, "head_dim") or (_number(config, "hidden_size") // heads if heads else 0)
    low_rank = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim")
    per_head = (low_rank or usual) + (_number(config, "v_head_dim") or usual)
    return (_number(config, "num_key_value_heads") or heads) * per_head


def _number(config: Any, name: str) -> int:
    found = getattr(config, name, None)
    return found if isinstance(found, int) and found > 0 else 0


def _block_size(block: WeightBlock, matmul: str) -> BlockSize:
    whole = _piece(block.unit(), block.weights.values(), matmul)
    return BlockSize(block.name, whole, _tiles(block.table, matmul) if block.table else ())


def _table_size(table: Table, matmul: str) -> TableSize:
    weight = table.weight
    row_bytes = weight.nbytes // max(1, weight.shape[0])
    in_memory = weight.numel() * weight.dtype.itemsize
    return TableSize(table.name, weight.nbytes, in_memory, row_bytes, _tiles(table, matmul))


def _expert_size(stacks: ExpertStacks, routed: int | None, matmul: str) -> ExpertSize:
    weights = tuple(stacks.weights.values())
    units = [stacks.expert(number).unit for number in range(stacks.count)]
    kinds: Counter[str] = Counter()
    for weight in weights:
        kinds[kind_of(weight.packed_layout)] += weight.nbytes // stacks.count
    stored, cast = _decoded(((matrix_of(weight), weight.dtype) for weight in weights), matmul)
    nbytes = sum(unit.total_bytes for unit in units) // stacks.count
    spans = tuple(unit.span_bytes for unit in units)
    expert = Piece(nbytes, stacks.expert_bytes, stored, cast, kinds)
    return ExpertSize(stacks.count, min(routed or stacks.count, stacks.count), expert, spans)


def _piece(unit: Unit, weights: Iterable[BitmapTensor], matmul: str) -> Piece:
    weights = tuple(weights)
    kinds: Counter[str] = Counter()
    for weight in weights:
        kinds[kind_of(weight.packed_layout)] += weight.nbytes
    stored, cast = _decoded(((w.packed_layout, w.dtype) for w in weights if not is_direct(w)), matmul)
    return Piece(unit.total_bytes, unit.span_bytes, stored, cast, kinds)


def _tiles(table: Table, matmul: str) -> tuple[Piece, ...]:
    direct, pieces = is_direct(table.weight), []
    for tile, unit in zip(table.tiles, table.units(), strict=True):
        decoded: Sequence[tuple[TensorLayout, torch.dtype]] = (
            () if direct else ((tile.layout, table.weight.dtype),)
        )
        kinds = {kind_of(table.weight.packed_layout): unit.total_bytes}
        pieces.append(Piece(unit.total_bytes, unit.span_bytes, *_decoded(decoded, matmul), kinds))
    return tuple(pieces)


def _decoded(weights: Iterable[tuple[TensorLayout, torch.dtype]], matmul: str) -> tuple[int, int]:
    """Scratch for the largest of them: as stored, and cast."""
    needs = [decoded_bytes(layout, dtype, matmul=matmul) for layout, dtype in weights]
    return max((stored for stored, _ in needs), default=0), max((cast for _, cast in needs), default=0)

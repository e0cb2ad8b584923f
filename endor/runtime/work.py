"""How fast this machine decodes and multiplies a model's own weights: a second of trying, nothing remembered.

Rates differ by kind of weight, by shape and by machine more than any table could say, and one block shows it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Final

import torch
import torch.nn.functional as F

from endor.kernels.tensor import BitmapTensor
from endor.loaders import PosixReader, StagingPool, Unit, read_unit
from endor.runtime.install import is_direct
from endor.runtime.scratch import DecodeScratch
from endor.runtime.sliced import as_matrix
from endor.runtime.slices import ExpertStacks, Table, parts_of
from endor.runtime.stats import StatsRecorder
from endor.runtime.streaming import WeightBlock
from endor.runtime.survey import Parts, kind_of

__all__ = ["measure_work"]

_ENOUGH_S: Final = 0.3
_LEAST_PASSES: Final = 3


@dataclass(frozen=True)
class _Sample:
    """Something to read, and the weights that come out of it."""

    unit: Unit
    weights: Callable[[list[torch.Tensor]], Iterable[BitmapTensor]]


def measure_work(parts: Parts, *, matmul: str) -> dict[str, float]:
    """Compressed bytes per second at which weights of each kind are multiplied with one token.

    The middle one of each sort of block is read, a tile of each large head, and an expert.

    Raises LoadError where they cannot be read.
    """
    found: dict[str, float] = {}
    with PosixReader() as reader, torch.inference_mode():
        for sample in _samples(parts):
            with StagingPool(sample.unit.span_bytes) as pool:
                buffer = pool.allocate(sample.unit.span_bytes)
                read_unit(reader, sample.unit, buffer.memory)
                weights = list(sample.weights(parts_of(sample.unit, buffer.tensor())))
                found = {**_rates(weights, matmul), **found}
    return found


def _samples(parts: Parts) -> Iterator[_Sample]:
    alike: defaultdict[frozenset[str], list[WeightBlock]] = defaultdict(list)
    for block in (block for block in parts.blocks if block.table is None):
        alike[frozenset(kind_of(w.packed_layout) for w in block.weights.values())].append(block)
    for blocks in alike.values():
        block = blocks[len(blocks) // 2]
        yield _Sample(block.unit(), partial(_of_block, block))
    heads = [block.table for block in parts.blocks if block.table]
    for table in (table for table in (*heads, *parts.tables) if table.tiles):
        yield _Sample(table.units()[0], partial(_of_tile, table))
    for stacks in parts.experts[:1]:
        yield _Sample(stacks.expert(0).unit, partial(_of_expert, stacks))


def _of_block(block: WeightBlock, parts: list[torch.Tensor]) -> Iterator[BitmapTensor]:
    block.attach(parts)
    packed = {name: weight.packed for name, weight in block.weights.items()}
    block.forget()
    yield from (BitmapTensor(p.layout, p, dtype=block.weights[n].dtype) for n, p in packed.items())


def _of_tile(table: Table, parts: list[torch.Tensor]) -> Iterator[BitmapTensor]:
    packed = table.tiles[0].assemble(parts)
    yield BitmapTensor(packed.layout, packed, dtype=table.weight.dtype)


def _of_expert(stacks: ExpertStacks, parts: list[torch.Tensor]) -> Iterator[BitmapTensor]:
    for name, packed in stacks.expert(0).unpack(parts).items():
        matrix = as_matrix(packed)
        if matrix is not None:
            yield BitmapTensor(matrix.layout, matrix, dtype=stacks.weights[name].dtype)


def _rates(weights: Sequence[BitmapTensor], matmul: str) -> dict[str, float]:
    """One pass over all of the weights after the other, as a model does: the cache holds few of them."""
    needs = ((weight.packed_layout, weight.dtype) for weight in weights if not is_direct(weight))
    scratch = DecodeScratch(needs, StatsRecorder(), matmul=matmul)
    for weight in weights:
        weight.use_matmul(matmul)
        weight.use_scratch(scratch)
    passes: list[dict[str, float]] = []
    ends_s = perf_counter() + _ENOUGH_S
    while len(passes) < _LEAST_PASSES or perf_counter() < ends_s:
        passes.append(_seconds(weights))
    scratch.close()
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[kind_of(weight.packed_layout)] += weight.nbytes
    return {kind: n / median(one[kind] for one in passes[1:]) for kind, n in sizes.items() if n}


def _seconds(weights: Iterable[BitmapTensor]) -> dict[str, float]:
    """Of a product with one token, by kind."""
    taken: defaultdict[str, float] = defaultdict(float)
    for weight in weights:
        x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
        began_s = perf_counter()
        F.linear(x, weight)
        taken[kind_of(weight.packed_layout)] += perf_counter() - began_s
    return taken

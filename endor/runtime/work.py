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

from endor.formats.slices import RowSlice
from endor.kernels.tensor import BitmapTensor
from endor.loaders import PosixReader, StagingPool, Unit, read_unit
from endor.runtime.blocks import WeightBlock
from endor.runtime.install import is_direct
from endor.runtime.scratch import DecodeScratch
from endor.runtime.sliced import as_matrix
from endor.runtime.slices import ExpertStacks, Table, parts_of
from endor.runtime.stats import StatsRecorder
from endor.runtime.survey import Parts, kind_of

__all__ = ["measure_work"]

_BEYOND_CACHES_BYTES: Final = 128 << 20
"""One block of 55 MB alone seems half as fast again with a cache of 32 MB."""
_ENOUGH_S: Final = 0.3
_PAUSE_S: Final = 0.0001
"""Between two products a model does other things, and the kernel's threads go to sleep."""
_LEAST_PASSES: Final = 3


@dataclass(frozen=True)
class _Sample:
    """Something to read, and the weights that come out of it."""

    unit: Unit
    weights: Callable[[list[torch.Tensor]], Iterable[BitmapTensor]]


def measure_work(parts: Parts, *, matmul: str) -> dict[str, float]:
    """Compressed bytes per second at which weights of each kind are multiplied with one token.

    Some blocks of each sort are read, tiles of each large head, and experts: as many as no cache holds.

    Raises LoadError where they cannot be read.
    """
    found: dict[str, float] = {}
    with PosixReader() as reader, torch.inference_mode():
        for samples in map(_enough, _samples(parts)):
            with StagingPool(sum(sample.unit.span_bytes for sample in samples)) as pool:
                weights: list[BitmapTensor] = []
                for sample in samples:
                    buffer = pool.allocate(sample.unit.span_bytes)
                    read_unit(reader, sample.unit, buffer.memory)
                    weights += sample.weights(parts_of(sample.unit, buffer.tensor()))
                found = {**_rates(weights, matmul), **found}
    return found


def _enough(samples: Iterable[_Sample]) -> list[_Sample]:
    taken: list[_Sample] = []
    for sample in samples:
        taken.append(sample)
        if sum(sample.unit.span_bytes for sample in taken) >= _BEYOND_CACHES_BYTES:
            break
    return taken


def _samples(parts: Parts) -> Iterator[Iterable[_Sample]]:
    """What may be read, by sort."""
    alike: defaultdict[frozenset[str], list[WeightBlock]] = defaultdict(list)
    for block in (block for block in parts.blocks if block.table is None):
        alike[frozenset(kind_of(w.packed_layout) for w in block.weights.values())].append(block)
    for blocks in alike.values():
        yield (_Sample(block.unit(), partial(_of_block, block)) for block in blocks)
    heads = [block.table for block in parts.blocks if block.table]
    for table in (table for table in (*heads, *parts.tables) if table.tiles):
        pairs = zip(table.units(), table.tiles, strict=True)
        yield (_Sample(unit, partial(_of_tile, table, tile)) for unit, tile in pairs)
    for stacks in parts.experts[:1]:
        experts = range(stacks.count)
        yield (_Sample(stacks.expert(n).unit, partial(_of_expert, stacks, n)) for n in experts)


def _of_block(block: WeightBlock, parts: list[torch.Tensor]) -> Iterator[BitmapTensor]:
    block.attach(parts)
    packed = {name: weight.packed for name, weight in block.weights.items()}
    block.forget()
    yield from (BitmapTensor(p.layout, p, dtype=block.weights[n].dtype) for n, p in packed.items())


def _of_tile(table: Table, tile: RowSlice, parts: list[torch.Tensor]) -> Iterator[BitmapTensor]:
    packed = tile.assemble(parts)
    yield BitmapTensor(packed.layout, packed, dtype=table.weight.dtype)


def _of_expert(stacks: ExpertStacks, number: int, parts: list[torch.Tensor]) -> Iterator[BitmapTensor]:
    for name, packed in stacks.expert(number).unpack(parts).items():
        matrix = as_matrix(packed)
        if matrix is not None:
            yield BitmapTensor(matrix.layout, matrix, dtype=stacks.weights[name].dtype)


def _rates(weights: Sequence[BitmapTensor], matmul: str) -> dict[str, float]:
    """Some passes over all of the weights, one after the other as in a model."""
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
        ends_s = perf_counter() + _PAUSE_S
        while perf_counter() < ends_s:
            pass
        began_s = perf_counter()
        F.linear(x, weight)
        taken[kind_of(weight.packed_layout)] += perf_counter() - began_s
    return taken

"""Where the parts of sliced weights come from: rows and tiles of a matrix, experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch

from endor.checkpoint import Checkpoint
from endor.formats.packed import PackedTensor
from endor.formats.reader import BlockRange
from endor.formats.slices import RowIndex, RowSlice, SectionRange, index_sections
from endor.kernels.tensor import BitmapTensor
from endor.loaders import Reader, ReadOp, Unit, read_unit
from endor.runtime.experts import Expert, ExpertCache
from endor.runtime.sliced import SlicedWeight, SliceSource
from endor.runtime.stats import StatsRecorder

__all__ = ["ExpertSource", "ExpertStacks", "Rows", "Table", "TiledSource", "open_rows"]


@dataclass(frozen=True)
class Rows:
    """Rows of one entry and where they are on disk."""

    home: BlockRange
    index: RowIndex

    @property
    def name(self) -> str:
        return self.index.entry.name

    def op(self, part: SectionRange) -> ReadOp:
        payload_begin = self.home.offset - self.home.block.begin
        return ReadOp(self.home.file, payload_begin + part.begin, part.nbytes)

    def tiles(self, target_bytes: int) -> tuple[RowSlice, ...]:
        """All rows in runs of about `target_bytes`."""
        g, nbytes = self.index.layout.geometry, max(1, self.index.layout.nbytes)
        step = max(1, target_bytes * g.row_blocks // nbytes)
        return tuple(
            self.index.row_blocks(start, min(start + step, g.row_blocks))
            for start in range(0, g.row_blocks, step)
        )

    def unit(self, tile: RowSlice) -> Unit:
        return Unit(f"{self.name}[{tile.first_row}:]", tuple(self.op(part) for part in tile.ranges))

    def read_whole(self, reader: Reader, stats: StatsRecorder) -> PackedTensor:
        """Everything, in fresh memory."""
        g = self.index.layout.geometry
        whole = self.index.row_blocks(0, g.row_blocks)
        unit = self.unit(whole)
        with stats.waiting(self.name):
            memory = torch.empty(unit.span_bytes, dtype=torch.uint8)
            stats.on_demand_read_s += read_unit(reader, unit, memory.numpy().data).read_s
        stats.disk_bytes += unit.total_bytes
        packed = whole.assemble(parts_of(unit, memory))
        sections = {
            n: t.view(s.shape)
            for s in self.index.layout.sections
            for n, t in packed.sections.items()
            if n == s.name
        }
        return PackedTensor(self.index.layout, sections)


def parts_of(unit: Unit, memory: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of each read of a unit that lies in `memory`."""
    return [memory.narrow(0, at, op.length_bytes) for at, op in zip(unit.op_offsets, unit.ops, strict=True)]


def open_rows(checkpoint: Checkpoint, name: str, *, verify: bool) -> Rows:
    """Rows of the entry called `name`.

    Args:
        checkpoint: may be closed afterwards.
        verify: compare the entry with its checksums now, since parts of it have none: the entry is read once.

    Raises ChecksumError, FormatError and LoadError.
    """
    entry = checkpoint.entry(name)
    if verify:
        checkpoint.verify(name)
    index = checkpoint.read_sections(name, index_sections(entry.layout))
    return Rows(checkpoint.home(name), RowIndex(entry, index))


@dataclass(frozen=True)
class Table:
    """An embedding, a head, or one that is both.

    Attributes:
        weight: in the model.
        rows: of it.
        tiles: runs of rows in which a head is multiplied with; none for an embedding.
    """

    weight: SlicedWeight
    rows: Rows
    tiles: tuple[RowSlice, ...] = ()

    @property
    def name(self) -> str:
        return self.rows.name

    def units(self) -> tuple[Unit, ...]:
        """What one product reads."""
        return tuple(self.rows.unit(tile) for tile in self.tiles)


class TiledSource(SliceSource):
    """Rows on demand and tiles in order: for an embedding, a head, or one that is both.

    Args:
        rows: of the weight.
        reader: for single rows.
        tiles: the runs of rows that `lease` lends, in order.
        lease: lends the bytes of the tile with that index until the context ends.
        stats: where rows are counted; who lends tiles counts them.
    """

    def __init__(
        self,
        rows: Rows,
        reader: Reader,
        *,
        tiles: Sequence[RowSlice],
        lease: Callable[[int], AbstractContextManager[Sequence[torch.Tensor]]],
        stats: StatsRecorder,
    ) -> None:
        self._rows = rows
        self._reader = reader
        self._tiles = tiles
        self._lease = lease
        self._stats = stats
        self._assembled: dict[tuple[int, int], PackedTensor] = {}
        self.has_rows = rows.index.layout.is_plain
        self.has_tiles = bool(tiles)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        layout = self._rows.index.layout
        out = torch.empty(len(indices), layout.geometry.cols, dtype=layout.dtype)
        if not out.numel():
            return out
        row_bytes = layout.geometry.cols * layout.dtype.itemsize
        memory = out.view(torch.uint8).view(-1).numpy().data
        (section,) = self._rows.index.entry.sections
        tickets, at = [], 0
        with self._stats.waiting(self._rows.name):
            try:
                for first, count in _runs(indices.tolist()):
                    begin = section.begin + first * row_bytes
                    op = self._rows.op(SectionRange(section.name, begin, begin + count * row_bytes))
                    tickets.append(self._reader.submit(op, memory[at : at + op.length_bytes]))
                    at += op.length_bytes
            finally:
                reports = [self._reader.wait(ticket) for ticket in tickets]
        self._stats.on_demand_read_s += sum(report.read_s for report in reports)
        self._stats.disk_bytes += at
        return out

    def tiles(self) -> Iterator[tuple[int, PackedTensor]]:
        for i, tile in enumerate(self._tiles):
            with self._lease(i) as parts:
                yield tile.first_row, self._assemble(i, tile, parts)

    def _assemble(self, number: int, tile: RowSlice, parts: Sequence[torch.Tensor]) -> PackedTensor:
        """The same object for the same place, of which a ring has few: what kernels find out about a tensor
        they find out once."""
        if not tile.is_view:
            return tile.assemble(parts)
        key = (number, parts[0].data_ptr())
        if key not in self._assembled:
            self._assembled[key] = tile.assemble(parts)
        return self._assembled[key]

    def whole(self) -> PackedTensor:
        return self._rows.read_whole(self._reader, self._stats)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers: the first of each and how many there are."""
    first, count = numbers[0], 0
    for number in numbers:
        if number != first + count:
            yield first, count
            first, count = number, 0
        count += 1
    yield first, count


@dataclass(frozen=True)
class ExpertStacks:
    """The experts of one layer: stacks of matrices, one matrix of each per expert.

    Attributes:
        module: that computes with them.
        weights: by entry name, each [experts, rows, cols].
        rows: of each of them.
    """

    module: torch.nn.Module
    weights: Mapping[str, SlicedWeight]
    rows: Mapping[str, Rows]

    @property
    def count(self) -> int:
        return next(iter(self.weights.values())).shape[0]

    @cached_property
    def _slices(self) -> dict[int, dict[str, RowSlice]]:
        return {}

    def slices(self, expert: int) -> Mapping[str, RowSlice]:
        """The expert's matrix of each stack."""
        if expert not in self._slices:
            self._slices[expert] = {n: r.index.matrices(expert, expert + 1) for n, r in self.rows.items()}
        return self._slices[expert]

    def expert(self, number: int) -> Expert:
        slices = self.slices(number)
        ops = [self.rows[name].op(part) for name, one in slices.items() for part in one.ranges]
        first = next(iter(slices))
        unit = Unit(f"{first.rpartition('.')[0]}[{number}]", tuple(ops))

        def unpack(parts: Sequence[torch.Tensor]) -> Mapping[str, PackedTensor]:
            remaining = iter(parts)
            return {name: one.assemble([next(remaining) for _ in one.ranges]) for name, one in slices.items()}

        return Expert(unit, unpack)

    @cached_property
    def expert_bytes(self) -> int:
        """Staging memory of the largest expert."""
        return max(self.expert(number).unit.span_bytes for number in range(self.count))

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


class ExpertSource(SliceSource):
    """One stack of a layer's experts, whose matrices come through the cache all layers share."""

    has_matrices = True

    def __init__(
        self, cache: ExpertCache, layer: int, rows: Rows, *, reader: Reader, stats: StatsRecorder
    ) -> None:
        self._cache = cache
        self._stats = stats
        self._layer = layer
        self._name = rows.name
        self._rows = rows
        self._reader = reader

    def matrix(self, index: int) -> PackedTensor:
        return self._cache.get((self._layer, index))[self._name]

    def lend(self, index: int, part: BitmapTensor) -> None:
        self._cache.lend((self._layer, index), part)

    def whole(self) -> PackedTensor:
        return self._rows.read_whole(self._reader, self._stats)

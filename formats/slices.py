"""Runs of an entry's rows as byte ranges of its sections: an expert, a tile of a head, rows of an embedding.

Everything of a row block lies together in each section, and the offsets say where (docs/format.md). With
these in memory, a run of row blocks is one range per section, and what is read is a packed tensor of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.codecs import BlockRun, SectionPart, codec_named
from endor.formats.entries import TensorEntry
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout, offsets_dtype

__all__ = ["RowIndex", "RowSlice", "SectionRange", "index_sections"]


def index_sections(layout: TensorLayout) -> tuple[str, ...]:
    """The sections a `RowIndex` needs: offsets and small tables, less than 0.02 bits per weight."""
    if layout.is_plain:
        return ()
    of_mask = ("row_offsets",) if layout.mask == "bitmap" else ()
    return (*of_mask, *codec_named(layout.codec).index_sections)


@dataclass(frozen=True)
class SectionRange:
    """Bytes [begin, end) of the payload, a part of one section; never empty."""

    section: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class RowSlice:
    """A run of an entry's row blocks.

    Attributes:
        layout: of the run as a tensor of its own: [rows, cols], or [matrices, rows, cols] from a stack.
        first_row: of the entry, seen as a matrix.
        ranges: what has to be read.
    """

    layout: TensorLayout
    first_row: int
    ranges: tuple[SectionRange, ...]
    _shifts: Mapping[str, int] = field(repr=False)
    _ready: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that have to be read."""
        return sum(part.nbytes for part in self.ranges)

    @property
    def is_view(self) -> bool:
        """Whether what `assemble` returns shares the memory of its parts but for offsets."""
        return not self._shifts

    def assemble(self, parts: Sequence[Tensor]) -> PackedTensor:
        """The run as a packed tensor.

        It decodes as any other, but `PackedTensor.check` would find the bytes of its neighbours where a whole
        tensor has zeros.

        Args:
            parts: uint8, the bytes of `ranges` in their order, on any device; the result shares their memory,
                except for sections that begin inside a byte.
        """
        read = dict(zip((part.section for part in self.ranges), parts, strict=True))
        device = parts[0].device if parts else _NOTHING.device
        sections = {}
        for spec in self.layout.sections:
            if spec.name in self._ready:
                # A few kB: small enough that the copy to a device does not wait for it.
                sections[spec.name] = self._ready[spec.name].to(device, non_blocking=True)
                continue
            raw = read[spec.name] if spec.name in read else _NOTHING.to(device)
            shift = self._shifts.get(spec.name, 0)
            whole = _shifted(raw, shift, spec.nbytes) if shift else raw
            sections[spec.name] = whole.view(spec.dtype).view(spec.shape)
        return PackedTensor(self.layout, sections)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _shifted(raw: Tensor, shift: int, nbytes: int) -> Tensor:
    """`nbytes` bytes of the bits of `raw` from bit `shift` on."""
    low = raw[:nbytes] >> shift
    high = raw[1 : nbytes + 1] << (8 - shift)
    low[: len(high)] |= high
    return low


class RowIndex:
    """Knows where the rows of one entry are.

    Args:
        entry: of any mask and codec that can be read by rows.
        index: the sections that `index_sections` names, on the CPU; their contents may be anything.

    Raises FormatError where the row offsets contradict themselves.
    """

    def __init__(self, entry: TensorEntry, index: Mapping[str, Tensor]) -> None:
        self.entry = entry
        self._index = index
        self._begins = {section.name: section.begin for section in entry.sections}
        self._sizes = {section.name: section.nbytes for section in entry.sections}
        if entry.layout.mask == "bitmap":
            _check_offsets(index["row_offsets"], entry)

    @property
    def layout(self) -> TensorLayout:
        return self.entry.layout

    @cached_property
    def blocks_per_matrix(self) -> int:
        """Row blocks of one matrix of a stack; of all rows where there is no stack."""
        g = self.layout.geometry
        return g.matrix_rows // g.row_block if g.matrix_rows else g.row_blocks

    def matrices(self, start: int, stop: int) -> RowSlice:
        """Matrices [start, stop) of a stack, such as the experts of a 3-D parameter."""
        return self.row_blocks(start * self.blocks_per_matrix, stop * self.blocks_per_matrix)

    def row_blocks(self, start: int, stop: int) -> RowSlice:
        """Row blocks [start, stop), at least one; of a stack whole matrices.

        Raises FormatError where the offsets lie, ValueError for row blocks that do not exist.
        """
        run = self._run(start, stop)
        layout = self.layout
        if layout.is_plain:
            row_bits = 8 * layout.geometry.cols * layout.dtype.itemsize
            part = SectionPart(DENSE_SECTION, run.first_row * row_bits, run.stop_row * row_bits)
            return self._slice(run, {}, (part,), {})
        values = codec_named(layout.codec).slice(layout.values, self._index, run)
        if layout.mask == "dense":
            return self._slice(run, values.params, values.parts, values.ready)
        row_bits = 8 * layout.geometry.bitmap_row_bytes
        bitmap = SectionPart("bitmap", run.first_row * row_bits, run.stop_row * row_bits)
        offsets = self._index["row_offsets"][start : stop + 1].to(torch.int64) - run.first_value
        ready = {"row_offsets": offsets.to(offsets_dtype(run.nnz)), **values.ready}
        return self._slice(run, values.params, (bitmap, *values.parts), ready)

    def _run(self, start: int, stop: int) -> BlockRun:
        g = self.layout.geometry
        whole = not g.matrix_rows or (start % self.blocks_per_matrix == 0 == stop % self.blocks_per_matrix)
        if not 0 <= start < stop <= g.row_blocks or not whole:
            raise ValueError(
                f"row blocks {start} to {stop} of {g.row_blocks} are not a run of whole matrices"
            )
        first_row, stop_row = start * g.row_block, min(stop * g.row_block, g.rows)
        if self.layout.mask == "dense":
            return BlockRun(start, stop, first_row, stop_row, first_row * g.cols, stop_row * g.cols)
        offsets = self._index["row_offsets"]
        return BlockRun(start, stop, first_row, stop_row, int(offsets[start]), int(offsets[stop]))

    def _slice(
        self,
        run: BlockRun,
        params: Mapping[str, int],
        parts: Sequence[SectionPart],
        ready: Mapping[str, Tensor],
    ) -> RowSlice:
        layout, g = self.layout, self.layout.geometry
        shape = (run.rows // g.matrix_rows, g.matrix_rows, g.cols) if g.matrix_rows else (run.rows, g.cols)
        sliced = TensorLayout(
            shape if len(layout.shape) > 1 else layout.shape,
            layout.dtype,
            layout.mask,
            layout.codec,
            run.nnz,
            params,
        )
        ranges = [self._range(part) for part in parts]
        shifts = {part.section: part.begin_bits % 8 for part in parts if part.begin_bits % 8}
        return RowSlice(sliced, run.first_row, tuple(r for r in ranges if r.nbytes), shifts, ready)

    def _range(self, part: SectionPart) -> SectionRange:
        begin, end = part.begin_bits // 8, -(-part.end_bits // 8) + part.slack_bytes
        if not 0 <= begin <= end <= self._sizes[part.section]:
            raise FormatError(
                f"entry {self.entry.name!r}: its offsets ask for bytes {begin} to {end} of section "
                f"{part.section}, which has {self._sizes[part.section]}"
            )
        start = self._begins[part.section]
        return SectionRange(part.section, start + begin, start + end)


def _check_offsets(offsets: Tensor, entry: TensorEntry) -> None:
    if (
        int(offsets[0]) != 0
        or int(offsets[-1]) != entry.layout.nnz
        or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise FormatError(
            f"entry {entry.name!r}: row_offsets must rise from 0 to nnz {entry.layout.nnz} [F18]"
        )

"""Ground truth: every kernel in plain torch, on any device, with clarity before speed (0.03x memcpy).

A value is kept when its bits are not all zero, so all arithmetic happens on integer views: -0.0 is kept, NaN
payloads and subnormals pass through untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.codecs import Params
from endor.formats.layout import Geometry
from endor.formats.packed import PackedTensor, TensorLayout, offsets_dtype
from endor.kernels.backend import Backend, rows_of
from endor.kernels.reference_bits import KeptRows, as_bits, pack_bitmap, unpack_bitmap
from endor.kernels.reference_exponent import ExponentCoder
from endor.kernels.reference_quantized import Int4Coder, Int8Coder

__all__ = ["ReferenceBackend"]


class _Coder(Protocol):
    """How one codec writes and reads the values that the mask keeps."""

    def encode(self, matrix: Tensor, rows: KeptRows, mask: str) -> tuple[Params, dict[str, Tensor]]:
        """The params and sections for the kept elements of `matrix` [rows, cols]."""

    def decode(
        self, layout: TensorLayout, sections: Mapping[str, Tensor], rows: KeptRows, start_block: int
    ) -> Tensor:
        """The kept values of `rows`, which begin with row block `start_block`, as integers of their bits."""


class _RawCoder:
    def encode(
        self,
        matrix: Tensor,
        rows: KeptRows,
        mask: str,  # noqa: ARG002 - raw exists under `bitmap` only
    ) -> tuple[Params, dict[str, Tensor]]:
        return {}, {"values": rows.values_of(matrix).view(matrix.dtype)}

    def decode(
        self,
        layout: TensorLayout,  # noqa: ARG002 - nothing depends on it
        sections: Mapping[str, Tensor],
        rows: KeptRows,
        start_block: int,  # noqa: ARG002 - as above
    ) -> Tensor:
        return as_bits(sections["values"])[int(rows.starts[0]) : int(rows.starts[-1])]


_CODERS: dict[str, _Coder] = {
    "raw": _RawCoder(),
    "exponent": ExponentCoder(),
    "int8": Int8Coder(),
    "int4": Int4Coder(),
}


def _block_starts(per_row: Tensor, g: Geometry) -> Tensor:
    """Kept values per row -> int64 [row_blocks + 1], the number kept before each row block."""
    before_row = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    starts = torch.arange(g.row_blocks + 1, device=per_row.device) * g.row_block
    return before_row[starts.clamp(max=g.rows)]


class ReferenceBackend(Backend):
    """Every codec, on any device."""

    name = "reference"

    def supports(self, codec: str, device: torch.device) -> bool:  # noqa: ARG002 - works everywhere
        return codec in _CODERS

    def encode(self, weight: Tensor, codec: str, *, mask: str = "bitmap") -> PackedTensor:
        g = Geometry.of(tuple(weight.shape))
        matrix = weight.view(g.rows, g.cols)
        keep = as_bits(matrix) != 0 if mask == "bitmap" else torch.ones_like(matrix, dtype=torch.bool)
        rows = KeptRows(g, keep, _block_starts(keep.sum(1), g))
        params, sections = _CODERS[codec].encode(matrix, rows, mask)
        layout = TensorLayout(
            tuple(weight.shape), weight.dtype, mask, codec, int(rows.starts[-1]), MappingProxyType({**params})
        )
        if mask == "bitmap":
            sections["bitmap"] = pack_bitmap(keep)
            sections["row_offsets"] = rows.starts.to(offsets_dtype(layout.nnz))
        return PackedTensor(layout, sections)

    def decode(self, packed: PackedTensor, start_block: int, stop_block: int, out: Tensor) -> None:
        rows = _kept_rows(packed, start_block, stop_block)
        values = _CODERS[packed.layout.codec].decode(packed.layout, packed.sections, rows, start_block)
        bits = as_bits(out).view(rows.geometry.rows, rows.geometry.cols)
        bits.zero_()
        bits[rows.keep] = values


def _kept_rows(packed: PackedTensor, start_block: int, stop_block: int) -> KeptRows:
    """Which elements row blocks [start_block, stop_block) keep, once mask and offsets are known to agree."""
    g = packed.layout.geometry
    rows = rows_of(packed.layout, start_block, stop_block)
    part = replace(g, rows=len(rows))
    if packed.layout.mask == "dense":
        keep = torch.ones(len(rows), g.cols, dtype=torch.bool, device=packed.device)
        return KeptRows(part, keep, rows.start * g.cols + _block_starts(keep.sum(1), part))
    keep = unpack_bitmap(packed.sections["bitmap"][rows.start : rows.stop])
    if keep[:, g.cols :].any():
        raise FormatError(f"bitmap has bits beyond column {g.cols}")
    keep = keep[:, : g.cols]
    return KeptRows(part, keep, _checked_starts(packed, keep.sum(1), start_block, stop_block))


def _checked_starts(packed: PackedTensor, per_row: Tensor, start_block: int, stop_block: int) -> Tensor:
    """Where the values of the row blocks lie, once the offsets are known to agree with the bitmap."""
    layout = packed.layout
    offsets = packed.sections["row_offsets"][start_block : stop_block + 1].to(torch.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    starts_wrong = first < 0 or (start_block == 0 and first != 0)
    stops_wrong = last > layout.nnz or (stop_block == layout.geometry.row_blocks and last != layout.nnz)
    if starts_wrong or stops_wrong:
        raise FormatError(f"row_offsets must run from 0 to nnz {layout.nnz}, found {first} to {last}")
    rows = rows_of(layout, start_block, stop_block)
    part = replace(layout.geometry, rows=len(rows))
    wrong = (_block_starts(per_row, part).diff() != offsets.diff()).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise FormatError(
            f"row block {start_block + i}: row_offsets say {int(offsets.diff()[i])} values, "
            "the bitmap has another number of bits set"
        )
    return offsets

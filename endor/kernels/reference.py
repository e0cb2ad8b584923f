"""Ground truth: every kernel in plain torch, on any device, with clarity before speed (0.03x memcpy).

A value is kept when its bits are not all zero, so all arithmetic happens on integer views: -0.0 is kept, NaN
payloads and subnormals pass through untouched.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.layout import WORD_BITS, Geometry
from endor.formats.packed import PackedTensor, TensorLayout, offsets_dtype
from endor.kernels.backend import Backend, rows_of

__all__ = ["ReferenceBackend", "as_bits", "pack_bitmap", "unpack_bitmap"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory seen as integers of the same width."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def pack_bitmap(keep: Tensor) -> Tensor:
    """bool [rows, cols] -> uint8 [rows, words_per_row * 8]; bit i of byte j is column 8j + i."""
    rows, cols = keep.shape
    words_per_row = -(-cols // WORD_BITS)
    padded = torch.zeros(rows, words_per_row * WORD_BITS, dtype=torch.uint8, device=keep.device)
    padded[:, :cols] = keep
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.view(rows, words_per_row * 8, 8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_bitmap(bitmap: Tensor) -> Tensor:
    """uint8 [rows, n] -> bool [rows, 8n]; the inverse of `pack_bitmap`, padding bits included."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap.unsqueeze(2) >> shifts) & 1).flatten(1).bool()


def _row_block_offsets(per_row: Tensor, g: Geometry) -> Tensor:
    """Kept values per row -> int64 [row_blocks + 1], the number kept before each row block."""
    before_row = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    starts = torch.arange(g.row_blocks + 1, device=per_row.device) * g.row_block
    return before_row[starts.clamp(max=g.rows)]


class ReferenceBackend(Backend):
    """Every codec, on any device."""

    name = "reference"

    def supports(self, codec: str, device: torch.device) -> bool:  # noqa: ARG002 - works everywhere
        return codec == "raw"

    def encode(self, weight: Tensor, codec: str) -> PackedTensor:
        g = Geometry.of(tuple(weight.shape))
        matrix = as_bits(weight).view(g.rows, g.cols)
        keep = matrix != 0
        values = matrix[keep].view(weight.dtype)
        layout = TensorLayout(tuple(weight.shape), weight.dtype, "bitmap", codec, values.numel())
        offsets = _row_block_offsets(keep.sum(1), g).to(offsets_dtype(layout.nnz))
        return PackedTensor(layout, {"bitmap": pack_bitmap(keep), "row_offsets": offsets, "values": values})

    def decode(self, packed: PackedTensor, start_block: int, stop_block: int, out: Tensor) -> None:
        rows = rows_of(packed.layout, start_block, stop_block)
        g = packed.layout.geometry
        keep = unpack_bitmap(packed.sections["bitmap"][rows.start : rows.stop])
        if keep[:, g.cols :].any():
            raise FormatError(f"bitmap has bits beyond column {g.cols}")
        keep = keep[:, : g.cols]
        span = _checked_span(packed, keep.sum(1), start_block, stop_block)
        bits = as_bits(out).view(len(rows), g.cols)
        bits.zero_()
        bits[keep] = as_bits(packed.sections["values"])[span]


def _checked_span(packed: PackedTensor, per_row: Tensor, start_block: int, stop_block: int) -> slice:
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
    wrong = (_row_block_offsets(per_row, part).diff() != offsets.diff()).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise FormatError(
            f"row block {start_block + i}: row_offsets say {int(offsets.diff()[i])} values, "
            "the bitmap has another number of bits set"
        )
    return slice(first, last)

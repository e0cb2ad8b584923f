"""Triton kernels that decode: one program per row block, of one matrix or of all matrices in a table.

A program walks the words of its row block in tiles of T lanes. How many values lie before a lane is a prefix
sum of population counts; where a value goes follows from the bits below its own. Everything is read once,
and nothing is read or written outside the sections and the output, whatever the sections say: bounds are
checked before they are used, and a lane whose values would run beyond its row block's keeps none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from endor.kernels.triton_kernels.blocks import first_words, open_blocks, read_tile, report_blocks
from endor.kernels.triton_kernels.elements import EXPONENT, INT8, RAW

__all__ = ["FIELDS", "decode_group_kernel", "decode_kernel"]

FIELDS = (
    "first_program",
    "start_block",
    "rows",
    "cols",
    "row_block",
    "nnz",
    "exponent_bytes",
    "group_columns",
    "bitmap",
    "row_offsets",
    "values",
    "exponent_offsets",
    "exponents",
    "extra",
    "codebook",
    "out",
)
"""What a row of the table of `decode_group_kernel` says about a matrix, all int64; see `decode_kernel`."""


# Numbers that differ from matrix to matrix, and about which the compiler need know nothing.
@triton.jit(do_not_specialize=["rows", "row_block", "nnz", "exponent_bytes", "start_block"])
def decode_kernel(
    bitmap,
    row_offsets,
    values,
    exponent_offsets,
    exponents,
    extra,
    codebook,
    out,
    status,
    rows,
    cols,
    row_block,
    nnz,
    exponent_bytes,
    group_columns,
    start_block,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
):
    """Decode row blocks from `start_block` on to `out`, one per program.

    Args:
        bitmap: uint8, if MASKED; so is row_offsets, int32 or int64.
        values: what the codec stores per value: values (as integers of their bits), sign_mantissa or codes.
        exponent_offsets: int32 or int64, for EXPONENT; so is exponents, uint8.
        extra: mantissa_low (uint8) for EXPONENT with float16, scales (int16) for INT8 and INT4.
        codebook: int8, for INT4.
        out: integers of the elements' bits.
        status: int64 [1], lowered to what was wrong; see `report`.
        WHOLE: whether columns are a multiple of 64, so that rows are stored without padding.
        KIND: what the elements are.
        T: lanes of a tile.
    """
    _decode_block(
        tl.program_id(0).to(tl.int64),
        bitmap,
        row_offsets,
        values,
        exponent_offsets,
        exponents,
        extra,
        codebook,
        out,
        status,
        rows,
        cols,
        row_block,
        nnz,
        exponent_bytes,
        group_columns,
        start_block,
        WHOLE,
        MASKED,
        CODEC,
        PAIRS,
        SINGLES,
        KIND,
        T,
    )


@triton.jit(do_not_specialize=["entries"])
def decode_group_kernel(
    table,
    status,
    entries,
    ALIGNED: tl.constexpr,
    ENTRIES: tl.constexpr,
    ELEMENT: tl.constexpr,
    OFFSET: tl.constexpr,
    RECORD_OFFSET: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
):
    """Decode many matrices in one launch.

    Args:
        table: int64 [entries, len(FIELDS)]; addresses are those of the sections, aligned to 16 bytes.
        status: int64 [entries], one for each.
        ALIGNED: whether the columns of every matrix are a multiple of 16.
        ENTRIES: power of two that is not below `entries`.
        ELEMENT, OFFSET, RECORD_OFFSET: types of elements, row_offsets and exponent_offsets.
    """
    program = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, ENTRIES)
    firsts = tl.load(table + each * 16, mask=each < entries, other=2**62)
    entry = tl.sum((firsts <= program).to(tl.int32)) - 1
    fields = table + entry * 16
    if CODEC == RAW:
        values = _address(fields + 10, ELEMENT)
    elif CODEC == INT8:
        values = _address(fields + 10, tl.int8)
    else:
        values = _address(fields + 10, tl.uint8)
    if CODEC == EXPONENT:
        extra = _address(fields + 13, tl.uint8)
    else:
        extra = _address(fields + 13, tl.int16)
    cols = tl.load(fields + 3).to(tl.int32)
    if ALIGNED:
        cols = tl.multiple_of(cols, 16)
    _decode_block(
        program - tl.load(fields),
        _address(fields + 8, tl.uint8),
        _address(fields + 9, OFFSET),
        values,
        _address(fields + 11, RECORD_OFFSET),
        _address(fields + 12, tl.uint8),
        extra,
        _address(fields + 14, tl.int8),
        _address(fields + 15, ELEMENT),
        status + entry,
        tl.load(fields + 2),
        cols,
        tl.load(fields + 4).to(tl.int32),
        tl.load(fields + 5),
        tl.load(fields + 6),
        tl.load(fields + 7).to(tl.int32),
        tl.load(fields + 1),
        WHOLE,
        MASKED,
        CODEC,
        PAIRS,
        SINGLES,
        KIND,
        T,
    )


@triton.jit
def _address(field, TYPE: tl.constexpr):
    """The pointer in a field of the table."""
    return tl.multiple_of(tl.load(field).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _decode_block(
    number,
    bitmap,
    row_offsets,
    values,
    exponent_offsets,
    exponents,
    extra,
    codebook,
    out,
    status,
    rows,
    cols,
    row_block,
    nnz,
    exponent_bytes,
    group_columns,
    start_block,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
):
    """Decode row block `start_block + number` to the `number`th row block of `out`."""
    block = tl.full((1, 1), 0, tl.int64) + start_block + number
    first_row = block * row_block
    rows_here = tl.minimum(rows - first_row, row_block).to(tl.int32)
    start, count, readable, deeper, opened, bounds_wrong, record_wrong = open_blocks(
        block,
        first_row,
        rows_here,
        row_offsets,
        exponent_offsets,
        exponents,
        extra,
        rows,
        cols,
        row_block,
        nnz,
        exponent_bytes,
        MASKED,
        CODEC,
        PAIRS,
        SINGLES,
        KIND,
        T,
    )
    row_words, mask_words = first_words(bitmap, first_row, cols, MASKED)
    before = tl.zeros((1, 1), tl.int32)
    padding = tl.zeros((1, 1), tl.int32)
    lane = tl.arange(0, 32)[None, None, :]
    first_out = out + number * row_block * cols
    words_here = tl.sum(rows_here) * row_words
    for tile in range(0, words_here, T):
        at = tile + tl.arange(0, T)[None, :]
        row = at // row_words
        column = (at - row * row_words) * 32
        if WHOLE:
            inside = at < words_here
        else:
            inside = row < rows_here
        elements, before, deeper, padding = read_tile(
            mask_words,
            at,
            row,
            first_row,
            column,
            inside,
            before,
            deeper,
            padding,
            start,
            readable,
            opened,
            values,
            extra,
            codebook,
            cols,
            group_columns,
            WHOLE,
            MASKED,
            CODEC,
            PAIRS,
            SINGLES,
            KIND,
        )
        if WHOLE:
            tl.store(first_out + (at[:, :, None] * 32 + lane), elements, mask=inside[:, :, None])
        else:
            to = first_out + ((row * cols + column)[:, :, None] + lane)
            tl.store(to, elements, mask=inside[:, :, None] & (lane < (cols - column)[:, :, None]))
    report_blocks(
        status, block, rows_here, count, before, padding, deeper, bounds_wrong, record_wrong, MASKED, CODEC
    )

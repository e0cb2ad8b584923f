"""What every kernel does with a run of mask words: bounds of its values, the elements, what was wrong.

Shapes: B row blocks side by side, T lanes each, one lane per 32 columns; what belongs to a row block is
[B, 1], what to a lane [B, T], elements are [B, T, 32]. Positions within a row block are int32 (the caller
sees to it that they fit), positions within a section int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from endor.kernels.triton_kernels.bits import low_bits, popcount, round_to_bfloat16, round_to_float16

__all__ = [
    "BFLOAT16",
    "BITS",
    "EXPONENT",
    "FLOAT16",
    "FLOAT32",
    "INT4",
    "INT8",
    "NOTHING",
    "RAW",
    "codes_of",
    "elements_of",
    "report",
    "scales_of",
    "value_bounds",
]

RAW = tl.constexpr(0)
EXPONENT = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)

BFLOAT16 = tl.constexpr(0)
FLOAT16 = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
BITS = tl.constexpr(3)
"""A dtype that no kernel calculates with."""

NOTHING = tl.constexpr(2**62)
"""Status of a launch that found nothing wrong; otherwise 4 * row block + index into RULES."""


@triton.jit
def value_bounds(block, exists, row_offsets, blocks, nnz, most):
    """Where the values of row blocks begin (int64), how many there are, and which bounds lie.

    Args:
        block: int64 [B, 1], numbers of the row blocks; `exists` says which of them are there.
        most: int32 [B, 1], elements of each row block.
    """
    start = tl.load(row_offsets + block, mask=exists, other=0).to(tl.int64)
    stop = tl.load(row_offsets + block + 1, mask=exists, other=0).to(tl.int64)
    wrong = (start < 0) | (stop < start) | (stop > nnz)
    wrong = wrong | ((block == 0) & (start != 0)) | ((block == blocks - 1) & (stop != nnz))
    wrong = wrong & exists
    start = tl.where(wrong, 0, start)
    count = tl.where(wrong, 0, stop - start)
    return start, tl.minimum(count, most.to(tl.int64) + 1).to(tl.int32), wrong


@triton.jit
def report(status, block, bounds_wrong, padding_wrong, count_wrong, record_wrong):
    """Lower the status to the first row block in which something is wrong."""
    rule = tl.where(bounds_wrong, 0, tl.where(padding_wrong, 1, tl.where(count_wrong, 2, 3)))
    wrong = bounds_wrong | padding_wrong | count_wrong | record_wrong
    first = tl.min(tl.where(wrong, 4 * block + rule, NOTHING))
    tl.atomic_min(status, first, mask=first != NOTHING, sem="relaxed")


@triton.jit
def scales_of(scales, row, column, mask, cols, group_columns):
    """The scale of each lane's columns (float32 [B, T]) and whether it lies; no lane straddles two groups.

    Args:
        scales: int16 pointer to the bits of the bfloat16 scales.
        row: int64 [B, T] or [B, 1], row of the tensor.
        column: int32 [B, T], first column of each lane.
    """
    per_row = (cols + group_columns - 1) // group_columns
    at = row * per_row + column // group_columns
    bits = tl.load(scales + at, mask=mask, other=0)
    wrong = (bits != 0) & ((bits < 0x0080) | (bits >= 0x7F80))  # neither zero nor positive and normal
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True), wrong


@triton.jit
def elements_of(
    word,
    rank,
    values,
    parity,
    scale,
    codebook,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    KIND: tl.constexpr,
):
    """Bits of the elements [B, T, 32], zero where nothing is kept; any codec but `exponent`.

    Args:
        word: uint32 [B, T], which columns are kept.
        rank: int32 [B, T], values of the row block before the lane's first.
        values: [B, 1] pointers to the first value of each row block; for `int4` to the byte with it.
        parity: int32 [B, 1], for `int4` whether the first value is the upper half of its byte.
        scale: float32 [B, T], for `int8` and `int4`.
        codebook: int8 pointer, for `int4`.
    """
    column = tl.arange(0, 32)[None, None, :]
    kept = ((word[:, :, None] >> column.to(tl.uint32)) & 1) != 0
    if MASKED:
        at = rank[:, :, None] + popcount(word[:, :, None] & low_bits(column))
    else:
        at = rank[:, :, None] + column
    values = values[:, :, None]
    if CODEC == RAW:
        return tl.load(values + at, mask=kept, other=0)
    else:
        integer = codes_of(values, at, parity, codebook, kept, CODEC)
        product = integer.to(tl.float32) * scale[:, :, None]
        if KIND == BFLOAT16:
            bits = round_to_bfloat16(product)
        elif KIND == FLOAT16:
            bits = round_to_float16(product)
        else:
            bits = product.to(tl.int32, bitcast=True)
        return tl.where(kept, bits, 0).to(bits.dtype)


@triton.jit
def codes_of(values, at, parity, codebook, kept, CODEC: tl.constexpr):
    """The integers that stand for values number `at`."""
    if CODEC == INT8:
        return tl.load(values + at, mask=kept, other=0)
    else:
        half = at + parity[:, :, None]
        pair = tl.load(values + (half >> 1), mask=kept, other=0).to(tl.int32)
        return tl.load(codebook + ((pair >> ((half & 1) * 4)) & 15), mask=kept, other=0)

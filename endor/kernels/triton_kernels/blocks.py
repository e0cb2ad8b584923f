"""Row blocks on the device: open some of them, side by side, then read them a tile of mask words at a time.

Both kinds of kernels, those that decode and those that multiply, are loops around these two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from endor.kernels.triton_kernels.bits import low_bits, popcount
from endor.kernels.triton_kernels.elements import (
    EXPONENT,
    FLOAT16,
    INT4,
    INT8,
    elements_of,
    report,
    scales_of,
    value_bounds,
)
from endor.kernels.triton_kernels.exponent import (
    exponent_elements,
    find_levels,
    read_levels,
    read_names,
    record_bounds,
)

__all__ = ["first_words", "open_blocks", "read_tile", "report_blocks"]


@triton.jit
def open_blocks(
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
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
):
    """Find and check what lies in front of the values of row blocks.

    Args:
        block, first_row: int64 [B, 1].
        rows_here: int32 [B, 1], rows of each block; none for one that does not exist.
        T: words of each level that are counted at once.

    Returns where the values begin (int64), how many the offsets say there are, how many may be read (both
    int32), `deeper` for the first tile, a tuple that `read_tile` wants back, and what was wrong with
    the offsets and with the records.
    """
    blocks = (rows + row_block - 1) // row_block
    exists = rows_here > 0
    most = rows_here * cols
    if MASKED:
        start, count, bounds_wrong = value_bounds(block, exists, row_offsets, blocks, nnz, most)
    else:
        start, count, bounds_wrong = first_row * cols, most, rows_here < 0
    deeper = ()
    for _level in tl.static_range(PAIRS + SINGLES):
        deeper = deeper + (tl.zeros_like(count),)
    if (CODEC == INT8) or (CODEC == INT4):
        deeper = (tl.zeros_like(count),)
    if CODEC == EXPONENT:
        begin, size, record_wrong = record_bounds(block, exists, exponent_offsets, blocks, exponent_bytes)
        skew = (begin & 3).to(tl.int32)
        record = exponents + (begin - skew)
        words = exponents.to(tl.pointer_type(tl.uint32)) + (begin >> 2)
        firsts, seconds, rest, levels_wrong = find_levels(words, skew, size, count, PAIRS, SINGLES, T)
        record_wrong = exists & (record_wrong | levels_wrong)
        readable = tl.where(record_wrong, 0, count)
        low_bit = 3 * start
        if KIND == FLOAT16:
            lows = extra + (low_bit >> 3)
        else:
            lows = record
        names = read_names(record, skew, exists & ~record_wrong, PAIRS, SINGLES)
        opened = (words, record, firsts, seconds, rest, names, lows, (low_bit & 7).to(tl.int32))
    else:
        record_wrong = rows_here < 0
        readable = count
        opened = ()
    return start, count, readable, deeper, opened, bounds_wrong, record_wrong


@triton.jit
def first_words(bitmap, first_row, cols, MASKED: tl.constexpr):
    """Words of a row, and pointers [B, 1] to the first word of each row block, for `read_tile`."""
    row_words = (cols + 63) // 64 * 2
    if MASKED:
        mask_words = bitmap.to(tl.pointer_type(tl.uint32)) + first_row * row_words
    else:
        mask_words = first_row
    return row_words, mask_words


@triton.jit
def read_tile(
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
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    KIND: tl.constexpr,
):
    """The elements of T mask words of each row block, and what to hand to the call for the words behind.

    Args:
        mask_words: [B, 1] pointers to the first word of each row block, if MASKED.
        at: int32 [1, T], numbers of the words within the row block.
        row, column: int32, row within the block and first column of each word.
        inside: bool [B, T], the words that exist.
        before: int32 [B, 1], values of the row block before these words.
        deeper: `before` of `read_levels`; for INT8 and INT4 how many scales have been wrong so far.
        padding: int32 [B, 1], words so far with bits beyond the last column.
        WHOLE: whether no word reaches beyond the last column.

    Returns bits of the elements [B, T, 32], `before`, `deeper` and `padding`.
    """
    if WHOLE:
        valid = tl.where(inside, 0xFFFFFFFF, 0).to(tl.uint32)
    else:
        valid = low_bits(tl.where(inside, tl.minimum(cols - column, 32), 0))
    if MASKED:
        word = tl.load(mask_words + at, mask=inside, other=0)
        if not WHOLE:
            padding += tl.sum(((word & ~valid) != 0).to(tl.int32), axis=1, keep_dims=True)
            word = word & valid
        n = popcount(word)
        rank = tl.cumsum(n, axis=1) - n + before
        before += tl.sum(n, axis=1, keep_dims=True)
    else:
        word = valid
        n = popcount(word)
        if WHOLE:
            rank = at * 32 + tl.zeros_like(n)
        else:
            rank = row * cols + column + tl.zeros_like(n)
    fits = rank + n <= readable
    word = tl.where(fits, word, 0)
    if CODEC == EXPONENT:
        words, record, firsts, seconds, rest, names, lows, low_skew = opened
        n = tl.where(fits, n, 0)
        rest_before = deeper[PAIRS + SINGLES - 1]
        codes, upper, escapes, deeper = read_levels(words, firsts, seconds, rank, n, deeper, PAIRS, SINGLES)
        heads = values + start
        elements = exponent_elements(
            word,
            rank,
            codes,
            upper,
            escapes,
            rest_before,
            record,
            rest,
            names,
            heads,
            lows,
            low_skew,
            PAIRS,
            SINGLES,
            KIND == FLOAT16,
            WHOLE and not MASKED,
        )
    elif CODEC == INT4:
        scale, wrong = scales_of(extra, first_row + row, column, inside, cols, group_columns)
        deeper = (deeper[0] + tl.sum(wrong.to(tl.int32), axis=1, keep_dims=True),)
        parity = (start & 1).to(tl.int32)
        pairs = values + (start >> 1)
        elements = elements_of(word, rank, pairs, parity, scale, codebook, MASKED, CODEC, KIND)
    elif CODEC == INT8:
        scale, wrong = scales_of(extra, first_row + row, column, inside, cols, group_columns)
        deeper = (deeper[0] + tl.sum(wrong.to(tl.int32), axis=1, keep_dims=True),)
        elements = elements_of(word, rank, values + start, 0, scale, 0, MASKED, CODEC, KIND)
    else:
        elements = elements_of(word, rank, values + start, 0, 0, 0, MASKED, CODEC, KIND)
    return elements, before, deeper, padding


@triton.jit
def report_blocks(
    status,
    block,
    rows_here,
    count,
    before,
    padding,
    deeper,
    bounds_wrong,
    record_wrong,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
):
    """Say what `open_blocks` and all calls of `read_tile` found wrong; arguments as theirs, all [B, 1]."""
    if MASKED:
        count_wrong = before != count
    else:
        count_wrong = rows_here < 0
    if (CODEC == INT8) or (CODEC == INT4):
        record_wrong = record_wrong | (deeper[0] != 0)
    report(status, block, bounds_wrong, padding != 0, count_wrong, record_wrong)

"""Codec `exponent` on the device: find where the levels of a record lie, then read 32 columns per lane.

A lane is one 32-bit word of the mask. The codes of its values are at most 32 consecutive bits of each level,
so per level a lane needs a prefix sum (how many codes lie before its own) and one window of bits. From there
on each byte of the word is walked on its own, column by column: a column that holds a value takes the lowest
bit off the first level's window, one that escapes also takes one off the next, and so on. That is two
instructions per level and column, and nothing in it depends on the data.

Shapes: B records side by side, T lanes each; what belongs to a record is [B, 1], what to a lane [B, T].
"""

from __future__ import annotations

import triton
import triton.language as tl

from endor.kernels.triton_kernels.bits import join_eight, low_bits, popcount, window

__all__ = ["exponent_elements", "find_levels", "read_levels", "record_bounds"]


@triton.jit
def record_bounds(block, exists, exponent_offsets, blocks, exponent_bytes):
    """Where the records of row blocks begin (int64), their bytes (int32), and which bounds lie."""
    begin = tl.load(exponent_offsets + block, mask=exists, other=0).to(tl.int64)
    end = tl.load(exponent_offsets + block + 1, mask=exists, other=0).to(tl.int64)
    wrong = (begin < 0) | (end < begin) | (end > exponent_bytes)
    wrong = wrong | ((block == 0) & (begin != 0)) | ((block == blocks - 1) & (end != exponent_bytes))
    wrong = wrong & exists
    size = tl.where(wrong, 0, end - begin)
    return tl.where(wrong, 0, begin), tl.minimum(size, 2**28).to(tl.int32), wrong


@triton.jit
def find_levels(words, skew, size, count, PAIRS: tl.constexpr, SINGLES: tl.constexpr, T: tl.constexpr):
    """Where the planes of records begin, once it is certain that they fill their records.

    Args:
        words: [B, 1] pointers to the aligned uint32 in which each record begins.
        skew: int32 [B, 1], bytes of that word before the record.
        size: int32 [B, 1], bytes of the record.
        count: int32 [B, 1], values of the record.

    Returns the first byte of every level, of the second plane of the levels that have one (tuples of int32
    [B, 1], counted from `words`) and of the rest, and which records do not add up: those must not be read.
    """
    lanes = tl.arange(0, T)[None, :] * 32
    end = skew + size
    position = skew + 3 * PAIRS + SINGLES
    wrong = position > end
    firsts = ()
    seconds = ()
    for level in tl.static_range(PAIRS + SINGLES):
        stride = (count + 7) >> 3
        firsts = firsts + (position,)
        if level < PAIRS:
            seconds = seconds + (position + stride,)
            after = position + 2 * stride
        else:
            after = position + stride
        wrong = wrong | (after > end)
        count = tl.where(wrong, 0, count)
        escaped = tl.zeros_like(count)
        padding = tl.zeros_like(count)
        for begin in range(0, tl.max(count), 32 * T):
            at = begin + lanes
            valid = low_bits(tl.minimum(count - at, 32))
            inside = at < count
            codes = window(words, position * 8 + at, inside)
            behind = codes
            if level < PAIRS:
                second = window(words, (position + stride) * 8 + at, inside)
                behind = codes | second
                codes = codes & second
            escaped += tl.sum(popcount(codes & valid), axis=1, keep_dims=True)
            behind = behind & low_bits(tl.minimum(stride * 8 - at, 32)) & ~valid
            padding += tl.sum(tl.where(inside, popcount(behind), 0), axis=1, keep_dims=True)
        wrong = wrong | (padding != 0)
        position = after
        count = escaped
    wrong = wrong | (position + count != end)
    return firsts, seconds, position, wrong


@triton.jit
def read_levels(words, firsts, seconds, rank, n, before, PAIRS: tl.constexpr, SINGLES: tl.constexpr):
    """The codes of each lane's values.

    Args:
        words, firsts, seconds: as in `find_levels`.
        rank: int32 [B, T], values of the record before the lane's first.
        n: int32 [B, T], values of the lane.
        before: tuple of int32 [B, 1], codes of each level but the first, and of the rest, before these lanes.

    Returns the windows of the first and of the second planes, the escapes of all levels (tuples of uint32
    [B, T]), the rank of each lane's first exponent in the rest, and `before` for the lanes that follow.
    """
    codes = ()
    upper = ()
    escapes = ()
    following = ()
    for level in tl.static_range(PAIRS + SINGLES):
        valid = low_bits(n)
        escaping = window(words, firsts[level] * 8 + rank, n > 0) & valid
        codes = codes + (escaping,)
        if level < PAIRS:
            second = window(words, seconds[level] * 8 + rank, n > 0) & valid
            upper = upper + (second,)
            escaping = escaping & second
        escapes = escapes + (escaping,)
        n = popcount(escaping)
        rank = tl.cumsum(n, axis=1) - n + before[level]
        following = following + (before[level] + tl.sum(n, axis=1, keep_dims=True),)
    return codes, upper, escapes, rank, following


@triton.jit
def exponent_elements(
    word,
    rank,
    codes,
    upper,
    escapes,
    rest_rank,
    record,
    skew,
    rest_start,
    heads,
    lows,
    low_skew,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    HALF: tl.constexpr,
):
    """int16 [B, T, 32]: the bits of the elements of each lane.

    Args:
        word: uint32 [B, T], the mask.
        rank, codes, upper, escapes, rest_rank: see `read_levels`.
        record: [B, 1] pointers to the first byte of the aligned word in which the record begins.
        skew, rest_start: int32 [B, 1], bytes from there to the record's table and to its rest.
        heads: [B, 1] pointers to sign and mantissa of the record's first value.
        lows, low_skew: [B, 1] pointers to the byte, and the bit (int32) in it, where the low mantissa bits of
            the record's first value begin; used if HALF.
    """
    byte = (tl.arange(0, 4) * 8)[None, None, :]
    taken = popcount(word[:, :, None] & low_bits(byte))  # codes that earlier bytes of the word take
    mask = word[:, :, None] >> byte.to(tl.uint32)
    at = rank[:, :, None] + taken
    left = ()
    upper_left = ()
    for level in tl.static_range(PAIRS + SINGLES):
        left = left + (codes[level][:, :, None] >> taken.to(tl.uint32),)
        if level < PAIRS:
            upper_left = upper_left + (upper[level][:, :, None] >> taken.to(tl.uint32),)
        taken = popcount(escapes[level][:, :, None] & low_bits(taken))
    rest = rest_rank[:, :, None] + taken + rest_start[:, :, None]
    elements = ()
    for _column in tl.static_range(8):
        kept = mask & 1
        mask = mask >> 1
        name, escaped, left, upper_left = _take(left, upper_left, kept, PAIRS, SINGLES)
        where = tl.where(escaped != 0, rest, name + skew[:, :, None])
        exponent = tl.load(record[:, :, None] + where, mask=kept != 0, other=0).to(tl.int32)
        head = tl.load(heads[:, :, None] + at, mask=kept != 0, other=0).to(tl.int32)
        bits = ((head & 0x80) << 8) | (exponent << 7) | (head & 0x7F)
        if HALF:
            low = _three_bits(lows[:, :, None], low_skew[:, :, None] + 3 * at, kept != 0)
            bits = ((head & 0x80) << 8) | ((exponent & 31) << 10) | ((head & 0x7F) << 3) | low
        elements = elements + (bits.to(tl.int16),)
        at += kept.to(tl.int32)
        rest += escaped.to(tl.int32)
    return join_eight(elements)  # [B, T, 4 * 8]


@triton.jit
def _take(codes, upper, kept, PAIRS: tl.constexpr, SINGLES: tl.constexpr):
    """Take the code of one column off each level that it reaches.

    Returns which exponent of the table it is, 1 where it is none of them, and the codes that are left. A code
    that sends the value on counts as many exponents as its level names, which is what the sum needs.
    """
    left = ()
    upper_left = ()
    name = tl.zeros_like(kept)
    reaches = kept
    for level in tl.static_range(PAIRS + SINGLES):
        code = codes[level] & reaches
        left = left + (codes[level] >> reaches,)
        name += code
        if level < PAIRS:
            second = upper[level] & reaches
            upper_left = upper_left + (upper[level] >> reaches,)
            name += 2 * second
            code = code & second
        reaches = code
    return name.to(tl.int32), reaches, left, upper_left


@triton.jit
def _three_bits(lows, bit, mask):
    """int32: the three bits from number `bit` on; the second byte is read only where they reach into it."""
    at = lows + (bit >> 3)
    low = tl.load(at, mask=mask, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=mask & ((bit & 7) > 5), other=0).to(tl.int32)
    return ((high << 8 | low) >> (bit & 7)) & 7

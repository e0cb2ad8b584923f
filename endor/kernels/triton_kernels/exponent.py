"""Codec `exponent` on the device: find where the levels of a record lie, then read 32 columns per lane.

A lane is one 32-bit word of the mask. The codes of its values are at most 32 consecutive bits of each level,
so per level a lane needs a prefix sum (how many codes lie before its own) and one window of bits. From there
on the four bytes of the word are walked at once, one bit of each per step: the window is laid out as four
bytes too, each beginning with the codes of its byte of the word, and a byte whose column takes a code is
shifted by one bit. So five instructions per level serve four columns, and nothing depends on the data.

Exponents come from the record's table without being looked up: a column's is the sum of what its levels name,
and a level that is left takes back what it named. Sums are of four bytes at once, in one multiplication each:
what is borrowed between bytes on the way is given back, because in the end every byte is an exponent.

Shapes: B records side by side, T lanes each; what belongs to a record is [B, 1], what to a lane [B, T].
"""

from __future__ import annotations

import triton
import triton.language as tl

from endor.kernels.triton_kernels.bits import join_columns, low_bits, popcount, window

__all__ = ["exponent_elements", "find_levels", "read_levels", "read_names", "record_bounds"]


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
        T: words that are counted at once.

    Returns the first byte of every level, of the second plane of the levels that have one (tuples of int32
    [B, 1], counted from `words`) and of the rest, and which records do not add up: those must not be read.
    """
    end = skew + size
    position = skew + 3 * PAIRS + SINGLES
    wrong = position > end
    firsts = ()
    seconds = ()
    for level in tl.static_range(PAIRS + SINGLES):
        stride = (count + 7) >> 3
        firsts = firsts + (position,)
        after = position + stride
        if level < PAIRS:
            seconds = seconds + (after,)
            after += stride
        wrong = wrong | (after > end)
        count = tl.where(wrong, 0, count)
        wrong = wrong | _is_padded(words, position + stride, count)
        if level < PAIRS:
            wrong = wrong | _is_padded(words, after, count)
            escaped = _count_both(words, position * 8, (position + stride) * 8, count, T)
        else:
            escaped = _count(words, position * 8, count, T)
        count = tl.where(wrong, 0, escaped)
        position = after
    wrong = wrong | (position + count != end)
    return firsts, seconds, position, wrong


@triton.jit
def _count(words, bit, count, T: tl.constexpr):
    """Bits set among `count` from number `bit` on, both int32 [B, 1]."""
    first = words + (bit >> 5)
    begin = bit & 31
    stop = begin + count
    counted = tl.zeros_like(count)
    lanes = tl.arange(0, T)[None, :]
    for word in range(0, (tl.max(stop) + 31) >> 5, T):
        at = word + lanes
        inside = (at * 32 < stop) & (count > 0)
        bits = tl.load(first + at, mask=inside, other=0)
        bits = bits & low_bits(stop - at * 32) & ~low_bits(begin - at * 32)
        counted += tl.sum(popcount(bits), axis=1, keep_dims=True)
    return counted


@triton.jit
def _count_both(words, first, second, count, T: tl.constexpr):
    """Bits set in both of two planes, which begin at bits number `first` and `second`."""
    counted = tl.zeros_like(count)
    lanes = tl.arange(0, T)[None, :] * 32
    for begin in range(0, tl.max(count), 32 * T):
        at = begin + lanes
        both = window(words, first + at, at < count) & window(words, second + at, at < count)
        counted += tl.sum(popcount(both & low_bits(count - at)), axis=1, keep_dims=True)
    return counted


@triton.jit
def _is_padded(words, after, count):
    """Whether bits are set behind the last of `count` in a plane that ends before byte `after`."""
    last = tl.load(words.to(tl.pointer_type(tl.uint8)) + after - 1, mask=count > 0, other=0).to(tl.int32)
    return (last >> (((count - 1) & 7) + 1)) != 0


@triton.jit
def read_names(record, skew, readable, PAIRS: tl.constexpr, SINGLES: tl.constexpr):
    """The record's table, as what each level adds to a column's exponent that it reaches.

    Args:
        record: [B, 1] pointers to the first byte of the aligned word in which each record begins.
        skew: int32 [B, 1], bytes from there to the table.
        readable: bool [B, 1], records that may be read.

    Returns uint32 [B, 1]: of each level, and of what follows the last one, what reaching it adds; of each
    level with two planes, what a bit of the first and one of the second add. Some are less than nothing.
    """
    reached = ()
    by_first = ()
    by_second = ()
    named = tl.zeros_like(skew).to(tl.uint32)
    at = record + skew
    for level in tl.static_range(PAIRS + SINGLES):
        commonest = tl.load(at, mask=readable, other=0).to(tl.uint32)
        reached = reached + (commonest - named,)
        named = commonest
        if level < PAIRS:
            first = tl.load(at + 1, mask=readable, other=0).to(tl.uint32) - commonest
            second = tl.load(at + 2, mask=readable, other=0).to(tl.uint32) - commonest
            by_first = by_first + (first,)
            by_second = by_second + (second,)
            named = commonest + first + second
            at += 3
        else:
            at += 1
    return reached + (0 - named,), by_first, by_second


@triton.jit
def read_levels(words, firsts, seconds, rank, n, before, PAIRS: tl.constexpr, SINGLES: tl.constexpr):
    """The codes of each lane's values.

    Args:
        words, firsts, seconds: as in `find_levels`.
        rank: int32 [B, T], values of the record before the lane's first.
        n: int32 [B, T], values of the lane.
        before: tuple of int32 [B, 1], codes of each level but the first, and of the rest, before these lanes.

    Returns the windows of the first and of the second planes, the escapes of all levels (tuples of uint32
    [B, T]), and `before` for the lanes that follow.
    """
    codes = ()
    upper = ()
    escapes = ()
    following = ()
    for level in tl.static_range(PAIRS + SINGLES):
        valid = (tl.full([], 2, tl.uint32) << ((n - 1) & 31).to(tl.uint32)) - 1  # all where n is 0
        escaping = window(words, firsts[level] * 8 + rank, n > 0) & valid
        codes = codes + (escaping,)
        if level < PAIRS:
            second = window(words, seconds[level] * 8 + rank, n > 0) & valid
            upper = upper + (second,)
            escaping = escaping & second
        escapes = escapes + (escaping,)
        n = popcount(escaping)
        if level + 1 < PAIRS + SINGLES:
            rank = tl.cumsum(n, axis=1) - n + before[level]
        following = following + (before[level] + tl.sum(n, axis=1, keep_dims=True),)
    return codes, upper, escapes, following


@triton.jit
def exponent_elements(
    word,
    rank,
    codes,
    upper,
    escapes,
    rest_before,
    record,
    rest_start,
    names,
    heads,
    lows,
    low_skew,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    HALF: tl.constexpr,
    IN_ORDER: tl.constexpr,
):
    """int16 [B, T, 32]: the bits of the elements of each lane.

    Args:
        word: uint32 [B, T], the mask.
        rank, codes, upper, escapes: see `read_levels`.
        rest_before: int32 [B, 1], exponents of the rest before these lanes.
        record: [B, 1] pointers to the first byte of the aligned word in which the record begins.
        rest_start: int32 [B, 1], bytes from there to the rest.
        names: see `read_names`.
        heads: [B, 1] pointers to sign and mantissa of the record's first value.
        lows, low_skew: [B, 1] pointers to the byte, and the bit (int32) in it, where the low mantissa bits of
            the record's first value begin; used if HALF.
        IN_ORDER: whether lanes hold 32 values or none, and `heads` are aligned to four bytes.
    """
    before = _byte_counts(word)
    exponents, left = _exponents(word, before, codes, upper, escapes, names, PAIRS, SINGLES)
    exponents = _with_rest(exponents, left, record + (rest_start + rest_before))
    # A column that holds nothing reads the head of the value before it, or the lane's first one: both are
    # there. Only a lane without values must not read heads; it reads the record, which has bytes for all.
    others = word & (word - 1)
    at = before - (((before + 0x7F7F7F7F) >> 7) & 0x01010101)
    if IN_ORDER:
        heads = _eight_words(heads + rank, word != 0)
    else:
        heads = tl.where(word != 0, heads + rank, record)
    if HALF:
        lows = _low_windows(word, lows, low_skew + 3 * rank)
        low_at = tl.zeros_like(word)
    first = ()
    second = ()
    for step in tl.static_range(8):
        kept = (word >> step) & 0x01010101
        if IN_ORDER:
            head = _four_columns(heads, step)
        else:
            at += (others >> step) & 0x01010101
            head = _four_bytes(heads, at) & (kept * 255)
        low, high = _pairs(head, exponents[step], HALF)
        if HALF:
            bits = _four_lows(lows, low_at) & (kept * 7)
            low_at += kept * 3
            low = low | (bits & 0x00FF00FF)
            high = high | ((bits >> 8) & 0x00FF00FF)
        first = first + (low,)
        second = second + (high,)
    return join_columns(_halves(first, 0) + _halves(second, 0) + _halves(first, 16) + _halves(second, 16))


@triton.jit
def _exponents(word, before, codes, upper, escapes, names, PAIRS: tl.constexpr, SINGLES: tl.constexpr):
    """The exponents of columns `step`, 8 + `step`, 16 + `step` and 24 + `step` as the bytes of a uint32.

    `before` is what `_byte_counts` says of the word. Returns eight of them, and the columns whose exponents
    are in the rest (uint32; they are zero so far).
    """
    reached, by_first, by_second = names
    one = (before >> 8) & 0xFF  # codes that the bytes before each one of the word take
    two = (before >> 16) & 0xFF
    three = before >> 24
    left = ()
    upper_left = ()
    for level in tl.static_range(PAIRS + SINGLES):
        left = left + (_spread(codes[level], one, two, three),)
        if level < PAIRS:
            upper_left = upper_left + (_spread(upper[level], one, two, three),)
        if level + 1 < PAIRS + SINGLES:
            one = _below(escapes[level], one)
            two = _below(escapes[level], two)
            three = _below(escapes[level], three)
    exponents = ()
    rest = tl.zeros_like(word)
    for step in tl.static_range(8):
        taken, escaped, left, upper_left = _take(
            (word >> step) & 0x01010101, left, upper_left, reached, by_first, by_second, PAIRS, SINGLES
        )
        exponents = exponents + (taken,)
        rest = rest | (escaped << step)
    return exponents, rest


@triton.jit
def _spread(bits, one, two, three):
    """The eight bits from number 0, `one`, `two` and `three` (at most 24) on, as the bytes of a uint32."""
    low = (bits & 0xFF) | (((bits >> one) & 0xFF) << 8)
    return low | (((bits >> two) & 0xFF) << 16) | ((bits >> three) << 24)


@triton.jit
def _below(bits, n):
    """Bits set among the lowest `n` (at most 24), as uint32."""
    one = tl.full([], 1, tl.uint32)
    return popcount(bits & ((one << n) - 1)).to(tl.uint32)


@triton.jit
def _take(
    reaches, left, upper_left, reached, by_first, by_second, PAIRS: tl.constexpr, SINGLES: tl.constexpr
):
    """Take the codes of four columns, one bit per byte, off the levels that they reach.

    Returns the exponents, the columns that no level names, and the codes that are left. A byte of `left`
    that is shifted takes in a bit of the byte above, which would be the ninth that it gives.
    """
    following = ()
    upper_following = ()
    full = reaches * 255
    exponent = reaches * reached[0]
    for level in tl.static_range(PAIRS + SINGLES):
        code = left[level] & reaches
        following = following + ((left[level] & ~full) | ((left[level] >> 1) & full),)
        if level < PAIRS:
            second = upper_left[level] & reaches
            shifted = (upper_left[level] & ~full) | ((upper_left[level] >> 1) & full)
            upper_following = upper_following + (shifted,)
            exponent += code * by_first[level] + second * by_second[level]
            code = code & second
        reaches = code
        full = reaches * 255
        exponent += reaches * reached[level + 1]
    return exponent, reaches, following, upper_following


@triton.jit
def _with_rest(exponents, left, rest):
    """`exponents` with those of the columns `left` put in, which few lanes have.

    `rest` points to the exponent of the first such column of all lanes. In each turn every lane that has any
    left puts in the one of its lowest column. Not a `while`: the compiler of Triton 3.6 stumbles over one
    that carries tensors.
    """
    if tl.max((left != 0).to(tl.int32)) != 0:
        n = popcount(left)
        at = tl.cumsum(n, axis=1) - n
        for _turn in tl.range(0, tl.max(n), num_stages=1):
            lowest = left & (~left + 1)
            byte = tl.load(rest + at, mask=left != 0, other=0).to(tl.uint32)
            added = ()
            for step in tl.static_range(8):
                added = added + (exponents[step] + ((lowest >> step) & 0x01010101) * byte,)
            exponents = added
            at += 1
            left = left ^ lowest
            tl.debug_barrier()  # keeps LLVM from unrolling a loop that few tiles enter: 250 instructions
    return exponents


@triton.jit
def _byte_counts(bits):
    """Bits set below each byte of a uint32, as bytes."""
    n = bits - ((bits >> 1) & 0x55555555)
    n = (n & 0x33333333) + ((n >> 2) & 0x33333333)
    n = (n + (n >> 4)) & 0x0F0F0F0F
    return n * 0x01010100


@triton.jit
def _four_bytes(memory, at):
    """What lies `at` (four offsets, as bytes) in memory (pointers to uint8), as bytes of a uint32."""
    zero = tl.load(memory + (at & 0xFF)).to(tl.uint32)
    first = tl.load(memory + ((at >> 8) & 0xFF)).to(tl.uint32)
    second = tl.load(memory + ((at >> 16) & 0xFF)).to(tl.uint32)
    third = tl.load(memory + (at >> 24)).to(tl.uint32)
    return (zero | (first << 8)) | ((second | (third << 8)) << 16)


@triton.jit
def _eight_words(memory, mask):
    """The 32 bytes behind pointers to uint8, aligned to four, as eight uint32; zeros without `mask`."""
    words = ()
    for number in tl.static_range(8):
        at = memory.to(tl.pointer_type(tl.uint32)) + number
        words = words + (tl.load(at, mask=mask, other=0),)
    return words


@triton.jit
def _four_columns(words, step: tl.constexpr):
    """Bytes number `step`, 8 + `step`, 16 + `step` and 24 + `step` of eight words."""
    zero = (words[step // 4] >> (8 * (step % 4))) & 0xFF
    first = (words[2 + step // 4] >> (8 * (step % 4))) & 0xFF
    second = (words[4 + step // 4] >> (8 * (step % 4))) & 0xFF
    third = (words[6 + step // 4] >> (8 * (step % 4))) & 0xFF
    return (zero | (first << 8)) | ((second | (third << 8)) << 16)


@triton.jit
def _pairs(head, exponent, HALF: tl.constexpr):
    """Bits of four elements, as two uint32: those of the even and those of the odd bytes."""
    if HALF:
        low = head & 0x00FF00FF
        high = (head >> 8) & 0x00FF00FF
        low = ((low << 8) & 0x80008000) | ((low << 3) & 0x03F803F8) | ((exponent & 0x001F001F) << 10)
        high = ((high << 8) & 0x80008000) | ((high << 3) & 0x03F803F8)
        high = high | (((exponent >> 8) & 0x001F001F) << 10)
    else:
        low = ((head << 8) & 0x80008000) | (head & 0x007F007F) | ((exponent << 7) & 0x7F807F80)
        high = (head & 0x80008000) | ((head >> 8) & 0x007F007F) | ((exponent >> 1) & 0x7F807F80)
    return low, high


@triton.jit
def _halves(pairs, shift: tl.constexpr):
    """One half of each of eight uint32, as int16."""
    halves = ()
    for step in tl.static_range(8):
        half = (pairs[step] >> shift).to(tl.uint16)
        halves = halves + (half.to(tl.int16, bitcast=True),)
    return halves


@triton.jit
def _low_windows(word, lows, bit):
    """The three low mantissa bits of each value of each byte of the word: four uint32.

    Bytes are read only where they have bits of these values: there is nothing behind the section.
    """
    windows = ()
    for byte in tl.static_range(4):
        n = popcount((word >> (8 * byte)) & 0xFF)
        at = lows + (bit >> 3)
        skew = bit & 7
        bits = tl.zeros_like(word)
        for number in tl.static_range(4):
            there = skew + 3 * n > 8 * number
            there = there & (n > 0)
            bits = bits | (tl.load(at + number, mask=there, other=0).to(tl.uint32) << (8 * number))
        windows = windows + (bits >> skew.to(tl.uint32),)
        bit += 3 * n
    return windows


@triton.jit
def _four_lows(windows, at):
    """The three bits from number `at` (four of them, as bytes) of each window on, as bytes."""
    zero = (windows[0] >> (at & 0xFF)) & 7
    one = (windows[1] >> ((at >> 8) & 0xFF)) & 7
    two = (windows[2] >> ((at >> 16) & 0xFF)) & 7
    three = (windows[3] >> (at >> 24)) & 7
    return zero | (one << 8) | (two << 16) | (three << 24)

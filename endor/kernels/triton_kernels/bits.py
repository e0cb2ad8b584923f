"""Device functions that every Triton kernel shares: counting bits, reading bits at any position, rounding.

All of them work on whole tensors of lanes and in plain integer arithmetic, so that the interpreter, which
runs them with numpy, and the compiler, which knows the idioms, agree. `popcount` becomes one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "as_float32",
    "join_columns",
    "low_bits",
    "popcount",
    "round_to_bfloat16",
    "round_to_float16",
    "window",
]


@triton.jit
def popcount(x):
    """Bits set in each uint32, as int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def low_bits(n):
    """uint32 with the lowest `n` bits set, for int32 `n` of at most 32; none for a negative one."""
    n = tl.maximum(n, 0)
    one = tl.full([], 1, tl.uint32)
    return tl.where(n >= 32, 0xFFFFFFFF, (one << (n & 31).to(tl.uint32)) - 1).to(tl.uint32)


@triton.jit
def window(words, bit, mask):
    """The 32 bits from number `bit` (int32) on, where `mask`: two aligned words, shifted together.

    Reads the word of `bit` and the one behind it.
    """
    at = words + (bit >> 5)
    low = tl.load(at, mask=mask, other=0).to(tl.uint64)
    high = tl.load(at + 1, mask=mask, other=0).to(tl.uint64)
    return (((high << 32) | low) >> (bit & 31).to(tl.uint64)).to(tl.uint32)


@triton.jit
def join_columns(x):
    """32 tensors [B, T], one per column, as one [B, T, 32]; no thread gives anything away."""
    joined = _join_halves(_join_halves(_join_halves(_join_halves(_join_halves(x, 16), 8), 4), 2), 1)
    return tl.reshape(joined[0], (joined[0].shape[0], joined[0].shape[1], 32))


@triton.jit
def _join_halves(x, N: tl.constexpr):
    """Each of the first N tensors joined with the one N behind it."""
    joined = ()
    for number in tl.static_range(N):
        joined = joined + (tl.join(x[number], x[number + N]),)
    return joined


@triton.jit
def round_to_bfloat16(x):
    """The bits (int16) of the bfloat16 nearest to each float32, ties to even.

    In integers, because the interpreter has no bfloat16 of its own.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def round_to_float16(x):
    """The bits (int16) of the float16 nearest to each float32, ties to even."""
    return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def as_float32(bits, HALF: tl.constexpr):
    """float32 of the int16 bits of a float16 (if HALF) or bfloat16."""
    if HALF:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)

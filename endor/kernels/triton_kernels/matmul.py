"""Triton kernel that multiplies: y = x W^T straight from the sections of W, which is never written anywhere.

A program has B row blocks side by side and walks their rows together, T mask words at a time. With one row of
x, products are summed per column and reduced once per row; with more, a tile of W goes to the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from endor.kernels.triton_kernels.bits import as_float32, round_to_bfloat16, round_to_float16
from endor.kernels.triton_kernels.blocks import first_words, open_blocks, read_tile, report_blocks
from endor.kernels.triton_kernels.elements import FLOAT16

__all__ = ["matmul_kernel"]


@triton.jit(do_not_specialize=["x_rows", "rows", "row_block", "nnz", "exponent_bytes"])
def matmul_kernel(
    x,
    bitmap,
    row_offsets,
    values,
    exponent_offsets,
    exponents,
    extra,
    codebook,
    bias,
    y,
    status,
    x_rows,
    rows,
    cols,
    row_block,
    nnz,
    exponent_bytes,
    group_columns,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    CODEC: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLES: tl.constexpr,
    KIND: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
    EXACT_DOT: tl.constexpr,
):
    """y [x_rows, rows] = x [x_rows, cols] W^T + bias, sums in float32; B row blocks per program.

    Args:
        x, bias, y: bfloat16 or float16 (KIND), whose bits are handled as int16; bias may be None.
        status: int64 [1], lowered to what was wrong; y is then undefined.
        M: 1, or a power of two from 16 on that is not below x_rows.
        EXACT_DOT: multiply matrices in float32, for the interpreter, which cannot multiply bfloat16.
        The others: see `decode_kernel`.
    """
    x = x.to(tl.pointer_type(tl.int16))
    y = y.to(tl.pointer_type(tl.int16))
    if bias is not None:
        bias = bias.to(tl.pointer_type(tl.int16))
    number = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    block = number[:, None]
    first_row = block * row_block
    rows_here = tl.maximum(tl.minimum(rows - first_row, row_block), 0).to(tl.int32)
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
        max(T, 32),  # counting is all latency: more codes at once than are multiplied
    )
    row_words, mask_words = first_words(bitmap, first_row, cols, MASKED)
    before = tl.zeros((B, 1), tl.int32)
    padding = tl.zeros((B, 1), tl.int32)
    m = tl.arange(0, M)
    for row in range(tl.max(rows_here)):
        if M == 1:
            sums = tl.zeros((B, T), tl.float32)
        else:
            sums = tl.zeros((M, B), tl.float32)
        for tile in range(0, row_words, T):
            word = tile + tl.arange(0, T)[None, :]
            inside = (word < row_words) & (row < rows_here)
            elements, before, deeper, padding = read_tile(
                mask_words,
                row * row_words + word,
                row,
                first_row,
                word * 32,
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
            if M == 1:
                k = (word * 32)[:, :, None] + tl.arange(0, 32)[None, None, :]
                x_bits = tl.load(x + k, mask=k < cols, other=0)
                products = as_float32(elements, KIND == FLOAT16) * as_float32(x_bits, KIND == FLOAT16)
                sums += tl.sum(products, axis=2)
            else:
                k = tile * 32 + tl.arange(0, T * 32)[None, :]
                from_x = x + m.to(tl.int64)[:, None] * cols + k
                x_bits = tl.load(from_x, mask=(m < x_rows)[:, None] & (k < cols), other=0)
                w = tl.reshape(elements, (B, T * 32))
                sums = _dot(x_bits, w, sums, KIND == FLOAT16, EXACT_DOT)
        if M == 1:
            result = tl.sum(sums, axis=1)[None, :]
        else:
            result = sums
        to = tl.reshape(first_row, (1, B)) + row
        there = tl.reshape(rows_here, (1, B)) > row
        if bias is not None:
            added = tl.load(bias + to, mask=there, other=0)
            result += as_float32(added, KIND == FLOAT16)
        if KIND == FLOAT16:
            bits = round_to_float16(result)
        else:
            bits = round_to_bfloat16(result)
        tl.store(y + m.to(tl.int64)[:, None] * rows + to, bits, mask=there & (m < x_rows)[:, None])
    report_blocks(
        status, block, rows_here, count, before, padding, deeper, bounds_wrong, record_wrong, MASKED, CODEC
    )


@triton.jit
def _dot(x_bits, w_bits, sums, HALF: tl.constexpr, EXACT_DOT: tl.constexpr):
    """sums [M, B] + x [M, K] w [B, K]^T."""
    if EXACT_DOT:
        x = as_float32(x_bits, HALF)
        w = as_float32(w_bits, HALF)
        return tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    elif HALF:
        return tl.dot(
            x_bits.to(tl.float16, bitcast=True), tl.trans(w_bits.to(tl.float16, bitcast=True)), sums
        )
    else:
        return tl.dot(
            x_bits.to(tl.bfloat16, bitcast=True), tl.trans(w_bits.to(tl.bfloat16, bitcast=True)), sums
        )

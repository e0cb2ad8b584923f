"""`F.linear` straight from a packed weight, for few rows of x: the weight is never written to memory dense.

At batch 1 a matmul costs what it costs to read the weight, and a packed weight is smaller. Each value is
expanded into a register, multiplied with every row of x, and forgotten.

Sums are collected in float32 and rounded once, to the dtype of x. A result is the same for any number of
threads, and a row of x gets the same result alone as among others; it is not the same bits as `F.linear` of
the dense weight, which adds in another order. With bfloat16 instructions (`avx512bf16`, bfloat16 x) subnormal
numbers count as zeros.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels.native_backend import RULES
from endor.kernels.native_memory import aligned

__all__ = ["MAX_ROWS", "instruction_sets", "linear", "supports"]

MAX_ROWS = {"avx512bf16": 16, "avx512": 8, "avx2": 4, "scalar": 1}
"""Rows of x up to which it is faster than decoding first. Milliseconds for 4096 x 11008, half of it kept, on
one Zen 5 core, whose F.linear has bfloat16 instructions (`scripts/bench_matmul.py`):

| rows | dense F.linear | decode, then F.linear | avx512bf16 | avx512 | avx2 |
| ---- | -------------- | --------------------- | ---------- | ------ | ---- |
| 1    | 5.3            | 8.3                   | 1.7        | 1.6    | 3.5  |
| 4    | 5.0            | 8.0                   | 2.1        | 2.4    | 7.5  |
| 8    | 5.9            | 8.5                   | 3.5        | 5.2    | 8.8  |
| 16   | 7.2            | 10.3                  | 6.8        | 10.6   | 17.3 |
"""
_X_DTYPES = (torch.bfloat16, torch.float32)


@cache
def _extension() -> Any:
    """The native extension, or None; importing the backend has already told it about threads."""
    try:
        return importlib.import_module("endor.kernels._native")
    except ImportError:
        return None


@cache
def _instruction_sets() -> dict[str, int]:
    extension = _extension()
    isas: dict[str, int] = {} if extension is None else extension.matmul_isas()
    return isas


def instruction_sets() -> tuple[str, ...]:
    """Those of this machine, fastest first; each is accepted as `isa=`."""
    return tuple(_instruction_sets())


def supports(x: Tensor, packed: PackedTensor) -> bool:
    """Whether `linear` takes this product, and is the faster way to it than decode and `F.linear`."""
    if not (_is_possible(x, packed) and _instruction_sets()):
        return False
    limit = MAX_ROWS[next(iter(_instruction_sets()))]
    return x.numel() <= limit * x.shape[-1]


def _is_possible(x: Tensor, packed: PackedTensor) -> bool:
    """Whether there is code for this product, however slow."""
    layout = packed.layout
    return (
        layout.codec == "raw"
        and layout.mask == "bitmap"
        and layout.dtype == torch.bfloat16
        and len(layout.shape) == 2
        and x.dtype in _X_DTYPES
        and x.device.type == "cpu"
        and packed.device.type == "cpu"
        and x.dim() > 0
        and x.shape[-1] == layout.shape[1]
        and type(x) in {Tensor, torch.nn.Parameter}
        and not torch.compiler.is_compiling()
    )


def linear(
    x: Tensor, packed: PackedTensor, bias: Tensor | None = None, *, isa: str | None = None
) -> Tensor | None:
    """x W^T + bias, or None where decode and `F.linear` should be used (see `supports`).

    Args:
        x: bfloat16 or float32 [..., columns of W], few rows: MAX_ROWS.
        packed: W, bfloat16 [rows, columns]. Contents may come from a file: whatever they say, nothing outside
            the sections is touched.
        bias: [rows of W], of the dtype of x.
        isa: one of `instruction_sets()`, for any number of rows; the fastest by default.

    Returns [..., rows of W] in the dtype of x, which has no gradient.

    Raises FormatError where the contents contradict each other, KernelError for a bias that does not fit or
    an unknown `isa`.
    """
    if not (supports(x, packed) if isa is None else _is_possible(x, packed)):
        return None
    layout, sections = packed.layout, packed.sections
    rows, cols = layout.shape
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype)
    x_rows = x.numel() // cols if cols else y.numel() // max(rows, 1)
    if bias is not None:
        bias = _checked_bias(bias, rows, x.dtype)
    x = aligned(x.detach().contiguous())
    row_offsets, values = aligned(sections["row_offsets"]), aligned(sections["values"])
    extension = _extension()
    scratch = torch.empty(extension.matmul_scratch_bytes(x_rows, cols), dtype=torch.uint8)
    failure = extension.matmul(
        _isa_number(isa),
        torch.get_num_threads(),
        rows,
        cols,
        layout.geometry.row_block,
        layout.nnz,
        sections["bitmap"].data_ptr(),
        row_offsets.data_ptr(),
        row_offsets.dtype == torch.int64,
        values.data_ptr(),
        x_rows,
        x.dtype == torch.float32,
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        scratch.data_ptr(),
        y.data_ptr(),
    )
    if failure >= 0:
        raise FormatError(f"row block {failure // 4}: {RULES[failure % 4]}")
    return y


def _isa_number(isa: str | None) -> int:
    known = _instruction_sets()
    if isa is None:
        return next(iter(known.values()))
    if isa not in known:
        raise KernelError(f"unknown instruction set {isa!r}; this machine has {', '.join(known)}")
    return known[isa]


def _checked_bias(bias: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    if bias.shape != (rows,) or bias.dtype != dtype or bias.device.type != "cpu":
        raise KernelError(
            f"bias must be {dtype} [{rows}] on the CPU, found {bias.dtype}{list(bias.shape)} on {bias.device}"
        )
    return bias.detach().float().contiguous()

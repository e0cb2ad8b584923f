"""`F.linear` straight from a packed weight, for few rows of x: the weight is never written to memory dense.

At batch 1 a matmul costs what it costs to read the weight, and a packed weight is smaller. Each value is
expanded into a register, multiplied with every row of x, and forgotten; where an instruction set has no loop
for that, a few rows of the weight at a time are decoded to memory that stays in the cache.

What is multiplied are the weights that decoding gives, for the lossy codecs too. Sums are collected in
float32 and rounded once, to the dtype of x. A result is the same for any number of threads, and a row of x
gets the same result alone as among others; it is not the same bits as `F.linear` of the dense weight, which
adds in another order. With bfloat16 instructions (`avx512bf16`, bfloat16 x) subnormal numbers count as zeros.
"""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels.native_backend import RULES
from endor.kernels.native_exponent import exponent_arguments
from endor.kernels.native_memory import aligned, with_aligned_sections
from endor.kernels.native_quantized import quantized_arguments

__all__ = ["MAX_ROWS", "PLAIN_TENSORS", "instruction_sets", "linear", "supports"]

MAX_ROWS = {
    "avx512bf16": {"raw": 8, "exponent": 8, "int8": 8, "int4": 8},
    "avx512": {"raw": 8, "exponent": 4, "int8": 8, "int4": 8},
    "avx2": {"raw": 4, "exponent": 1, "int8": 2, "int4": 1},
    "scalar": {"raw": 1, "exponent": 1, "int8": 1, "int4": 1},
}
"""Rows of x up to which a product is faster than decoding first, as measured: docs/design/kernels.md."""
_X_DTYPES = (torch.bfloat16, torch.float32)
_CODECS = {"raw": 0, "exponent": 1, "int8": 2, "int4": 2}
"""What the extension's `matmul` calls the arguments of `_operand`."""
_DECODE_ISAS = {"avx512bf16": "avx512"}
"""The instruction sets of decoding that are called otherwise."""


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


@dataclass(frozen=True)
class _Operand:
    """A packed weight as the extension's `matmul` takes it."""

    rows: int
    cols: int
    max_rows: int
    codec: int
    arguments: tuple[Any, ...]
    packed: PackedTensor | None
    """What owns the sections, if it is not the tensor that this was made for."""


@dataclass(frozen=True)
class _Remembered:
    """An operand, and what it was made for: a number can be the id of one object after another, and sections
    move when a tensor is sent to another process."""

    made_for: weakref.ref[PackedTensor]
    places: tuple[int, ...]
    operand: _Operand | None


_operands: dict[tuple[int, str], _Remembered] = {}


def _operand(packed: PackedTensor, isa: str) -> _Operand | None:
    """None where there is no code for this weight. Made once: it takes as long as a small product."""
    key = (id(packed), isa)
    remembered = _operands.get(key)
    places = tuple([section.data_ptr() for section in packed.sections.values()])
    if remembered is not None and remembered.made_for() is packed and remembered.places == places:
        return remembered.operand
    operand = _make_operand(packed, isa)
    made_for = weakref.ref(packed, lambda _: _operands.pop(key, None))
    _operands[key] = _Remembered(made_for, places, operand)
    return operand


def _make_operand(packed: PackedTensor, isa: str) -> _Operand | None:
    layout = packed.layout
    supported = (
        layout.codec in _CODECS
        and not layout.is_plain
        and layout.dtype == torch.bfloat16
        and len(layout.shape) == 2
        and packed.device.type == "cpu"
    )
    if not supported:
        return None
    own = with_aligned_sections(packed)
    mask = _mask_arguments(own, isa)
    if layout.codec == "raw":
        values = own.sections["values"].data_ptr()
        arguments = (*mask[:9], mask[9], values, *mask[10:])
    else:
        make = exponent_arguments if layout.codec == "exponent" else quantized_arguments
        arguments = make(mask, own)
    rows, cols = layout.shape
    max_rows = MAX_ROWS[isa][layout.codec]
    return _Operand(
        rows, cols, max_rows, _CODECS[layout.codec], arguments, own if own is not packed else None
    )


def _mask_arguments(packed: PackedTensor, isa: str) -> tuple[Any, ...]:
    """As for decoding: `parse_mask` in module.cpp. What concerns the output of a decode is zero."""
    layout, sections = packed.layout, packed.sections
    g = layout.geometry
    offsets = sections.get("row_offsets")
    decode_isa: int = _extension().isas()[_DECODE_ISAS.get(isa, isa)]
    return (
        decode_isa,
        1,
        g.rows,
        g.cols,
        g.row_block,
        layout.nnz,
        1,
        0 if offsets is None else sections["bitmap"].data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        offsets is not None and offsets.dtype == torch.int64,
        0,
        0,
        0,
        False,
    )


def supports(x: Tensor, packed: PackedTensor) -> bool:
    """Whether `linear` takes this product, and is the faster way to it than decode and `F.linear`."""
    return bool(_instruction_sets()) and _possible(x, packed, None) is not None


def _possible(x: Tensor, packed: PackedTensor, isa: str | None) -> _Operand | None:
    """The operand, if there is code for this product, and few enough rows unless `isa` is given."""
    if type(x) not in PLAIN_TENSORS or torch.compiler.is_compiling() or x.is_neg():
        return None
    operand = _operand(packed, isa or _fastest())
    if operand is None or x.dtype not in _X_DTYPES or x.device.type != "cpu" or x.dim() == 0:
        return None
    if x.shape[-1] != operand.cols or (isa is None and x.numel() > operand.max_rows * operand.cols):
        return None
    return operand


PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
"""What has memory of its own to take an address of; other subclasses may not."""


@cache
def _fastest() -> str:
    return next(iter(_instruction_sets()))


def linear(
    x: Tensor, packed: PackedTensor, bias: Tensor | None = None, *, isa: str | None = None
) -> Tensor | None:
    """x W^T + bias, or None where decode and `F.linear` should be used (see `supports`).

    Args:
        x: bfloat16 or float32 [..., columns of W], few rows: MAX_ROWS.
        packed: W, bfloat16 [rows, columns], of any codec and mask (dense and raw excepted). Contents may come
            from a file: whatever they say, nothing outside the sections is touched.
        bias: [rows of W], of the dtype of x.
        isa: one of `instruction_sets()`, for any number of rows; the fastest by default.

    Returns [..., rows of W] in the dtype of x, which has no gradient.

    Raises FormatError where the contents contradict each other, KernelError for a bias that does not fit or
    an unknown `isa`.
    """
    if isa is None and not _instruction_sets():
        return None
    isa_number = _isa_number(isa)
    operand = _possible(x, packed, isa)
    if operand is None:
        return None
    rows, cols = operand.rows, operand.cols
    y = x.new_empty((*x.shape[:-1], rows))
    x_rows = x.numel() // cols if cols else y.numel() // max(rows, 1)
    if bias is not None:
        bias = _checked_bias(bias, rows, x.dtype)
    x = aligned(x.detach().contiguous())
    failure = _extension().matmul(
        isa_number,
        operand.codec,
        operand.arguments,
        torch.get_num_threads(),
        x_rows,
        x.dtype == torch.float32,
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
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

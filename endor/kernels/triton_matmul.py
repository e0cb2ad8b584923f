"""`F.linear` on a GPU straight from a packed weight, for few rows of x: the weight is never written dense.

At batch 1 a matmul costs what it costs to read the weight, and a packed weight is smaller. Whether that pays
depends on the GPU: the first product with a kind of weight times all tiles and decoding first, and what was
fastest is used from then on (`endor.kernels.triton_tuning`).

Sums are collected in float32 and rounded once, to the dtype of x; they are not the same bits as `F.linear` of
the dense weight, which adds in another order, and depend on the tile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from endor.errors import KernelError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.triton_kernels.matmul import matmul_kernel
from endor.kernels.triton_launch import launch_decode, launch_is_impossible, new_status, on_device, raise_for
from endor.kernels.triton_launcher import Launcher
from endor.kernels.triton_mode import is_interpreted
from endor.kernels.triton_operand import OPTIONS, Operand, operand_of
from endor.kernels.triton_tuning import (
    DECODE_FIRST,
    Choices,
    EventClock,
    Tile,
    TimeS,
    Way,
    fastest,
    kind_of,
    scratch_of,
)

__all__ = ["MAX_ROWS", "Tile", "decide", "has_kernel", "linear", "set_tuning", "supports", "tiles", "tune"]

MAX_ROWS = 16
"""Rows of x that one tile of the tensor cores holds."""
MAX_ROW_BLOCK = 16
"""A program walks the rows of a row block one after the other; with more of them (fewer than 256 columns) too
few programs are left."""
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.bfloat16, torch.float16)
# A thread per lane in each (`blocks * words == 32 * warps`). Few: each costs a second or two to compile.
_VECTOR = (Tile(1, 32, 1), Tile(4, 32, 4), Tile(1, 128, 4))
_MATRIX = (Tile(16, 8, 4), Tile(32, 4, 4))
_choices = Choices()
_tuning_allowed = [True]
_deciding = threading.Lock()


def tiles(x_rows: int) -> Sequence[Tile]:
    """The tiles that there are for this number of rows of x; the first one is used without tuning."""
    return _VECTOR if x_rows == 1 else _MATRIX


def set_tuning(*, allowed: bool) -> None:
    """Whether `linear` may time the ways there are. If not, it takes the first tile, or what `tune` found."""
    _tuning_allowed[0] = allowed


def has_kernel(layout: TensorLayout) -> bool:
    """Whether a kernel multiplies with weights of this layout, few rows of their dtype."""
    return (
        not layout.is_plain
        and layout.dtype in _DTYPES
        and len(layout.shape) == 2
        and layout.geometry.numel > 0
        and layout.geometry.row_block <= MAX_ROW_BLOCK
        and not launch_is_impossible(layout)
    )


class _Product:
    """What products with one weight have in common."""

    def __init__(self, operand: Operand) -> None:
        self.operand = operand
        on_its_device = operand.device.type == ("cpu" if is_interpreted() else "cuda")
        self.possible = on_its_device and has_kernel(operand.layout)
        self.launchers: dict[tuple[Tile, bool, bool], Launcher] = {}
        """By tile, whether x has one row, and whether there is a bias."""

    @cached_property
    def kinds(self) -> tuple[str, str]:
        """What `_choices` calls this weight with several rows of x, and with one."""
        return kind_of(self.operand, MAX_ROWS), kind_of(self.operand, 1)

    def launcher(self, tile: Tile, *, one_row: bool, biased: bool) -> Launcher:
        key = (tile, one_row, biased)
        launcher = self.launchers.get(key)
        if launcher is None:
            launcher = self.launchers[key] = Launcher(matmul_kernel, self._options(tile, one_row=one_row))
        return launcher

    def _options(self, tile: Tile, *, one_row: bool) -> dict[str, Any]:
        words = 1 << (2 * self.operand.layout.geometry.words_per_row - 1).bit_length()
        return {
            **self.operand.constants,
            "M": 1 if one_row else MAX_ROWS,
            "B": tile.blocks,
            "T": min(tile.words, words),
            "EXACT_DOT": is_interpreted(),
            "num_warps": tile.warps,
            **OPTIONS,
        }


def supports(x: Tensor, packed: PackedTensor) -> bool:
    """Whether there is a kernel for this product; `linear` may still find decoding first to be faster."""
    return _product_for(x, packed) is not None


def _product_for(x: Tensor, packed: PackedTensor) -> _Product | None:
    if type(x) not in _PLAIN_TENSORS or torch.compiler.is_compiling() or packed.layout.is_plain:
        return None
    if x.numel() > MAX_ROWS * packed.layout.geometry.cols:  # a prompt: not worth a look at the sections
        return None
    operand = operand_of(packed)
    product: _Product | None = operand.product
    if product is None:
        product = _Product(operand)
        operand.product = product
    cols = operand.sizes[1]
    fits = (
        product.possible
        and x.dtype == operand.layout.dtype
        and x.dim() > 0
        and x.shape[-1] == cols
        and 0 < x.numel() <= MAX_ROWS * cols
        and x.device == operand.device
        and not x.is_neg()
    )
    return product if fits else None


def linear(
    x: Tensor,
    packed: PackedTensor,
    bias: Tensor | None = None,
    *,
    status: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor | None:
    """x W^T + bias, or None where decode and `F.linear` should be used: see `supports`, or it is faster.

    The first call for a kind of weight, and for one or several rows, finds out what is faster (`decide`),
    which waits for the device; all others wait for nothing.

    Args:
        x: bfloat16 or float16 [..., columns of W], at most MAX_ROWS rows.
        packed: W, [rows, columns] of the dtype of x, with any codec. Contents may come from a file: whatever
            they say, nothing outside the sections is touched.
        bias: [rows of W], of the dtype of x.
        status: int64 [1] (`triton_launch.new_status`) that gets what is wrong with the contents, so that
            nobody waits for the device. Without it the call waits, and raises FormatError.
        tile: one of `tiles`, used without asking whether another way is faster.

    Returns [..., rows of W] in the dtype of x, which has no gradient. Raises KernelError for a bias that does
    not fit.
    """
    product = _product_for(x, packed)
    if product is None:
        return None
    rows, cols = packed.layout.shape
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device):
        raise KernelError(
            f"bias must be {x.dtype} [{rows}] on {x.device}, found {bias.dtype}{list(bias.shape)} "
            f"on {bias.device}"
        )
    x_rows = x.numel() // cols
    way = tile or _way(product, packed, x_rows)
    if not isinstance(way, Tile):
        return None
    y = x.new_empty((*x.shape[:-1], rows))
    found = new_status(x.device) if status is None else status
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    x = x if x.is_contiguous() else x.contiguous()
    _launch(x, product, bias, y, x_rows=x_rows, status=found, tile=way)
    if status is None:
        raise_for(found)
    return y


def _way(product: _Product, packed: PackedTensor, x_rows: int) -> Way:
    """What is known to be fastest, or found out now, or the first tile where nothing may be timed."""
    known = _choices.get(product.kinds[x_rows == 1])
    if known is not None:
        return known
    can_be_timed = (
        _tuning_allowed[0] and packed.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    )
    return decide(packed, x_rows) if can_be_timed else tiles(x_rows)[0]


def decide(packed: PackedTensor, x_rows: int, time_s: TimeS | None = None) -> Way:
    """Which way is fastest for weights like `packed`: remembered, or timed now and remembered.

    Timing waits for the device, and takes memory for the dense weight for that moment. Where there is none,
    decoding first is left out, and the result is forgotten with the process.

    Args:
        packed: a weight that `linear` takes; others of the same shape, dtype, mask, codec and params are
            multiplied in the same way.
        x_rows: 1, or any other number up to MAX_ROWS, which stands for all of them.
        time_s: by default CUDA events.

    Raises KernelError for a weight that `linear` does not take.
    """
    x = _ones(packed, 1 if x_rows == 1 else MAX_ROWS)
    kind, ways = _kind(packed, x_rows), _tile_ways(packed, x, new_status(x.device))
    with _deciding:
        known = _choices.recall(kind, {*ways, DECODE_FIRST})
        if known is not None:
            return known
        scratch = scratch_of(packed)
        if scratch is not None:
            ways[DECODE_FIRST] = partial(_decode_first, packed, x, scratch, new_status(x.device))
        with torch.no_grad(), on_device(x):
            best = fastest(ways, time_s or EventClock(scratch))
        (_choices.use if scratch is None else _choices.remember)(kind, best)
    return best


def tune(packed: PackedTensor, x_rows: int, time_s: TimeS) -> Tile:
    """Find the fastest tile for weights like `packed`, and use it from now on in this process.

    Unlike `decide` it does not ask whether decoding first is faster, reads and writes no file, and raises
    FormatError for a weight that is damaged.

    Args:
        packed, x_rows: see `decide`.
        time_s: runs a function and tells how long it takes on the device.
    """
    x = _ones(packed, x_rows)
    status = new_status(x.device)
    best = fastest(_tile_ways(packed, x, status), time_s)
    raise_for(status)
    assert isinstance(best, Tile)
    _choices.use(_kind(packed, x_rows), best)
    return best


def _kind(packed: PackedTensor, x_rows: int) -> str:
    return kind_of(operand_of(packed), x_rows)


def _ones(packed: PackedTensor, x_rows: int) -> Tensor:
    x = torch.ones(x_rows, packed.layout.shape[-1], dtype=packed.layout.dtype, device=packed.device)
    if not supports(x, packed):
        raise KernelError(f"no tile multiplies {x_rows} rows with {packed.layout}")
    return x


def _tile_ways(packed: PackedTensor, x: Tensor, status: Tensor) -> dict[Way, Callable[[], object]]:
    return {tile: partial(linear, x, packed, status=status, tile=tile) for tile in tiles(len(x))}


def _decode_first(packed: PackedTensor, x: Tensor, scratch: Tensor, status: Tensor) -> Tensor:
    layout = packed.layout
    dense = scratch[: layout.dense_bytes].view(layout.dtype).view(layout.shape)
    launch_decode(packed, 0, layout.geometry.row_blocks, dense, status)
    return F.linear(x, dense)


def _launch(
    x: Tensor,
    product: _Product,
    bias: Tensor | None,
    y: Tensor,
    *,
    x_rows: int,
    status: Tensor,
    tile: Tile,
) -> None:
    operand = product.operand
    programs = -(-operand.layout.geometry.row_blocks // tile.blocks)
    launcher = product.launcher(tile, one_row=x_rows == 1, biased=bias is not None)
    with on_device(x):
        arguments = (x, *operand.sections, bias, y, status, x_rows, *operand.sizes)
        launcher(programs, arguments, x, bias, y, status)

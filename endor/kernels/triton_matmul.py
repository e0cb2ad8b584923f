"""`F.linear` on a GPU straight from a packed weight, for few rows of x: the weight is never written dense.

At batch 1 a matmul costs what it costs to read the weight, and a packed weight is smaller. Sums are collected
in float32 and rounded once, to the dtype of x; they are not the same bits as `F.linear` of the dense weight,
which adds in another order, and depend on the tile that `tune` chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.packed import PackedTensor
from endor.kernels.triton_backend import is_interpreted
from endor.kernels.triton_kernels.matmul import matmul_kernel
from endor.kernels.triton_launch import (
    OPTIONS,
    Launch,
    Sections,
    launch_is_impossible,
    new_status,
    on_device,
    raise_for,
)

__all__ = ["MAX_ROWS", "Tile", "linear", "supports", "tiles", "tune"]

MAX_ROWS = 16
"""Rows of x that one tile of the tensor cores holds. Not measured: no GPU was at hand."""
MAX_ROW_BLOCK = 16
"""A program walks the rows of a row block one after the other; with more of them (fewer than 256 columns) too
few programs are left."""
_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """What a program works on at once: `blocks` row blocks side by side, `words` mask words of each."""

    blocks: int
    words: int
    warps: int


_VECTOR = (Tile(4, 16, 8), Tile(4, 32, 8), Tile(2, 32, 4), Tile(1, 128, 8))
_MATRIX = (Tile(16, 4, 8), Tile(16, 8, 8), Tile(16, 16, 8))
_chosen: dict[tuple[Any, ...], Tile] = {}
"""What `tune` found, for this process: by device, kind of kernel, shape, and whether x has one row."""


def tiles(x_rows: int) -> Sequence[Tile]:
    """The tiles that there are for this number of rows of x; the first one is used without tuning."""
    return _VECTOR if x_rows == 1 else _MATRIX


def supports(x: Tensor, packed: PackedTensor) -> bool:
    """Whether `linear` takes this product."""
    layout = packed.layout
    return (
        not layout.is_plain
        and layout.dtype in _DTYPES
        and len(layout.shape) == 2
        and layout.geometry.numel > 0
        and layout.geometry.row_block <= MAX_ROW_BLOCK
        and not launch_is_impossible(layout)
        and x.dtype == layout.dtype
        and x.dim() > 0
        and x.shape[-1] == layout.shape[1]
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and x.device == packed.device
        and x.device.type == ("cpu" if is_interpreted() else "cuda")
        and type(x) in {Tensor, torch.nn.Parameter}
        and not torch.compiler.is_compiling()
    )


def linear(
    x: Tensor,
    packed: PackedTensor,
    bias: Tensor | None = None,
    *,
    status: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor | None:
    """x W^T + bias, or None where decode and `F.linear` should be used (see `supports`).

    Args:
        x: bfloat16 or float16 [..., columns of W], at most MAX_ROWS rows.
        packed: W, [rows, columns] of the dtype of x, with any codec. Contents may come from a file: whatever
            they say, nothing outside the sections is touched.
        bias: [rows of W], of the dtype of x.
        status: int64 [1] (`triton_launch.new_status`) that gets what is wrong with the contents, so that
            nobody waits for the device. Without it the call waits, and raises FormatError.
        tile: one of `tiles`; what `tune` found by default.

    Returns [..., rows of W] in the dtype of x, which has no gradient. Raises KernelError for a bias that does
    not fit.
    """
    if not supports(x, packed):
        return None
    rows, cols = packed.layout.shape
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device):
        raise KernelError(
            f"bias must be {x.dtype} [{rows}] on {x.device}, found {bias.dtype}{list(bias.shape)} "
            f"on {bias.device}"
        )
    x_rows = x.detach().reshape(-1, cols).contiguous()
    y = torch.empty(len(x_rows), rows, dtype=x.dtype, device=x.device)
    found = new_status(x.device) if status is None else status
    tile = tile or _chosen.get(_key(packed, len(x_rows)), tiles(len(x_rows))[0])
    _launch(x_rows, packed, bias, y, status=found, tile=tile)
    if status is None:
        raise_for(found)
    return y.view(*x.shape[:-1], rows)


def tune(packed: PackedTensor, x_rows: int, time_s: Callable[[Callable[[], object]], float]) -> Tile:
    """Find the fastest tile for weights like `packed`, and use it from now on in this process.

    Args:
        packed: a weight on the device; others of the same shape, codec and levels will use the tile too.
        x_rows: 1, or any other number up to MAX_ROWS, which stands for all of them.
        time_s: runs a function and tells how long it takes on the device.
    """
    x = torch.ones(x_rows, packed.layout.shape[1], dtype=packed.layout.dtype, device=packed.device)
    if not supports(x, packed):
        raise KernelError(f"no tile multiplies {x_rows} rows with {packed.layout}")
    status = new_status(x.device)
    times = {t: time_s(partial(linear, x, packed, status=status, tile=t)) for t in tiles(x_rows)}
    raise_for(status)
    best = min(times, key=lambda t: times[t])
    _chosen[_key(packed, x_rows)] = best
    return best


def _key(packed: PackedTensor, x_rows: int) -> tuple[Any, ...]:
    constants = Launch(packed.layout).constants
    return (packed.device, packed.layout.shape, *constants.values(), x_rows == 1)


def _launch(
    x: Tensor, packed: PackedTensor, bias: Tensor | None, y: Tensor, *, status: Tensor, tile: Tile
) -> None:
    layout, at = packed.layout, Sections(packed)
    g = layout.geometry
    words = min(tile.words, 1 << (2 * g.words_per_row - 1).bit_length())
    options: dict[str, Any] = {
        **Launch(layout).constants,
        "M": 1 if len(x) == 1 else MAX_ROWS,
        "B": tile.blocks,
        "T": words,
        "EXACT_DOT": is_interpreted(),
        "num_warps": tile.warps,
        **OPTIONS,
    }
    with on_device(x):
        matmul_kernel[(-(-g.row_blocks // tile.blocks),)](
            x.view(torch.int16),
            at.bitmap,
            at.row_offsets,
            at.values,
            at.exponent_offsets,
            at.exponents,
            at.extra,
            at.codebook,
            None if bias is None else bias.detach().contiguous().view(torch.int16),
            y.view(torch.int16),
            status,
            len(x),
            g.rows,
            g.cols,
            g.row_block,
            layout.nnz,
            layout.params.get("exponent_bytes", 0),
            layout.params.get("group_columns", 1),
            **options,
        )

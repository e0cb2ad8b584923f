"""`F.linear` with a packed weight by the fastest way: straight from its sections for few rows of x, tile by
tile for more.

A tile is decoded and multiplied while it is in the cache, and memory for one is all that is needed. Both ways
add in another order than a product with the whole weight may, so their results differ from its in the last
bits.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from endor.errors import PlanError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels import matmul
from endor.kernels.backend import rows_of
from endor.kernels.dispatch import decode_rows
from endor.kernels.triton_backend import triton_backends

__all__ = [
    "MATMULS",
    "RowScratch",
    "check_matmul",
    "compressed_kernel",
    "has_triton",
    "packed_linear",
    "tile_shape",
]

MATMULS = ("auto", "decode")
"""How a packed weight is multiplied: `auto` by the fastest way, `decode` as the dense weight is, bit for
bit."""

_CPU = torch.device("cpu")
TILE_BYTES = 24 << 20
"""Dense bytes that are decoded and multiplied at a time. Milliseconds, half of a bf16 weight kept, `raw`, two
threads of a Zen 5 core with 32 MiB of third-level cache:

| weight       | rows of x | dense F.linear | 8 MiB | 16 MiB | 24 MiB | all at once |
| ------------ | --------- | -------------- | ----- | ------ | ------ | ----------- |
| 5632 x 2048  | 16        | 1.21           | 1.52  | 1.64   | 1.50   | 1.48        |
|              | 64        | 2.36           | 2.70  | 2.84   | 2.74   | 2.71        |
|              | 256       | 6.67           | 6.82  | 7.67   | 7.56   | 7.48        |
| 2048 x 5632  | 16        | 1.17           | 1.58  | 1.59   | 1.52   | 1.48        |
|              | 64        | 2.28           | 3.34  | 3.29   | 2.76   | 2.72        |
|              | 256       | 6.49           | 7.98  | 7.98   | 7.39   | 7.32        |

Where all at once is no slower, tiles still keep the scratch small. With one thread 8 MiB were as fast.
"""


class RowScratch(Protocol):
    """Lends memory to decode rows into; what it lent before may be overwritten by the next call."""

    @property
    def status(self) -> Tensor | None:
        """int64 [1] on the device of the weights, which kernels lower to what is wrong with a weight, so that
        nobody waits for them; None where damage is an exception of the call that meets it."""

    def decode_rows(
        self, packed: PackedTensor, start_block: int, stop_block: int, dtype: torch.dtype
    ) -> Tensor:
        """Row blocks [start_block, stop_block) in `dtype`, [rows, columns], valid until the next call."""


def check_matmul(matmul: object) -> str:
    """`matmul` if it is one of `MATMULS`. Raises PlanError otherwise."""
    if matmul not in MATMULS:
        raise PlanError(f"matmul must be one of {', '.join(MATMULS)}, found {matmul!r}")
    return str(matmul)


def tile_shape(layout: TensorLayout) -> tuple[int, int]:
    """Rows and columns of the largest tile that a weight is decoded in."""
    g = layout.geometry
    return min(g.rows, _tile_blocks(layout) * g.row_block), g.cols


def compressed_kernel(
    layout: TensorLayout, dtype: torch.dtype, device: torch.device = _CPU, *, status: bool = False
) -> str | None:
    """What multiplies one row of `dtype` straight from such a weight: an instruction set, or `triton`; None
    where nothing does.

    Args:
        layout, dtype: of the weight, and of x.
        device: of both.
        status: whether damage is noted in a status, as on a GPU.
    """
    if len(layout.shape) != 2:
        return None
    if device.type != "cpu" or status:
        return "triton" if _has_triton_product(layout, dtype, device) else None
    # Nothing looks at what the sections hold: memory that is never touched is enough.
    sections = {s.name: torch.empty(s.shape, dtype=s.dtype) for s in layout.sections}
    supported = matmul.supports(torch.empty(1, layout.shape[1], dtype=dtype), PackedTensor(layout, sections))
    return matmul.instruction_sets()[0] if supported else None


def packed_linear(
    x: Tensor, packed: PackedTensor, bias: Tensor | None, *, dtype: torch.dtype, scratch: RowScratch | None
) -> Tensor | None:
    """x W^T + bias, or None where only the whole dense weight will do.

    Args:
        x: of `dtype`, [..., columns of W].
        packed: W.
        bias: [rows of W] or None.
        dtype: that W has for others.
        scratch: lends memory for tiles; fresh memory without one.

    The result has no gradient. Raises FormatError where the contents of `packed` contradict each other, or
    notes that in the status of the scratch if it has one.
    """
    if not _is_plain_product(x, packed, bias, dtype):
        return None
    status = scratch.status if scratch is not None else None
    if x.device.type != "cpu" or status is not None:
        return _on_device(x, packed, bias, status)
    y = matmul.linear(x, packed, bias)
    return _tiled(x, packed, bias, dtype, scratch) if y is None else y


def _on_device(x: Tensor, packed: PackedTensor, bias: Tensor | None, status: Tensor | None) -> Tensor | None:
    """By the kernel for GPUs, where it is there and the faster way. Tiles would gain nothing: a device has no
    cache that a tile stays in, and each would be two more launches."""
    if not has_triton(x.device):
        return None
    from endor.kernels import triton_matmul

    return triton_matmul.linear(x, packed, bias, status=status)


def _has_triton_product(layout: TensorLayout, dtype: torch.dtype, device: torch.device) -> bool:
    if not has_triton(device) or layout.dtype != dtype:
        return False
    from endor.kernels import triton_matmul

    return triton_matmul.has_kernel(layout)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on `device`."""
    return any(backend.supports("raw", device) for backend in triton_backends())


def _is_plain_product(x: Tensor, packed: PackedTensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether this is a product of matrices on one device, with nothing recorded, traced, cast or mapped."""
    shape = packed.layout.shape
    return (
        type(x) in matmul.PLAIN_TENSORS
        and x.dtype == dtype
        and len(shape) == 2
        and x.dim() > 0
        and x.shape[-1] == shape[1]
        and x.numel() * shape[0] > 0
        and x.device == packed.device
        and not packed.layout.is_plain
        and (bias is None or _is_plain_bias(bias, shape[0], dtype))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not _has_tangent(x)
    )


def _is_plain_bias(bias: Tensor, rows: int, dtype: torch.dtype) -> bool:
    recorded = (bias.requires_grad and torch.is_grad_enabled()) or _has_tangent(bias)
    return (
        type(bias) in matmul.PLAIN_TENSORS and bias.shape == (rows,) and bias.dtype == dtype and not recorded
    )


def _has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows `x`."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _tile_blocks(layout: TensorLayout) -> int:
    g = layout.geometry
    return max(1, TILE_BYTES // max(1, g.row_block * g.cols * layout.dtype.itemsize))


def _tiled(
    x: Tensor, packed: PackedTensor, bias: Tensor | None, dtype: torch.dtype, scratch: RowScratch | None
) -> Tensor:
    layout = packed.layout
    step, blocks = _tile_blocks(layout), layout.geometry.row_blocks
    x_rows = x.reshape(-1, x.shape[-1])
    y = torch.empty(x_rows.shape[0], layout.shape[0], dtype=dtype)
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        rows = rows_of(layout, start, stop)
        tile = _tile(packed, start, stop, dtype, scratch)
        part = slice(rows.start, rows.stop)
        y[:, part] = F.linear(x_rows, tile, None if bias is None else bias[part])
    return y.view(*x.shape[:-1], layout.shape[0])


def _tile(
    packed: PackedTensor, start: int, stop: int, dtype: torch.dtype, scratch: RowScratch | None
) -> Tensor:
    if scratch is not None:
        return scratch.decode_rows(packed, start, stop, dtype)
    layout = packed.layout
    out = torch.empty(len(rows_of(layout, start, stop)), layout.geometry.cols, dtype=layout.dtype)
    return decode_rows(packed, start, stop, out).to(dtype)

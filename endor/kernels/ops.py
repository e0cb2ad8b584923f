"""Decoding as a torch operator, so that torch.compile and its relatives can trace through it.

Eager calls of `endor.kernels.decode` go straight to a backend; what is being traced comes here. The
operator is defined through `torch.library.Library`: a call costs 1.5 us, of one made by
`torch.library.custom_op` 11.5 us.
"""

from __future__ import annotations

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.registry import choose

__all__ = ["LIBRARY", "bitmap_decode_raw"]

LIBRARY = torch.library.Library("endor", "DEF")
"""Operators live as long as the library that defines them."""
LIBRARY.define(
    "bitmap_decode_raw(Tensor bitmap, Tensor row_offsets, Tensor values, Tensor(a!) out) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _packed(bitmap: Tensor, row_offsets: Tensor, values: Tensor, out: Tensor) -> PackedTensor:
    """The sections of the tensor that `out` is to become. Raises FormatError if they do not fit it."""
    layout = TensorLayout(tuple(out.shape), out.dtype, "bitmap", "raw", values.numel())
    return PackedTensor(layout, {"bitmap": bitmap, "row_offsets": row_offsets, "values": values})


def _decode_raw(bitmap: Tensor, row_offsets: Tensor, values: Tensor, out: Tensor) -> None:
    packed = _packed(bitmap, row_offsets, values, out)
    if not out.is_contiguous():
        raise KernelError(f"out must be contiguous, found strides {list(out.stride())}")
    choose(None, "raw", out.device).decode(packed, 0, packed.layout.geometry.row_blocks, out)


def _decode_raw_fake(bitmap: Tensor, row_offsets: Tensor, values: Tensor, out: Tensor) -> None:
    if not bitmap.device == row_offsets.device == values.device == out.device:
        raise KernelError("bitmap, row_offsets, values and out must be on one device")


LIBRARY.impl("bitmap_decode_raw", _decode_raw, "CompositeExplicitAutograd")
torch.library.register_fake("endor::bitmap_decode_raw", _decode_raw_fake, lib=LIBRARY)

bitmap_decode_raw = torch.ops.endor.bitmap_decode_raw.default
"""Decode a `bitmap`/`raw` tensor into the contiguous `out`, whose shape and dtype say what they hold."""

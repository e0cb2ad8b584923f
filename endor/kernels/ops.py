"""Decoding as a torch operator, so that torch.compile and its relatives can trace through it.

Eager calls of `endor.kernels.decode` go straight to a backend; what is being traced comes here. The
operator is defined through `torch.library.Library`: a call costs 1.5 us, of one made by
`torch.library.custom_op` 11.5 us.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.registry import choose

__all__ = ["LIBRARY", "decode_op", "decode_traced"]

LIBRARY = torch.library.Library("endor", "DEF")
"""Operators live as long as the library that defines them."""
LIBRARY.define(
    "decode(Tensor[] sections, Tensor(a!) out, *, str mask, str codec, int nnz, "
    "str[] param_names, int[] param_values) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _decode(
    sections: Sequence[Tensor],
    out: Tensor,
    *,
    mask: str,
    codec: str,
    nnz: int,
    param_names: Sequence[str],
    param_values: Sequence[int],
) -> None:
    params = dict(zip(param_names, param_values, strict=True))
    layout = TensorLayout(tuple(out.shape), out.dtype, mask, codec, nnz, params)
    names = (spec.name for spec in layout.sections)
    packed = PackedTensor(layout, dict(zip(names, sections, strict=True)))
    if not out.is_contiguous():
        raise KernelError(f"out must be contiguous, found strides {list(out.stride())}")
    choose(None, codec, out.device).decode(packed, 0, layout.geometry.row_blocks, out)


def _decode_fake(sections: Sequence[Tensor], out: Tensor, **_layout: object) -> None:
    if any(section.device != out.device for section in sections):
        raise KernelError(f"every section must be on the device of out, {out.device}")


LIBRARY.impl("decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("endor::decode", _decode_fake, lib=LIBRARY)

decode_op = torch.ops.endor.decode.default
"""Decode sections, in their layout's order, into the contiguous `out`, of the layout's shape and dtype."""


def decode_traced(packed: PackedTensor, out: Tensor) -> None:
    """`packed` into `out` through the operator."""
    layout = packed.layout
    sections = [packed.sections[spec.name] for spec in layout.sections]
    names, values = list(layout.params), [layout.params[name] for name in layout.params]
    decode_op(
        sections,
        out,
        mask=layout.mask,
        codec=layout.codec,
        nnz=layout.nnz,
        param_names=names,
        param_values=values,
    )

"""`auto`: the smallest of all the forms a weight may take, without trying those that cannot win.

The size of every form follows from its layout, except for codec `exponent`, where it depends on the values;
there a lower bound is known. So forms are encoded in the order of their bounds until no bound is left that is
below what was reached: for a pruned weight that is one encoding, by `exponent`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.codecs import CODECS, Params
from endor.formats.layout import Geometry
from endor.formats.packed import MASKS, PackedTensor, TensorLayout
from endor.kernels.backend import Backend
from endor.kernels.dispatch import encode
from endor.kernels.quantize import GROUP_COLUMNS
from endor.kernels.reference_bits import as_bits
from endor.kernels.registry import choose

__all__ = ["encode_smallest"]

_AUTO = "auto"


def encode_smallest(
    weight: Tensor, *, values: str = _AUTO, mask: str = _AUTO, backend: str | None = None
) -> PackedTensor:
    """Pack `weight` in the smallest form that the arguments allow.

    Args:
        weight: any rank and any strides; not changed, not kept.
        values: name of the values codec, or `auto` for every lossless one that the backend can run.
        mask: `bitmap`, `dense`, or `auto` for both.
        backend: one of `backends()`; the fastest one by default.

    Raises KernelError where mask, codec, dtype and backend do not go together.
    """
    if values != _AUTO and values not in CODECS:
        raise KernelError(f"unknown values codec {values!r}; use {_AUTO}, {', '.join(CODECS)}")
    source = weight.detach().resolve_neg().contiguous()
    runner = choose(backend, "raw" if values == _AUTO else values, source.device)
    best: PackedTensor | None = None
    for least_bytes, form, codec in sorted(_forms(source, values, mask, runner)):
        if best is None or least_bytes < best.layout.nbytes:
            packed = encode(source, values=codec, mask=form, backend=backend)
            if best is None or packed.layout.nbytes < best.layout.nbytes:
                best = packed
    if best is None:
        raise KernelError(f"cannot encode {weight.dtype} with values {values!r} and mask {mask!r}")
    return best


def _forms(weight: Tensor, values: str, mask: str, backend: Backend) -> Iterator[tuple[int, str, str]]:
    """Least bytes, mask and codec of the forms that come into question."""
    nnz = int(torch.count_nonzero(as_bits(weight)))
    masks = [form for form in MASKS if mask in {_AUTO, form}]
    if mask == _AUTO and nnz == weight.numel():
        masks = ["dense"]  # a bitmap of ones is nothing but overhead
    for codec in CODECS.values():
        wanted = codec.lossless and backend.supports(codec.name, weight.device) if values == _AUTO else True
        if wanted and values in {_AUTO, codec.name}:
            for form in masks:
                plain = (form, codec.name) == ("dense", "raw")
                if codec.supports(weight.dtype, form) and (weight.shape or plain):
                    yield _least_bytes(weight, form, codec.name, nnz), form, codec.name


def _least_bytes(weight: Tensor, mask: str, codec: str, nnz: int) -> int:
    """Bytes of a form with the params that make it as small as it can possibly be."""
    shape = tuple(weight.shape)
    kept = nnz if mask == "bitmap" else weight.numel()
    params: Params = {}
    if codec == "exponent":
        least = Geometry.of(shape).row_blocks + -(-kept // 8)
        params = {"pairs": 0, "singles": 1, "exponent_bytes": least}
    elif codec in {"int8", "int4"}:
        params = {"group_columns": GROUP_COLUMNS}
    return TensorLayout(shape, weight.dtype, mask, codec, kept, params).nbytes

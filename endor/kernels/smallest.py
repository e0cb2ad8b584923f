"""`auto`: the smallest of all the forms a weight may take, without trying those that cannot win.

The size of every form follows from its layout, except for codec `exponent`, where it depends on the values;
there a lower bound is known. So forms are encoded in the order of their bounds until no bound is left that is
below what was reached: for a pruned weight that is one encoding, by `exponent`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from endor.formats.codecs import CODECS, Params
from endor.formats.layout import Geometry
from endor.formats.packed import MASKS, TensorLayout
from endor.kernels.backend import Backend
from endor.kernels.quantize import GROUP_COLUMNS
from endor.kernels.reference_bits import as_bits

__all__ = ["AUTO", "forms"]

AUTO = "auto"


def forms(weight: Tensor, *, values: str, mask: str, backend: Backend) -> list[tuple[int, str, str]]:
    """The forms that come into question: least bytes, mask and codec, the smallest first.

    Args:
        weight: contiguous.
        values: name of a codec, or `auto` for every lossless one that `backend` can run.
        mask: name of a mask, or `auto` for both.
        backend: the one that will encode.
    """
    codecs = [values]
    if values == AUTO:
        codecs = [c.name for c in CODECS.values() if c.lossless and backend.supports(c.name, weight.device)]
    nnz = int(torch.count_nonzero(as_bits(weight)))
    masks = [mask] if mask != AUTO else list(MASKS)
    if mask == AUTO and nnz == weight.numel():
        masks = ["dense"]  # a bitmap of ones is nothing but overhead
    return sorted(
        (_least_bytes(weight, name, codec, nnz), name, codec)
        for codec in codecs
        for name in masks
        if CODECS[codec].supports(weight.dtype, name)
    )


def _least_bytes(weight: Tensor, mask: str, codec: str, nnz: int) -> int:
    shape = tuple(weight.shape)
    kept = nnz if mask == "bitmap" else weight.numel()
    params = _least_params(Geometry.of(shape), codec, kept)
    return TensorLayout(shape, weight.dtype, mask, codec, kept, params).nbytes


def _least_params(g: Geometry, codec: str, kept: int) -> Params:
    """The params that make the sections as small as they can possibly be."""
    if codec == "exponent":
        return {"pairs": 0, "singles": 1, "exponent_bytes": g.row_blocks + -(-kept // 8)}
    return {"group_columns": GROUP_COLUMNS} if codec in {"int8", "int4"} else {}

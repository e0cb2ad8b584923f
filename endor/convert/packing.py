"""One tensor through the converter's middle: pruned, packed in the smallest form, and decoded again to be
sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from endor.convert.modeltree import LinearWeight
from endor.convert.plan import Packed, TensorPlan
from endor.errors import ConvertError
from endor.formats.codecs import CODECS
from endor.formats.packed import MASKS, PackedTensor
from endor.formats.writer import plain
from endor.kernels import decode_rows
from endor.kernels.smallest import encode_smallest
from endor.pruning import CRITERIA, Criterion, Pattern, prune_

__all__ = ["pack", "pack_verified", "prune_linear_"]

_VERIFY_BYTES = 1 << 20
"""Dense bytes that are decoded and compared at a time; both fit in a second-level cache."""


def prune_linear_(
    weight: torch.Tensor,
    linear: LinearWeight,
    *,
    criterion: Criterion,
    pattern: Pattern,
    input_norms: torch.Tensor | None,
) -> None:
    """Prune a weight of any orientation in place; without norms that the criterion needs, by magnitude."""
    if criterion.needs_activations and input_norms is None:
        criterion = CRITERIA["magnitude"]
    if linear.input_dim == 0:
        turned = weight.t().contiguous()
        prune_(turned, criterion=criterion, pattern=pattern, input_norms=input_norms)
        weight.copy_(turned.t())
    else:
        prune_(weight, criterion=criterion, pattern=pattern, input_norms=input_norms)


def pack(tensor: TensorPlan, weight: torch.Tensor, values: str) -> Packed:
    """The tensor as it is written: packed if it was selected, losslessly coded if it is another Linear's,
    plain otherwise."""
    if tensor.linear is not None:
        return tensor, pack_verified(tensor.name, weight, values=values)
    if tensor.coded:
        return tensor, pack_verified(tensor.name, weight, values="auto", mask="dense")
    return tensor, plain(weight)


def pack_verified(name: str, weight: torch.Tensor, *, values: str, mask: str = "auto") -> PackedTensor:
    """The smallest packed form of `weight` that `values` and `mask` allow; plain where nothing is smaller.

    Args:
        name: for messages.
        weight: contiguous, on the CPU; kept by the result if plain.
        values: name of a codec, or `auto` for every lossless one.
        mask: `bitmap`, `dense`, or `auto` for both.

    Raises ConvertError if decoding does not give the bits of `weight` back.
    """
    best = plain(weight)
    if values == "auto" or any(CODECS[values].supports(weight.dtype, form) for form in MASKS):
        packed = encode_smallest(weight, values=values, mask=mask)
        if packed.layout.nbytes < best.layout.nbytes:
            best = packed
    if not best.layout.is_plain and CODECS[best.layout.codec].lossless:
        _verify(name, weight, best)
    return best


def _verify(name: str, weight: torch.Tensor, packed: PackedTensor) -> None:
    """Decode some rows at a time and compare their bits, so that both sides of the comparison are in
    cache."""
    g = packed.layout.geometry
    rows = weight.view(g.rows, g.cols)
    row_bytes = max(1, g.cols * weight.element_size())
    blocks = max(1, _VERIFY_BYTES // (row_bytes * g.row_block))
    scratch = torch.empty(min(blocks * g.row_block, g.rows), g.cols, dtype=weight.dtype)
    for start in range(0, g.row_blocks, blocks):
        stop = min(start + blocks, g.row_blocks)
        expected = rows[start * g.row_block : stop * g.row_block]
        found = decode_rows(packed, start, stop, scratch[: expected.shape[0]])
        if not np.array_equal(_words(found), _words(expected)):
            raise ConvertError(
                f"{name}: rows {start * g.row_block} and following do not come out of the packed weight "
                f"(codec {packed.layout.codec}) as they went in. Nothing was written for it; this is a "
                "defect of Endor or of this machine's memory"
            )


def _words(tensor: torch.Tensor) -> NDArray[Any]:
    """The bytes of a contiguous tensor, in wide integers where they fit: those compare 6x faster."""
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw.view(np.uint64) if raw.nbytes % 8 == 0 else raw

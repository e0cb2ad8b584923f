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
from endor.kernels import decode, encode
from endor.pruning import CRITERIA, Criterion, Pattern, prune_

__all__ = ["pack", "pack_verified", "prune_linear_"]

PLAIN = ("dense", "raw")
"""Mask and codec of a tensor that is stored as it is."""


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
    """The tensor as it is written: packed if it was selected, plain otherwise."""
    form = pack_verified(tensor.name, weight, values=values) if tensor.linear is not None else plain(weight)
    return tensor, form


def pack_verified(name: str, weight: torch.Tensor, *, values: str) -> PackedTensor:
    """The smallest packed form of `weight` that `values` allows; plain where nothing is smaller.

    Args:
        name: for messages.
        weight: contiguous, on the CPU; kept by the result if plain.
        values: name of a codec, or `auto` for every lossless one.

    Raises ConvertError if decoding does not give the bits of `weight` back.
    """
    best = plain(weight)
    for codec in CODECS.values():
        wanted = codec.name == values or (values == "auto" and codec.lossless)
        for mask in MASKS if wanted else ():
            if codec.supports(weight.dtype, mask) and (mask, codec.name) != PLAIN:
                packed = encode(weight, values=codec.name, mask=mask)
                if packed.layout.nbytes < best.layout.nbytes:
                    best = packed
    if not best.layout.is_plain and CODECS[best.layout.codec].lossless:
        _verify(name, weight, best)
    return best


def _verify(name: str, weight: torch.Tensor, packed: PackedTensor) -> None:
    expected, found = _words(weight), _words(decode(packed))
    if not np.array_equal(found, expected):
        wrong = int(np.count_nonzero(found.view(np.uint8) != expected.view(np.uint8)))
        raise ConvertError(
            f"{name}: decoding the packed weight gives {wrong} other bytes than were encoded (codec "
            f"{packed.layout.codec}). Nothing was written for it; this is a defect of Endor or of this "
            "machine's memory"
        )


def _words(tensor: torch.Tensor) -> NDArray[Any]:
    """The bytes of a contiguous tensor in the widest integers that fit: comparing those is 6x faster than
    bytes."""
    raw = tensor.view(-1).view(torch.uint8).numpy()
    return raw.view(np.uint64) if raw.nbytes % 8 == 0 else raw

"""One tensor through the converter's middle: pruned, packed in the smallest form, and decoded again to be sure."""

from __future__ import annotations

import torch

from endor.convert.modeltree import LinearWeight
from endor.errors import ConvertError
from endor.formats.codecs import CODECS
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout
from endor.kernels import decode, encode
from endor.pruning import CRITERIA, Criterion, Pattern, prune_

__all__ = ["pack_verified", "prune_linear_"]


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


def pack_verified(name: str, weight: torch.Tensor, *, values: str) -> PackedTensor:
    """The smallest packed form of `weight` that `values` allows; plain where nothing is smaller.

    Args:
        name: for messages.
        weight: contiguous, on the CPU; kept by the result if plain.
        values: name of a codec, or `auto` for every lossless one.

    Raises ConvertError if decoding does not give the bits of `weight` back.
    """
    layout = TensorLayout(tuple(weight.shape), weight.dtype, "dense", "raw", weight.numel())
    best = PackedTensor(layout, {DENSE_SECTION: weight})
    for codec in CODECS.values():
        wanted = codec.name == values or (values == "auto" and codec.lossless)
        if wanted and codec.supports(weight.dtype, "bitmap"):
            packed = encode(weight, values=codec.name, mask="bitmap")
            if packed.layout.nbytes < best.layout.nbytes:
                best = packed
    if not best.layout.is_plain and CODECS[best.layout.codec].lossless:
        _verify(name, weight, best)
    return best


def _verify(name: str, weight: torch.Tensor, packed: PackedTensor) -> None:
    decoded = decode(packed)
    if not torch.equal(decoded.view(torch.uint8), weight.view(torch.uint8)):
        wrong = int((decoded.view(torch.uint8) != weight.view(torch.uint8)).sum())
        raise ConvertError(
            f"{name}: decoding the packed weight gives {wrong} other bytes than were encoded (codec "
            f"{packed.layout.codec}). Nothing was written for it; this is a defect of Endor or of this machine's memory"
        )

"""What the codecs of the reference backend share: which elements are kept, and fields of a few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from endor.formats.layout import WORD_BITS, Geometry

__all__ = ["KeptRows", "as_bits", "pack_bitmap", "pack_bits", "unpack_bitmap", "unpack_bits"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class KeptRows:
    """Some consecutive row blocks.

    Attributes:
        geometry: of these rows alone.
        keep: bool [rows, cols], the elements that are kept.
        starts: int64 [row_blocks + 1], values before each row block, counted from the start of the tensor.
    """

    geometry: Geometry
    keep: Tensor
    starts: Tensor

    def values_of(self, matrix: Tensor) -> Tensor:
        """The kept values of `matrix` as integers, one after the other."""
        return as_bits(matrix)[self.keep]


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory seen as integers of the same width."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def pack_bitmap(keep: Tensor) -> Tensor:
    """bool [rows, cols] -> uint8 [rows, words_per_row * 8]; bit i of byte j is column 8j + i."""
    rows, cols = keep.shape
    words_per_row = -(-cols // WORD_BITS)
    padded = torch.zeros(rows, words_per_row * WORD_BITS, dtype=torch.uint8, device=keep.device)
    padded[:, :cols] = keep
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.view(rows, words_per_row * 8, 8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_bitmap(bitmap: Tensor) -> Tensor:
    """uint8 [rows, n] -> bool [rows, 8n]; the inverse of `pack_bitmap`, padding bits included."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap.unsqueeze(2) >> shifts) & 1).flatten(1).bool()


def pack_bits(fields: Tensor, width: int) -> Tensor:
    """Integers [n] of `width` bits -> uint8 [ceil(n * width / 8)]; field i starts at bit i * width."""
    shifts = torch.arange(width, device=fields.device)
    bits = (fields.unsqueeze(1) >> shifts & 1).flatten() if width > 1 else fields
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=fields.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, first: int, last: int, width: int) -> Tensor:
    """Fields [first, last) of what `pack_bits` made, as int32."""
    begin = first * width // 8
    bits = unpack_bitmap(packed[begin : -(-last * width // 8)].unsqueeze(0))[0]
    skipped = first * width - begin * 8
    fields = bits[skipped : skipped + (last - first) * width].view(last - first, width)
    return (fields.to(torch.int32) << torch.arange(width, device=packed.device)).sum(dim=1, dtype=torch.int32)

"""Memory as the extension needs it: elements that start where elements start."""

from __future__ import annotations

from torch import Tensor

from endor.formats.packed import PackedTensor

__all__ = ["aligned", "size_log2", "with_aligned_sections"]


def size_log2(tensor: Tensor) -> int:
    """Logarithm of the bytes of an element."""
    return tensor.dtype.itemsize.bit_length() - 1


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it starts in the middle of an element (a view of foreign memory can)."""
    return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor


def with_aligned_sections(packed: PackedTensor) -> PackedTensor:
    """`packed`, or a copy of it where a section is not `aligned`."""
    if all(s.data_ptr() % s.dtype.itemsize == 0 for s in packed.sections.values()):
        return packed
    return PackedTensor(packed.layout, {name: aligned(s) for name, s in packed.sections.items()})

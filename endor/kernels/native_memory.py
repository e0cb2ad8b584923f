"""Memory as the extension needs it: elements that start where elements start."""

from __future__ import annotations

from torch import Tensor

__all__ = ["aligned", "size_log2"]


def size_log2(tensor: Tensor) -> int:
    """Logarithm of the bytes of an element."""
    return tensor.dtype.itemsize.bit_length() - 1


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it starts in the middle of an element (a view of foreign memory can)."""
    return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor

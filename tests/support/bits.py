"""Comparing tensors by their bits: NaN equals the same NaN, 0.0 does not equal -0.0."""

from __future__ import annotations

import torch

__all__ = ["INTEGERS", "as_integers", "assert_bitwise_equal", "hex_bits"]

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy or view of `tensor` as integers of the same width."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize])


def hex_bits(tensor: torch.Tensor) -> str:
    """The bits of a tensor of one element."""
    itemsize = tensor.dtype.itemsize
    return f"0x{int(as_integers(tensor)) & ((1 << 8 * itemsize) - 1):0{2 * itemsize}x}"


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails with the first coordinate that differs and the bits on both sides."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wrong = (as_integers(actual) != as_integers(expected)).nonzero()
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {expected.numel()} elements differ, the first at {list(at)}: "
            f"{hex_bits(actual[at])}, expected {hex_bits(expected[at])}"
        )

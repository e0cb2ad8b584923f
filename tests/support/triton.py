"""Where the Triton kernels run in this process: on a GPU, or interpreted under TRITON_INTERPRET=1.

Triton decides when it is imported, and the interpreter must not reach other tests (torch.compile uses Triton
too). So test_triton_interpreted.py starts a process for each of the other test_triton_*.py; without that
variable they need a GPU and are marked `gpu`.
"""

from __future__ import annotations

import pytest
import torch

from endor.formats.packed import PackedTensor
from endor.kernels.triton_mode import is_interpreted
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import poisoned

__all__ = ["DEVICE", "MARKS", "assert_decodes", "on_device", "sparse_normal"]

DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
MARKS = [] if is_interpreted() else [pytest.mark.gpu]


def on_device(packed: PackedTensor) -> PackedTensor:
    """`packed` where kernels can reach it."""
    return packed.to(DEVICE)


def sparse_normal(
    shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, *, density: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """Normally distributed, as real weights are (few exponents are common), and zero elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    return torch.where(keep, torch.randn(shape, generator=generator) * 0.02, 0.0).to(dtype)


def assert_decodes(packed: PackedTensor, expected: torch.Tensor) -> None:
    """`packed` decodes to exactly `expected`, and nothing around the output is touched."""
    from endor.kernels import decode

    out = poisoned(tuple(expected.shape), expected.dtype, device=DEVICE)
    decode(on_device(packed), out=out.tensor, backend="triton")
    assert_bitwise_equal(out.tensor.cpu(), expected)
    out.assert_guards_intact()

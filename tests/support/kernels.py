"""Tensors that kernels find hard, and memory that shows what a kernel should not have touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from endor.formats.dtypes import PACKABLE
from endor.formats.packed import PackedTensor, TensorLayout
from tests.support.bits import INTEGERS

__all__ = ["POISON", "Case", "cases", "poisoned", "random_bits", "replace_section", "special_values"]

POISON = 0xA5
_BITS = {torch.float8_e4m3fn: 8, torch.bfloat16: 16, torch.float16: 16, torch.float32: 32}
_EXPONENT_BITS = {torch.float8_e4m3fn: 4, torch.bfloat16: 8, torch.float16: 5, torch.float32: 8}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int = 0) -> torch.Tensor:
    """Elements of any bit pattern at all, NaN payloads included; all-zero with probability 1 - density."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    raw[torch.rand(shape, generator=generator) >= density] = 0
    return raw.view(dtype).reshape(shape)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """-0.0, both ends of the subnormals, infinities, quiet and signalling NaNs with payloads, and +0.0."""
    bits, exponent = _BITS[dtype], _EXPONENT_BITS[dtype]
    mantissa = bits - 1 - exponent
    sign, infinity = 1 << (bits - 1), ((1 << exponent) - 1) << mantissa
    patterns = [0, sign, 1, sign | 1, (1 << mantissa) - 1, infinity, sign | infinity]
    patterns += [infinity | 1, sign | infinity | 1, infinity | (1 << mantissa) - 1, sign | (sign - 1)]
    wrapped = [p - (1 << bits) if p >> (bits - 1) and bits > 8 else p for p in patterns]
    return torch.tensor(wrapped, dtype=INTEGERS[dtype.itemsize]).view(dtype)


@dataclass(frozen=True)
class Case:
    """One tensor to round-trip, small enough to print."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    density: float
    seed: int

    def tensor(self) -> torch.Tensor:
        return random_bits(self.shape, self.dtype, self.density, self.seed)


def cases() -> st.SearchStrategy[Case]:
    """Ranks 1 to 3; widths around word and vector sizes, zero included; every dtype; empty to full."""
    size = st.one_of(st.integers(0, 9), st.sampled_from((63, 64, 65, 127, 128, 129, 192, 1000)))
    rows = st.lists(st.integers(0, 20), max_size=2)
    return st.builds(
        lambda outer, cols, dtype, density, seed: Case((*outer, cols), dtype, density, seed),
        rows,
        size,
        st.sampled_from(PACKABLE),
        st.sampled_from((0.0, 0.02, 0.5, 0.97, 1.0)),
        st.integers(0, 2**32 - 1),
    )


class poisoned:  # noqa: N801 - used like a function
    """A contiguous tensor full of POISON between two guards that nobody may write to."""

    GUARD_BYTES = 256

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        shift_bytes: int = 0,
        device: torch.device | None = None,
    ) -> None:
        numel = torch.Size(shape).numel()
        self._start = self.GUARD_BYTES + shift_bytes
        self._stop = self._start + numel * dtype.itemsize
        size = self._stop + self.GUARD_BYTES
        self._memory = torch.full((size,), POISON, dtype=torch.uint8, device=device)
        self.tensor = self._memory[self._start : self._stop].view(dtype).view(shape)

    def assert_guards_intact(self) -> None:
        assert (self._memory[: self._start] == POISON).all(), "wrote before the output"
        assert (self._memory[self._stop :] == POISON).all(), "wrote behind the output"


def replace_section(
    packed: PackedTensor, changes: Mapping[str, torch.Tensor], *, nnz: int | None = None
) -> PackedTensor:
    """`packed` with other sections and perhaps another nnz: sizes are checked again, contents are not."""
    layout = packed.layout
    if nnz is not None:
        layout = TensorLayout(layout.shape, layout.dtype, layout.mask, layout.codec, nnz, layout.params)
    return PackedTensor(layout, {**packed.sections, **changes})

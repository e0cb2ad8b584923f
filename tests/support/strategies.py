"""Hypothesis strategies that several packages' tests share: tensors whose bits are arbitrary."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch

from endor.formats.dtypes import PACKABLE

__all__ = ["densities", "packable_dtypes", "packable_shapes", "prunable_tensors"]

packable_dtypes = st.sampled_from(PACKABLE)
"""The dtypes that a bitmap can be applied to."""

densities = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
"""Share of elements that are not zero; none and all are ordinary cases."""

_SIZES = st.sampled_from([1, 2, 3, 7, 8, 31, 63, 64, 65, 127, 128, 130, 200])
"""Around the widths at which bytes, words and registers end."""


@st.composite
def packable_shapes(draw: st.DrawFn, *, max_elements: int = 40_000) -> tuple[int, ...]:
    """Shapes of rank 1 to 4 with ragged sizes and at least one element."""
    shape = draw(st.lists(_SIZES, min_size=1, max_size=4))
    while math.prod(shape) > max_elements:
        shape.remove(max(shape))
    return tuple(shape)


@st.composite
def prunable_tensors(draw: st.DrawFn, *, max_elements: int = 40_000) -> torch.Tensor:
    """A tensor of arbitrary bits (NaN payloads, -0.0, subnormals) of which some are zeroed."""
    shape, dtype = draw(packable_shapes(max_elements=max_elements)), draw(packable_dtypes)
    density, seed = draw(densities), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    words = raw.view(math.prod(shape), dtype.itemsize)
    words[torch.rand(len(words), generator=generator) >= density] = 0
    return raw.view(dtype).view(shape)

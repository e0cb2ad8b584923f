"""Scales and codebooks for `int8` and `int4`: what loses least, chosen by trying.

Every backend takes scales and codebook from here and codes from the two exact rules below, so all of them
write the same bytes:

- int8: the value divided by the scale in float32, rounded to the nearest integer (ties to even), at most 127;
- int4: the magnitude divided by the scale in float32, then the entry of the codebook that is nearest to it
  (ties to the smaller one).

Scales are bfloat16 because a scale needs range, not precision: codes are chosen after it has been rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.codecs.quantized import CODEBOOK_SIZE

__all__ = ["GROUP_COLUMNS", "fit_codebook", "fit_scales_int4", "fit_scales_int8", "int4_codes", "int8_codes"]

GROUP_COLUMNS = 128
"""Columns that share a scale: 16 / 128 = 0.125 b/w."""
_TOP = 127
_INT8_FACTORS = tuple(1 - i / 128 for i in range(8))
_INT4_FACTORS = tuple(0.60 + 0.04 * i for i in range(12))
"""Scales that are tried, as shares of the one that just reaches the largest value of a group."""
_SMALLEST_SCALE = 2.0**-126
_CHUNK_ELEMENTS = 1 << 20
_SAMPLE_ELEMENTS = 1 << 18
_CODEBOOK_ROUNDS = 6

_Round = Callable[[Tensor], Tensor]
"""Magnitudes divided by their scale -> the integers that stand for them."""


def fit_scales_int8(matrix: Tensor) -> Tensor:
    """bfloat16 [rows, groups]; 0 for a group of zeros.

    Raises KernelError for a `matrix` that is not finite everywhere.
    """
    return _fit_scales(matrix, _INT8_FACTORS, _round_int8)


def fit_scales_int4(matrix: Tensor, codebook: Tensor) -> Tensor:
    """As `fit_scales_int8`, for a codebook."""
    return _fit_scales(matrix, _INT4_FACTORS, _round_to(codebook))


def fit_codebook(matrix: Tensor) -> Tensor:
    """int8 [16]: eight magnitudes that fit the non-zero values of `matrix`, and the same ones negated.

    Lloyd's algorithm on a sample of rows: scales and nearest entries for a codebook, then the codebook that
    is best for them, and again.
    """
    sample = _sample(matrix)
    _refuse_unless_finite(sample)
    if not sample.any():
        return _codebook(torch.arange(1, 9, device=matrix.device))
    codebook = _first_codebook(_groups(sample).abs())
    for _ in range(_CODEBOOK_ROUNDS):
        scales = fit_scales_int4(sample, codebook).float()
        groups = _groups(sample)
        values = groups != 0
        widths = scales.unsqueeze(2).expand_as(groups)[values]
        ratios = groups[values].abs() / widths
        weights = (widths / scales.max()).square()
        nearest = _nearest(ratios, codebook)
        zero = torch.zeros(CODEBOOK_SIZE // 2, device=matrix.device)
        total = zero.index_add(0, nearest, weights)
        sums = zero.index_add(0, nearest, weights * ratios)
        old = codebook[: CODEBOOK_SIZE // 2].float()
        codebook = _codebook(torch.where(total > 0, sums / total, old))
    return codebook


def int8_codes(matrix: Tensor, scales: Tensor) -> Tensor:
    """int8, as `matrix` [rows, cols]."""
    ratios = matrix.float() / _per_column(scales, matrix)
    return ratios.round().clamp(-_TOP, _TOP).to(torch.int8)


def int4_codes(matrix: Tensor, scales: Tensor, codebook: Tensor) -> Tensor:
    """uint8 below 16, as `matrix` [rows, cols]."""
    ratios = matrix.float().abs() / _per_column(scales, matrix)
    negative = torch.signbit(matrix).to(torch.uint8) * (CODEBOOK_SIZE // 2)
    return _nearest(ratios, codebook).to(torch.uint8) + negative


def _per_column(scales: Tensor, matrix: Tensor) -> Tensor:
    """float32 as `matrix`, the scale of each element; no zeros, since only zeros have a scale of zero."""
    wide = scales.float().clamp(min=_SMALLEST_SCALE).repeat_interleave(GROUP_COLUMNS, dim=1)
    return wide[:, : matrix.shape[1]]


def _fit_scales(matrix: Tensor, factors: tuple[float, ...], rounded: _Round) -> Tensor:
    parts = [_fit_rows(rows, factors, rounded) for rows in _chunks(matrix)]
    return torch.cat(parts) if parts else matrix.new_empty(matrix.shape[0], 0, dtype=torch.bfloat16)


def _fit_rows(rows: Tensor, factors: tuple[float, ...], rounded: _Round) -> Tensor:
    magnitudes = _groups(rows).abs()
    largest = magnitudes.amax(2, keepdim=True)
    _refuse_unless_finite(largest)
    values = magnitudes > 0  # zeros are not stored: what a codebook would make of them does not matter
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    highest = _highest_scale(rows.dtype)
    for factor in factors:
        scale = (largest / _TOP * factor).bfloat16().float().clamp(_SMALLEST_SCALE, highest)
        ratios = magnitudes / scale
        # In shares of the largest value, so that squares neither overflow nor vanish.
        error = rounded(ratios).sub_(ratios).mul_(values).square_().sum(2, keepdim=True)
        error *= (scale / largest).square()
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(best, error)
    return torch.where(largest > 0, scales, 0).squeeze(2).bfloat16()


def _refuse_unless_finite(numbers: Tensor) -> None:
    if not torch.isfinite(numbers).all():
        raise KernelError("int8 and int4 cannot hold NaN or infinity; use values 'exponent' or 'raw'")


def _highest_scale(dtype: torch.dtype) -> float:
    """The largest bfloat16 whose products with a code are finite in `dtype`."""
    exact = torch.tensor(torch.finfo(dtype).max / (_TOP + 1))
    return float((exact.view(torch.int32) & -0x10000).view(torch.float32))


def _round_int8(ratios: Tensor) -> Tensor:
    return ratios.round().clamp_(max=_TOP)


def _round_to(codebook: Tensor) -> _Round:
    entries = codebook[: CODEBOOK_SIZE // 2].float().take(_nearest_table(codebook))
    return lambda ratios: entries.take(_half_steps(ratios))


def _nearest(ratios: Tensor, codebook: Tensor) -> Tensor:
    """int64, index of the magnitude nearest to each ratio."""
    return _nearest_table(codebook).take(_half_steps(ratios))


def _nearest_table(codebook: Tensor) -> Tensor:
    """int64 [255], the nearest index for all ratios of a half step: how many midpoints lie below them.

    Twice a midpoint is an integer, so the ceiling of twice the ratio is all there is to know.
    """
    magnitudes = codebook[: CODEBOOK_SIZE // 2].to(torch.int64)
    midpoints = magnitudes[1:] + magnitudes[:-1]
    return (midpoints < torch.arange(2 * _TOP + 1, device=codebook.device).unsqueeze(1)).sum(1)


def _half_steps(ratios: Tensor) -> Tensor:
    return (ratios * 2).ceil_().clamp_(max=2 * _TOP).to(torch.int64)


def _codebook(magnitudes: Tensor) -> Tensor:
    """int8 [16] from eight magnitudes: scaled so that the last is 127, rounded, strictly increasing."""
    wanted = (magnitudes.sort().values * (_TOP / magnitudes.max())).round().to(torch.int64).tolist()
    for i in range(1, len(wanted)):
        wanted[i] = max(wanted[i], wanted[i - 1] + 1)
    for i in range(len(wanted)):
        wanted[i] = min(wanted[i], _TOP + 1 - len(wanted) + i)
    return torch.tensor([*wanted, *(-m for m in wanted)], dtype=torch.int8, device=magnitudes.device)


def _first_codebook(magnitudes: Tensor) -> Tensor:
    """Entries that are used equally often."""
    ratios = (magnitudes / magnitudes.amax(2, keepdim=True))[magnitudes > 0]
    size = CODEBOOK_SIZE // 2
    positions = torch.arange(1, 2 * size, 2, device=ratios.device) * len(ratios) // (2 * size)
    return _codebook(ratios.sort().values[positions])


def _sample(matrix: Tensor) -> Tensor:
    """Rows at equal distances, enough for a codebook."""
    step = max(1, matrix.numel() // _SAMPLE_ELEMENTS)
    return matrix[::step]


def _groups(rows: Tensor) -> Tensor:
    """float32 [rows, groups, GROUP_COLUMNS], zeros behind the last column."""
    wide = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % GROUP_COLUMNS))
    return wide.view(rows.shape[0], wide.shape[1] // GROUP_COLUMNS, GROUP_COLUMNS)


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    yield from matrix.split(step)

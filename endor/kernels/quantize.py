"""Scales and codebooks for `int8` and `int4`: what loses least, chosen by trying.

Every backend writes the same bytes, because nothing here depends on an order of additions. Codes follow from
scales by two exact rules:

- int8: the value divided by the scale in float32, rounded to the nearest integer (ties to even), at most 127;
- int4: the magnitude divided by the scale in float32, then the entry of the codebook that is nearest to it
  (ties to the smaller one).

The search for scales measures what a scale would lose in whole fractions of it: magnitudes become integers
(1/128 of a scale for int8, 1/32 for int4), and so do their distances from what they would be rounded to. The
squares of 128 of them add up to less than 2^31, so any machine may add them in any order, 16 bits at a time.
The codebook is fitted on the same integers, weighted by integers.

Scales are bfloat16 because a scale needs range, not precision: codes are chosen after it has been rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.codecs.quantized import CODEBOOK_SIZE

__all__ = [
    "GROUP_COLUMNS",
    "INT4_FACTORS",
    "INT8_FACTORS",
    "fit_codebook",
    "fit_scales_int4",
    "fit_scales_int8",
    "highest_scale",
    "int4_codes",
    "int8_codes",
    "not_finite",
]

GROUP_COLUMNS = 128
"""Columns that share a scale: 16 / 128 = 0.125 b/w."""
INT8_FACTORS = tuple(1 - i / 192 for i in range(12))
INT4_FACTORS = tuple(0.60 + 0.04 * i for i in range(12))
"""Scales that are tried, as shares of the one that just reaches the largest value of a group."""
_TOP = 127
_INT8_STEPS = 128
_INT4_STEPS = 32
"""Steps per scale in which the search measures; 1/32 is small against distances of entries."""
_SMALLEST_SCALE = 2.0**-126
_CHUNK_ELEMENTS = 1 << 20
_SAMPLE_ELEMENTS = 1 << 18
_CODEBOOK_ROUNDS = 10
_WEIGHT_ONE = 1 << 28
"""Times a sample's 2^20 elements of at most 2^13 steps: sums stay below 2^63."""

_Rounding = Callable[[Tensor], Tensor]
"""Magnitudes in steps -> what would be decoded, in steps; both integers in float32."""
ScaleSearch = Callable[[Tensor, Tensor], Tensor]
"""Matrix and codebook -> scales, as `fit_scales_int4`."""


def fit_scales_int8(matrix: Tensor) -> Tensor:
    """bfloat16 [rows, groups]; 0 for a group of zeros.

    Raises KernelError for a `matrix` that is not finite everywhere.
    """

    def rounded(ticks: Tensor) -> Tensor:
        # Halfway goes up here: a rule for integers, good enough to measure with.
        return torch.floor((ticks + _INT8_STEPS // 2) / _INT8_STEPS).clamp_(max=_TOP).mul_(_INT8_STEPS)

    return _fit_scales(matrix, INT8_FACTORS, _INT8_STEPS, rounded)


def fit_scales_int4(matrix: Tensor, codebook: Tensor) -> Tensor:
    """As `fit_scales_int8`, for a codebook."""
    entries = codebook[: CODEBOOK_SIZE // 2].float().take(_nearest_table(codebook)) * _INT4_STEPS
    return _fit_scales(matrix, INT4_FACTORS, _INT4_STEPS, lambda ticks: entries.take(_half_steps_of(ticks)))


def fit_codebook(matrix: Tensor, search: ScaleSearch = fit_scales_int4) -> Tensor:
    """int8 [16]: eight magnitudes that fit the non-zero values of `matrix`, and the same ones negated.

    Lloyd's algorithm on a sample of rows: scales and nearest entries for a codebook, then the codebook that
    is best for them, and again.
    """
    sample = _sample(matrix)
    groups = _Groups.of(sample)
    if not groups.largest.any():
        return _codebook(torch.arange(1, 9, device=matrix.device))
    codebook = _first_codebook(groups)
    for _ in range(_CODEBOOK_ROUNDS):
        scales = search(sample, codebook).float().unsqueeze(2)
        ticks = groups.ticks(scales, _INT4_STEPS)
        nearest = _nearest_table(codebook).take(_half_steps_of(ticks))
        nearest[ticks == 0] = CODEBOOK_SIZE // 2  # an entry of their own, which is then forgotten
        shares = (scales / scales.max()).square()
        weights = (shares * _WEIGHT_ONE).round().to(torch.int64).expand_as(nearest)
        total, sums = (
            torch.zeros(CODEBOOK_SIZE // 2 + 1, dtype=torch.int64, device=matrix.device)
            .index_add(0, nearest.reshape(-1), terms.reshape(-1))[:-1]
            .double()
            for terms in (weights, weights * ticks.to(torch.int64))
        )
        old = codebook[: CODEBOOK_SIZE // 2].double() * _INT4_STEPS
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


def _fit_scales(matrix: Tensor, factors: tuple[float, ...], steps: int, rounded: _Rounding) -> Tensor:
    highest = highest_scale(matrix.dtype)
    parts = [_fit_groups(_Groups.of(rows), factors, steps, rounded, highest) for rows in _chunks(matrix)]
    return torch.cat(parts) if parts else matrix.new_empty(matrix.shape[0], 0, dtype=torch.bfloat16)


def _fit_groups(
    groups: _Groups, factors: tuple[float, ...], steps: int, rounded: _Rounding, highest: float
) -> Tensor:
    largest = groups.largest
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    for factor in factors:
        scale = (largest / _TOP * factor).bfloat16().float().clamp(_SMALLEST_SCALE, highest)
        ticks = groups.ticks(scale, steps)
        # What is less than half a step counts as a zero, and zeros are not stored. Sums are exact.
        distance = rounded(ticks).sub_(ticks).mul_(ticks > 0)
        error = distance.square_().sum(2, keepdim=True, dtype=torch.float64).float()
        # In shares of the largest value, so that squares neither overflow nor vanish.
        error *= (scale / largest).square()
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(best, error)
    return torch.where(largest > 0, scales, 0).squeeze(2).bfloat16()


@dataclass(frozen=True)
class _Groups:
    """The magnitudes of a matrix, group by group.

    Attributes:
        shares: float32 [rows, groups, GROUP_COLUMNS], of the largest; zeros behind the last column.
        largest: float32 [rows, groups, 1].
    """

    shares: Tensor
    largest: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Groups:
        """Raises KernelError for `rows` that are not finite everywhere."""
        wide = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % GROUP_COLUMNS)).abs_()
        magnitudes = wide.view(rows.shape[0], wide.shape[1] // GROUP_COLUMNS, GROUP_COLUMNS)
        largest = magnitudes.amax(2, keepdim=True)
        if not torch.isfinite(largest).all():
            raise not_finite()
        return cls(magnitudes / torch.where(largest > 0, largest, 1), largest)

    def ticks(self, scales: Tensor, steps: int) -> Tensor:
        """Magnitudes in steps of a fraction of `scales` [rows, groups, 1]: integers, in float32."""
        reach = torch.where(scales > 0, self.largest / scales, 0)
        return (self.shares * (reach * steps)).round_()


def not_finite() -> KernelError:
    """What every backend raises for a weight that these codecs cannot hold."""
    return KernelError("int8 and int4 cannot hold NaN or infinity; use values 'exponent' or 'raw'")


def highest_scale(dtype: torch.dtype) -> float:
    """The largest bfloat16 whose products with a code are finite in `dtype`."""
    exact = torch.tensor(torch.finfo(dtype).max / (_TOP + 1))
    return float((exact.view(torch.int32) & -0x10000).view(torch.float32))


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


def _half_steps_of(ticks: Tensor) -> Tensor:
    return _half_steps(ticks / _INT4_STEPS)


def _codebook(magnitudes: Tensor) -> Tensor:
    """int8 [16] from eight magnitudes: scaled so that the last is 127, rounded, strictly increasing."""
    wanted = (magnitudes.sort().values * (_TOP / magnitudes.max())).round().to(torch.int64).tolist()
    for i in range(1, len(wanted)):
        wanted[i] = max(wanted[i], wanted[i - 1] + 1)
    for i in range(len(wanted)):
        wanted[i] = min(wanted[i], _TOP + 1 - len(wanted) + i)
    return torch.tensor([*wanted, *(-m for m in wanted)], dtype=torch.int8, device=magnitudes.device)


def _first_codebook(groups: _Groups) -> Tensor:
    """Entries that are used equally often."""
    size = CODEBOOK_SIZE // 2
    ticks = (groups.shares * (_TOP * _INT4_STEPS)).round_().to(torch.int64).reshape(-1)
    counts = ticks.bincount()
    counts[0] = 0
    upto = counts.cumsum(0)
    positions = torch.arange(1, 2 * size, 2, device=ticks.device) * upto[-1] // (2 * size)
    return _codebook(torch.searchsorted(upto, positions, right=True).double())


def _sample(matrix: Tensor) -> Tensor:
    """Rows at equal distances, enough for a codebook."""
    step = max(1, matrix.numel() // _SAMPLE_ELEMENTS)
    return matrix[::step, :_SAMPLE_ELEMENTS].contiguous()


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    yield from matrix.split(step)

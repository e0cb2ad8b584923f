"""Which levels codec `exponent` gets for a tensor: sizes follow exactly from a histogram per row block.

Every encoder asks here, so that all of them write the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from endor.formats.codecs.exponent import LOW_BITS, MAX_PAIRS, MAX_SINGLES, SLACK_BYTES, Levels
from endor.formats.layout import Geometry

__all__ = ["choose_levels", "other_bytes", "record_bytes", "tables_of"]

_TOLERANCE = 64
"""One level fewer, which decodes 1 to 3 % faster, may cost up to 1 / 64 of the entry. What is written
is golden, so this stays (docs/design/exponent-codec.md)."""


def choose_levels(histograms: Tensor, others: int) -> Levels:
    """The fewest levels that come within 1 / 64 of the smallest entry, of several the smallest.

    Args:
        histograms: int64 [records, 256], how often each exponent occurs.
        others: see `other_bytes`.
    """
    left = _left_over(histograms)
    choices = [Levels(p, s) for p in range(MAX_PAIRS + 1) for s in range(MAX_SINGLES + 1) if p + s]
    sizes = {levels: others + int(_sizes(left, levels).sum()) for levels in choices}
    limit = min(sizes.values()) * (_TOLERANCE + 1)
    return min(
        (levels for levels in choices if sizes[levels] * _TOLERANCE <= limit),
        key=lambda levels: (levels.pairs + levels.singles, sizes[levels], levels.pairs),
    )


def record_bytes(histograms: Tensor, levels: Levels) -> Tensor:
    """int64 [records], the bytes of each record."""
    return _sizes(_left_over(histograms), levels)


def tables_of(histograms: Tensor) -> Tensor:
    """int64 [records, 256], all exponents, the commonest first and of equally common ones the smaller."""
    return histograms.sort(dim=1, descending=True, stable=True).indices


def _left_over(histograms: Tensor) -> Tensor:
    """int64 [records, 257], how many values have none of the i commonest exponents."""
    ordered = histograms.sort(dim=1, descending=True, stable=True).values
    total = ordered.sum(dim=1, keepdim=True)
    return torch.cat([total, total - ordered.cumsum(1)], dim=1)


def _sizes(left: Tensor, levels: Levels) -> Tensor:
    sizes, named = torch.full_like(left[:, 0], levels.table_bytes), 0
    for width in levels.widths:
        sizes = sizes + width * ((left[:, named] + 7) // 8)
        named += (1 << width) - 1
    return sizes + left[:, named]


def other_bytes(g: Geometry, dtype: torch.dtype, mask: str, nnz: int) -> int:
    """Bytes of the sections of an entry that do not depend on the levels."""
    mask_bytes = g.rows * g.bitmap_row_bytes + 4 * (g.row_blocks + 1) if mask == "bitmap" else 0
    values_bytes = nnz + -(-LOW_BITS[dtype] * nnz // 8)
    return mask_bytes + values_bytes + 4 * (g.row_blocks + 1) + SLACK_BYTES

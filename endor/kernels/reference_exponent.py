"""Codec `exponent` in plain torch: the layout of formats/codecs/exponent.py written and read, all records at
once, a few million values at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from endor.formats.codecs import Params
from endor.formats.codecs.exponent import LOW_BITS, SLACK_BYTES, Levels, levels_of, ragged, walk
from endor.formats.packed import TensorLayout, offsets_dtype
from endor.kernels.exponent_levels import choose_levels, other_bytes, record_bytes, tables_of
from endor.kernels.reference_bits import KeptRows, pack_bits, unpack_bits

__all__ = ["ExponentCoder"]

_CHUNK_VALUES = 1 << 22


class ExponentCoder:
    """Splits values into sections and joins them again."""

    def encode(self, matrix: Tensor, rows: KeptRows, mask: str) -> tuple[Params, dict[str, Tensor]]:
        exponents, sections = _split(rows.values_of(matrix), matrix.dtype)
        counts = rows.starts.diff()
        histograms = torch.cat([_histograms(e, c) for e, c in _chunks(exponents, counts)])
        levels = choose_levels(histograms, other_bytes(rows.geometry, matrix.dtype, mask, len(exponents)))
        sizes = record_bytes(histograms, levels)
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        records = [_records(e, c, levels) for e, c in _chunks(exponents, counts)]
        used = int(offsets[-1])
        slack = torch.zeros(SLACK_BYTES, dtype=torch.uint8, device=matrix.device)
        sections["exponents"] = torch.cat([*records, slack])
        sections["exponent_offsets"] = offsets.to(offsets_dtype(used))
        params = {"pairs": levels.pairs, "singles": levels.singles, "exponent_bytes": used}
        return params, sections

    def decode(
        self, layout: TensorLayout, sections: Mapping[str, Tensor], rows: KeptRows, start_block: int
    ) -> Tensor:
        """The kept values of `rows` as integers, one after the other."""
        first, last = int(rows.starts[0]), int(rows.starts[-1])
        exponents = _read_records(layout, sections, rows.starts.diff(), start_block)
        head = sections["sign_mantissa"][first:last].to(torch.int32)
        bits = (head & 0x80) << 8 | head & 0x7F
        low_bits = LOW_BITS[layout.dtype]
        if low_bits:
            bits = (head & 0x80) << 8 | (head & 0x7F) << low_bits
            bits |= unpack_bits(sections["mantissa_low"], first, last, low_bits)
        exponent_bits = 5 if low_bits else 8
        return (bits | (exponents & ((1 << exponent_bits) - 1)) << (15 - exponent_bits)).to(torch.int16)


def _split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Exponents, and the sections that hold everything else."""
    low_bits = LOW_BITS[dtype]
    exponent_bits = 5 if low_bits else 8
    bits = values.to(torch.int32)
    exponents = bits >> (15 - exponent_bits) & ((1 << exponent_bits) - 1)
    head = (bits >> 8 & 0x80) | (bits >> low_bits & 0x7F)
    sections = {"sign_mantissa": head.to(torch.uint8)}
    if low_bits:
        sections["mantissa_low"] = pack_bits(bits & ((1 << low_bits) - 1), low_bits)
    return exponents.to(torch.uint8), sections


def _chunks(exponents: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Exponents and counts of a few row blocks at a time; one empty chunk where there are none."""
    ends = counts.cumsum(0)
    first, begin = 0, 0
    while first < len(counts) or first == 0:
        stop = max(int(torch.searchsorted(ends, begin + _CHUNK_VALUES)), first + 1)
        end = int(ends[min(stop, len(counts)) - 1]) if len(counts) else 0
        yield exponents[begin:end], counts[first:stop]
        first, begin = stop, end


def _histograms(exponents: Tensor, counts: Tensor) -> Tensor:
    """int64 [records, 256]."""
    bins = torch.repeat_interleave(counts) * 256 + exponents
    return torch.bincount(bins, minlength=len(counts) * 256).view(len(counts), 256)


def _records(exponents: Tensor, counts: Tensor, levels: Levels) -> Tensor:
    """The records of some row blocks, one after the other."""
    histograms = _histograms(exponents, counts)
    tables = tables_of(histograms)
    sizes = record_bytes(histograms, levels)
    begins = sizes.cumsum(0) - sizes
    ranks = tables.argsort(dim=1).to(torch.int16)
    records, within = ragged(counts)
    left = ranks[records, exponents.to(torch.int64)]
    bits = torch.zeros(int(sizes.sum()), 8, dtype=torch.bool, device=exponents.device).view(-1)
    position = begins + levels.table_bytes
    for width in levels.widths:
        stride, highest = (counts + 7) // 8, (1 << width) - 1
        code = left.clamp(max=highest)
        for plane in range(width):
            bits[(position + plane * stride)[records] * 8 + within] = (code >> plane & 1).bool()
        more = left >= highest
        left, records, exponents = left[more] - highest, records[more], exponents[more]
        position, counts = position + width * stride, torch.bincount(records, minlength=len(counts))
        records, within = ragged(counts)
    packed = pack_bits(bits, 1)
    packed[position[records] + within] = exponents
    named = torch.arange(levels.table_bytes, device=bits.device)
    packed[begins.unsqueeze(1) + named] = tables[:, : levels.table_bytes].to(torch.uint8)
    return packed


def _read_records(
    layout: TensorLayout, sections: Mapping[str, Tensor], counts: Tensor, start_block: int
) -> Tensor:
    """int32: the exponents of all values of consecutive row blocks."""
    levels = levels_of(layout.values)
    section = sections["exponents"]
    found, rest, rest_counts = walk(levels, counts, sections, start_block)
    exponents = torch.empty(int(counts.sum()), dtype=torch.int32, device=section.device)
    reached = torch.arange(len(exponents), device=section.device)
    for level in found:
        records, within = ragged(level.counts)
        code = torch.zeros_like(reached)
        for plane in range(level.width):
            address = (level.starts + plane * level.strides)[records] + within // 8
            code |= (section[address].to(torch.int64) >> within % 8 & 1) << plane
        table = found[0].starts - levels.table_bytes + level.base
        highest = (1 << level.width) - 1
        # Values that go on get an exponent that the next level overwrites.
        exponents[reached] = section[table[records] + code].to(torch.int32)
        reached = reached[code == highest]
    records, within = ragged(rest_counts)
    exponents[reached] = section[rest[records] + within].to(torch.int32)
    return exponents

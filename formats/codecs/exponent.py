"""`exponent`: lossless codes for the exponents of 16-bit floats; sign and mantissa stay as they are.

Pruning removes the small weights, so the exponents that are left are few. The idea of the bitmap is used
again on them: a bitmap over the values says which do *not* have the commonest exponent, a second one over
those says which do not have the second commonest either, and so on; exponents that no level names follow as
bytes. So every exponent there is comes back, whatever it is, and there is no case that does not fit.

Each row block has a record of its own: a table of its commonest exponents, the bitmaps of its levels (called
planes, since a level can have two and then name three exponents), the rest. A record knows its number of
values from the mask and from there on counts bits: it needs no other offset than that of its first byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.codecs.base import BlockRun, Codec, SectionPart, SectionSpec, ValuesContext, ValuesSlice
from endor.formats.layout import MAX_INTEGER

__all__ = [
    "LOW_BITS",
    "MAX_PAIRS",
    "MAX_SINGLES",
    "SLACK_BYTES",
    "ExponentCodec",
    "Level",
    "Levels",
    "levels_of",
    "ragged",
    "walk",
]

SLACK_BYTES = 64
"""Zero bytes behind the last record: whoever is inside a record may load a whole vector."""
LOW_BITS = {torch.bfloat16: 0, torch.float16: 3}
"""Mantissa bits that do not fit the byte with the sign."""
MAX_PAIRS = 2
MAX_SINGLES = 8


@dataclass(frozen=True)
class Levels:
    """How the exponents of a tensor are coded: first `pairs` levels of two planes, then `singles` of one.

    A level of `w` planes gives each of its values a code of `w` bits, and names an exponent for every code
    but the highest, which sends the value on to the next level.
    """

    pairs: int
    singles: int

    def __post_init__(self) -> None:
        if not (0 <= self.pairs <= MAX_PAIRS and 0 <= self.singles <= MAX_SINGLES and self.widths):
            raise FormatError(
                f"codec exponent: {self.pairs} pairs and {self.singles} singles; expected at most "
                f"{MAX_PAIRS} and {MAX_SINGLES}, not both 0 [F25]"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Planes of each level."""
        return (2,) * self.pairs + (1,) * self.singles

    @property
    def table_bytes(self) -> int:
        """Exponents that the levels name."""
        return 3 * self.pairs + self.singles


@dataclass(frozen=True)
class Level:
    """One level of many records at once.

    Attributes:
        width: planes of the level.
        base: index of its first exponent in the table.
        starts: int64 [records], first byte of the first plane within the section; the others follow it.
        counts: int64 [records], values that reach the level: bits of each plane.
    """

    width: int
    base: int
    starts: Tensor
    counts: Tensor

    @property
    def strides(self) -> Tensor:
        """Bytes of one plane of each record."""
        return (self.counts + 7) // 8

    def bytes(self, section: Tensor, plane: int) -> tuple[Tensor, Tensor]:
        """All bytes of `plane`, one record after the other, and the record of each."""
        strides = self.strides
        records, within = ragged(strides)
        return section[(self.starts + plane * strides)[records] + within], records


class ExponentCodec(Codec):
    """Sign and mantissa in whole bytes, exponents by nested bitmaps."""

    name = "exponent"
    lossless = True
    index_sections = ("exponent_offsets",)

    def supports(self, dtype: torch.dtype, mask: str) -> bool:  # noqa: ARG002 - every mask
        return dtype in LOW_BITS

    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        used = exponent_bytes(values)
        offsets = torch.int32 if used < 2**31 else torch.int64
        specs = (
            SectionSpec("exponent_offsets", offsets, (values.geometry.row_blocks + 1,)),
            SectionSpec("exponents", torch.uint8, (used + SLACK_BYTES,)),
            SectionSpec("sign_mantissa", torch.uint8, (values.nnz,)),
        )
        low_bits = LOW_BITS[values.dtype]
        if not low_bits:
            return specs
        return (*specs, SectionSpec("mantissa_low", torch.uint8, (-(-low_bits * values.nnz // 8),)))

    def check(self, values: ValuesContext, sections: Mapping[str, Tensor]) -> None:
        counts = values_per_block(values, sections)
        found, rest, rest_counts = walk(levels_of(values), counts, sections)
        if sections["exponents"][-SLACK_BYTES:].any():
            raise FormatError("exponents: the bytes behind the last record are not zero [F26]")
        if LOW_BITS[values.dtype]:
            _check_fp16(values, sections, found[0], rest, rest_counts)

    def slice(self, values: ValuesContext, index: Mapping[str, Tensor], run: BlockRun) -> ValuesSlice:
        offsets = index["exponent_offsets"][run.start : run.stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        decreases = bool((offsets[1:] < offsets[:-1]).any())
        if decreases or not 0 <= begin <= end <= exponent_bytes(values):
            raise FormatError(
                f"exponents: row blocks {run.start} to {run.stop}: exponent_offsets decrease or leave the "
                "section [F26]"
            )
        low_bits = LOW_BITS[values.dtype]
        parts = [
            SectionPart("exponents", 8 * begin, 8 * end, SLACK_BYTES),
            SectionPart("sign_mantissa", 8 * run.first_value, 8 * run.stop_value),
        ]
        if low_bits:
            parts.append(SectionPart("mantissa_low", low_bits * run.first_value, low_bits * run.stop_value))
        width = torch.int32 if end - begin < 2**31 else torch.int64
        ready = {"exponent_offsets": (offsets.to(torch.int64) - begin).to(width)}
        return ValuesSlice({**values.params, "exponent_bytes": end - begin}, tuple(parts), ready)


def _check_fp16(
    values: ValuesContext, sections: Mapping[str, Tensor], first: Level, rest: Tensor, rest_counts: Tensor
) -> None:
    """float16 has 32 exponents, and mantissa bits that do not fill their last byte."""
    section = sections["exponents"]
    tables = section[first.starts.unsqueeze(1) - 1 - torch.arange(levels_of(values).table_bytes)]
    records, within = ragged(rest_counts)
    if bool((tables >= 32).any()) or bool((section[rest[records] + within] >= 32).any()):
        raise FormatError("exponents: one is not below 32 [F28]")
    used_bits = LOW_BITS[values.dtype] * values.nnz % 8
    if used_bits and int(sections["mantissa_low"][-1]) >> used_bits:
        raise FormatError("mantissa_low: the bits behind the last value are not zero [F28]")


def levels_of(values: ValuesContext) -> Levels:
    """The levels that the params name. Raises FormatError for params that cannot be."""
    if set(values.params) != {"pairs", "singles", "exponent_bytes"}:
        raise FormatError(
            "codec exponent: expected params pairs, singles and exponent_bytes, found "
            f"{sorted(values.params)} [F25]"
        )
    return Levels(values.params["pairs"], values.params["singles"])


def exponent_bytes(values: ValuesContext) -> int:
    """Bytes of all records. Raises FormatError for params that cannot be."""
    least = values.geometry.row_blocks * levels_of(values).table_bytes
    used = values.params["exponent_bytes"]
    if not least <= used <= MAX_INTEGER:
        raise FormatError(f"codec exponent: exponent_bytes {used}, expected at least {least} [F25]")
    return used


def values_per_block(values: ValuesContext, sections: Mapping[str, Tensor]) -> Tensor:
    """int64 [row_blocks], the number of values of each row block."""
    g = values.geometry
    if values.mask == "bitmap":
        return sections["row_offsets"].to(torch.int64).diff()
    starts = torch.arange(g.row_blocks + 1, device=sections["exponents"].device) * g.row_block
    return starts.clamp(max=g.rows).diff() * g.cols


def walk(
    levels: Levels, counts: Tensor, sections: Mapping[str, Tensor], first: int = 0
) -> tuple[list[Level], Tensor, Tensor]:
    """Where everything lies in consecutive records, once it is certain that it lies inside them.

    Args:
        levels: of the tensor.
        counts: int64 [records], the values of each; none negative.
        sections: with `exponents` and `exponent_offsets`, whose contents may be anything.
        first: row block of the first record.

    Returns the levels, and first byte and number of the exponents that none of them names. Raises FormatError
    where offsets, bits and counts contradict each other.
    """
    section = sections["exponents"]
    begins, ends = _record_bounds(sections, first, len(counts))
    position, base = begins + levels.table_bytes, 0
    found: list[Level] = []
    for width in levels.widths:
        level = Level(width, base, position, counts)
        position = position + width * level.strides
        base += (1 << width) - 1
        _refuse(position > ends, first, "its levels are longer than the record", rule="F27")
        counts = _escapes(section, level, first)
        found.append(level)
    _refuse(position + counts != ends, first, "its levels and exponents do not fill the record", rule="F27")
    return found, position, counts


def _record_bounds(sections: Mapping[str, Tensor], first: int, records: int) -> tuple[Tensor, Tensor]:
    every = sections["exponent_offsets"]
    offsets = every[first : first + records + 1].to(torch.int64)
    begins, ends = offsets[:-1], offsets[1:]
    used = sections["exponents"].numel() - SLACK_BYTES
    starts_wrong = first == 0 and int(offsets[0]) != 0
    if starts_wrong or (first + records + 1 == len(every) and int(offsets[-1]) != used):
        raise FormatError(f"exponent_offsets must run from 0 to exponent_bytes {used} [F26]")
    wrong = (begins < 0) | (ends < begins) | (ends > used)
    _refuse(wrong, first, "exponent_offsets decrease or leave the section", rule="F26")
    return begins, ends


def _escapes(section: Tensor, level: Level, first: int) -> Tensor:
    """int64 [records], the values that go on to the next level."""
    together, records = level.bytes(section, 0)
    for plane in range(1, level.width):
        together = together & level.bytes(section, plane)[0]
    for plane in range(level.width):
        last = section[(level.starts + (plane + 1) * level.strides - 1).clamp(min=0)]
        padding = (last.to(torch.int64) >> ((level.counts - 1) % 8 + 1)) != 0
        wrong = padding & (level.counts > 0)
        _refuse(wrong, first, "bits are set behind the last value of a level", rule="F27")
    counts = torch.zeros_like(level.counts)
    return counts.index_add_(0, records, _POPCOUNT.to(section.device)[together.to(torch.int64)])


def _refuse(wrong: Tensor, first: int, what: str, *, rule: str) -> None:
    found = wrong.nonzero()
    if len(found):
        raise FormatError(f"exponents: row block {first + int(found[0])}: {what} [{rule}]")


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For `counts[i]` items of each record `i`, one after the other: the record of each, its index in it."""
    records = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return records, torch.arange(len(records), device=counts.device) - starts[records]


_POPCOUNT = torch.tensor([i.bit_count() for i in range(256)])

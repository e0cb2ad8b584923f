"""`int8` and `int4`: lossy codes of 8 or 4 bits per value, and a scale per run of columns.

A value is an integer times the scale of its group; `int4` looks its integer up in a codebook of 16 that the
tensor brings along. Zeros are the mask's business, so a codebook spends none of its entries on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.codecs.base import BlockRun, Codec, SectionPart, SectionSpec, ValuesContext, ValuesSlice
from endor.formats.layout import WORD_BITS

__all__ = ["CODEBOOK_SIZE", "MAX_GROUP_COLUMNS", "Int4Codec", "Int8Codec", "groups_per_row"]

CODEBOOK_SIZE = 16
MAX_GROUP_COLUMNS = 1 << 20
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def groups_per_row(values: ValuesContext) -> int:
    """Scales per row. Raises FormatError for params that cannot be."""
    if set(values.params) != {"group_columns"}:
        raise FormatError(
            f"codec int8/int4: expected param group_columns, found {sorted(values.params)} [F29]"
        )
    columns = values.params["group_columns"]
    if columns % WORD_BITS or not 0 < columns <= MAX_GROUP_COLUMNS:
        raise FormatError(
            f"codec int8/int4: group_columns {columns}, expected a multiple of {WORD_BITS} up to "
            f"{MAX_GROUP_COLUMNS} [F29]"
        )
    return -(-values.geometry.cols // columns)


class _QuantizedCodec(Codec):
    lossless = False
    _code_bits: ClassVar[int]

    def supports(self, dtype: torch.dtype, mask: str) -> bool:  # noqa: ARG002 - every mask
        return dtype in _DTYPES

    def check(self, values: ValuesContext, sections: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        bits = sections["scales"].view(torch.int16)
        # Zero, or a positive number that is neither subnormal, infinite nor NaN.
        wrong = ((bits != 0) & ((bits < 0x0080) | (bits >= 0x7F80))).nonzero()
        if len(wrong):
            row, group = (int(i) for i in wrong[0])
            raise FormatError(
                f"scales: group {group} of row {row} has scale {float(sections['scales'][row, group])}; "
                "expected 0 or a positive normal number [F30]"
            )

    def slice(self, values: ValuesContext, index: Mapping[str, Tensor], run: BlockRun) -> ValuesSlice:
        row_bits = 8 * torch.bfloat16.itemsize * groups_per_row(values)
        parts = (
            SectionPart("scales", run.first_row * row_bits, run.stop_row * row_bits),
            SectionPart("codes", run.first_value * self._code_bits, run.stop_value * self._code_bits),
        )
        return ValuesSlice(values.params, parts, {name: index[name] for name in self.index_sections})


class Int8Codec(_QuantizedCodec):
    """Two's complement integers, one byte each."""

    name = "int8"
    _code_bits = 8

    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        return (
            SectionSpec("scales", torch.bfloat16, (values.geometry.rows, groups_per_row(values))),
            SectionSpec("codes", torch.int8, (values.nnz,)),
        )


class Int4Codec(_QuantizedCodec):
    """Indices into a codebook of 16 integers, two to a byte."""

    name = "int4"
    index_sections = ("codebook",)
    _code_bits = 4

    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        return (
            SectionSpec("codebook", torch.int8, (CODEBOOK_SIZE,)),
            SectionSpec("scales", torch.bfloat16, (values.geometry.rows, groups_per_row(values))),
            SectionSpec("codes", torch.uint8, (-(-values.nnz // 2),)),
        )

    def check(self, values: ValuesContext, sections: Mapping[str, Tensor]) -> None:
        super().check(values, sections)
        if values.nnz % 2 and int(sections["codes"][-1]) >> 4:
            raise FormatError("codes: the bits behind the last value are not zero [F30]")

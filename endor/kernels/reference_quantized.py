"""Codecs `int8` and `int4` in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.codecs import Params
from endor.formats.packed import TensorLayout
from endor.kernels.backend import rows_of
from endor.kernels.quantize import (
    GROUP_COLUMNS,
    fit_codebook,
    fit_scales_int4,
    fit_scales_int8,
    int4_codes,
    int8_codes,
)
from endor.kernels.reference_bits import KeptRows, as_bits, pack_bits, unpack_bits

__all__ = ["Int4Coder", "Int8Coder"]


class Int8Coder:
    """Two's complement integers times scales."""

    def encode(self, matrix: Tensor, rows: KeptRows, mask: str) -> tuple[Params, dict[str, Tensor]]:  # noqa: ARG002
        scales = fit_scales_int8(matrix)
        codes = int8_codes(matrix, scales)[rows.keep]
        return {"group_columns": GROUP_COLUMNS}, {"scales": scales, "codes": codes}

    def decode(
        self, layout: TensorLayout, sections: Mapping[str, Tensor], rows: KeptRows, start_block: int
    ) -> Tensor:
        """The kept values of `rows` as integers of their bits, one after the other."""
        codes = sections["codes"][int(rows.starts[0]) : int(rows.starts[-1])]
        return _scaled(codes, layout, sections["scales"], rows, start_block)


class Int4Coder:
    """Entries of a codebook times scales."""

    def encode(self, matrix: Tensor, rows: KeptRows, mask: str) -> tuple[Params, dict[str, Tensor]]:  # noqa: ARG002
        codebook = fit_codebook(matrix)
        scales = fit_scales_int4(matrix, codebook)
        codes = pack_bits(int4_codes(matrix, scales, codebook)[rows.keep], 4)
        return {"group_columns": GROUP_COLUMNS}, {"codebook": codebook, "scales": scales, "codes": codes}

    def decode(
        self, layout: TensorLayout, sections: Mapping[str, Tensor], rows: KeptRows, start_block: int
    ) -> Tensor:
        """The kept values of `rows` as integers of their bits, one after the other."""
        indices = unpack_bits(sections["codes"], int(rows.starts[0]), int(rows.starts[-1]), 4)
        return _scaled(sections["codebook"][indices], layout, sections["scales"], rows, start_block)


def _scaled(
    integers: Tensor, layout: TensorLayout, scales: Tensor, rows: KeptRows, start_block: int
) -> Tensor:
    """Integers times the scales of their groups: exact in float32, then rounded once to the dtype."""
    part = rows_of(layout, start_block, start_block + rows.geometry.row_blocks)
    _refuse_bad_scales(scales[part.start : part.stop], start_block, rows.geometry.row_block)
    row, column = rows.keep.nonzero(as_tuple=True)
    scale = scales[part.start : part.stop].float()[row, column // layout.params["group_columns"]]
    return as_bits((integers.float() * scale).to(layout.dtype))


def _refuse_bad_scales(scales: Tensor, start_block: int, row_block: int) -> None:
    """Products with a scale that F30 forbids would depend on the machine, and pruned elements be no zeros."""
    bits = scales.contiguous().view(torch.int16)
    wrong = ((bits != 0) & ((bits < 0x0080) | (bits >= 0x7F80))).nonzero()
    if len(wrong):
        row, group = (int(i) for i in wrong[0])
        raise FormatError(
            f"row block {start_block + row // row_block}: scale {group} is {float(scales[row, group])}; "
            "expected 0 or a positive normal number [F30]; convert the model again"
        )

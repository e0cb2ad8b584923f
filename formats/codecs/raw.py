"""`raw`: the surviving values as they are, one after the other in row-major order (the paper's format)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from endor.errors import FormatError
from endor.formats.codecs.base import BlockRun, Codec, SectionPart, SectionSpec, ValuesContext, ValuesSlice
from endor.formats.dtypes import PACKABLE

__all__ = ["RawCodec"]


class RawCodec(Codec):
    """Values as stored in the source; lossless for every dtype."""

    name = "raw"
    lossless = True

    def supports(self, dtype: torch.dtype, mask: str) -> bool:
        return mask == "dense" or dtype in PACKABLE

    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        if values.params:
            raise FormatError(f"codec raw takes no params, found {sorted(values.params)} [F11]")
        return (SectionSpec("values", values.dtype, (values.nnz,)),)

    def slice(self, values: ValuesContext, index: Mapping[str, torch.Tensor], run: BlockRun) -> ValuesSlice:  # noqa: ARG002
        bits = 8 * values.dtype.itemsize
        return ValuesSlice({}, (SectionPart("values", run.first_value * bits, run.stop_value * bits),), {})

"""Codec `exponent` in C++: what the extension is handed, and the decisions that all backends share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from endor.formats.codecs import Params
from endor.formats.codecs.exponent import LOW_BITS, SLACK_BYTES, levels_of
from endor.formats.layout import Geometry
from endor.formats.packed import PackedTensor, offsets_dtype
from endor.kernels.exponent_levels import choose_levels, other_bytes, record_bytes, tables_of
from endor.kernels.native_memory import with_aligned_sections

__all__ = ["decode_exponent", "encode_exponent", "exponent_arguments"]


def encode_exponent(
    extension: Any, values: Tensor, starts: Tensor, g: Geometry, mask: str
) -> tuple[Params, dict[str, Tensor]]:
    """Params and sections for the kept `values`, of which `starts` (int64) lie before each row block."""
    low_bits = LOW_BITS[values.dtype]
    heads = torch.empty(len(values), dtype=torch.uint8)
    low = torch.empty(-(-low_bits * len(values) // 8), dtype=torch.uint8)
    histograms = torch.empty(g.row_blocks, 256, dtype=torch.int64)
    job = (
        torch.get_num_threads(),
        g.rows,
        g.cols,
        g.row_block,
        starts.data_ptr(),
        values.data_ptr(),
        values.dtype == torch.float16,
    )
    extension.exponent_split(job, histograms.data_ptr(), heads.data_ptr(), low.data_ptr())
    levels = choose_levels(histograms, other_bytes(g, values.dtype, mask, len(values)))
    offsets = torch.nn.functional.pad(record_bytes(histograms, levels).cumsum(0), (1, 0))
    tables = tables_of(histograms).to(torch.uint8)
    used = int(offsets[-1])
    records, scratch = torch.empty(used + SLACK_BYTES, dtype=torch.uint8), torch.empty_like(heads)
    records[used:] = 0
    extension.exponent_records(
        job,
        levels.pairs,
        levels.singles,
        tables.data_ptr(),
        offsets.data_ptr(),
        scratch.data_ptr(),
        records.data_ptr(),
    )
    sections = {
        "exponent_offsets": offsets.to(offsets_dtype(used)),
        "exponents": records,
        "sign_mantissa": heads,
        **({"mantissa_low": low} if low_bits else {}),
    }
    return {"pairs": levels.pairs, "singles": levels.singles, "exponent_bytes": used}, sections


def decode_exponent(extension: Any, mask: tuple[Any, ...], packed: PackedTensor) -> int:
    """Decode as `mask` says. Returns -1, or what the extension found wrong."""
    packed = with_aligned_sections(packed)
    failure: int = extension.decode_exponent(*exponent_arguments(mask, packed))
    return failure


def exponent_arguments(mask: tuple[Any, ...], packed: PackedTensor) -> tuple[Any, ...]:
    """What `decode_exponent` of the extension takes; addresses of the sections, which must be aligned."""
    layout, sections = packed.layout, packed.sections
    levels = levels_of(layout.values)
    offsets = sections["exponent_offsets"]
    low = sections["mantissa_low"].data_ptr() if LOW_BITS[layout.dtype] else 0
    return (
        mask,
        levels.pairs,
        levels.singles,
        layout.dtype == torch.float16,
        offsets.data_ptr(),
        offsets.dtype == torch.int64,
        sections["exponents"].data_ptr(),
        layout.params["exponent_bytes"],
        sections["sign_mantissa"].data_ptr(),
        low,
    )

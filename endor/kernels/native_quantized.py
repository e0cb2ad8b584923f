"""Codecs `int8` and `int4` in C++: what the extension is handed. Encoding is offline work, left to torch."""

from __future__ import annotations

from typing import Any

import torch

from endor.formats.packed import PackedTensor
from endor.kernels.native_memory import with_aligned_sections

__all__ = ["decode_quantized", "quantized_arguments"]

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""As in native/quantized.h."""


def decode_quantized(extension: Any, mask: tuple[Any, ...], packed: PackedTensor) -> int:
    """Decode as `mask` says. Returns -1, or what the extension found wrong."""
    packed = with_aligned_sections(packed)
    failure: int = extension.decode_quantized(*quantized_arguments(mask, packed))
    return failure


def quantized_arguments(mask: tuple[Any, ...], packed: PackedTensor) -> tuple[Any, ...]:
    """What `decode_quantized` of the extension takes; addresses of the sections, which must be aligned."""
    layout, sections = packed.layout, packed.sections
    int4 = layout.codec == "int4"
    return (
        mask,
        int4,
        _TYPES[layout.dtype],
        layout.params["group_columns"],
        sections["codes"].data_ptr(),
        sections["codebook"].data_ptr() if int4 else 0,
        sections["scales"].data_ptr(),
    )

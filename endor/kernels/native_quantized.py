"""Codecs `int8` and `int4` in C++: what the extension is handed."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from endor.formats.layout import Geometry
from endor.formats.packed import PackedTensor, TensorLayout, offsets_dtype
from endor.kernels.native_memory import with_aligned_sections
from endor.kernels.quantize import (
    GROUP_COLUMNS,
    INT4_FACTORS,
    INT8_FACTORS,
    fit_codebook,
    highest_scale,
    not_finite,
)

__all__ = ["decode_quantized", "encode_quantized", "quantized_arguments"]

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


def encode_quantized(extension: Any, isa: int, weight: Tensor, codec: str, mask: str) -> PackedTensor:
    """Pack a contiguous `weight`. Raises KernelError for NaN or infinity."""
    g = Geometry.of(tuple(weight.shape))
    sections: dict[str, Tensor] = {}
    starts = (torch.arange(g.row_blocks + 1) * g.row_block).clamp(max=g.rows) * g.cols
    bitmap = None
    if mask == "bitmap":
        bitmap = torch.empty(g.rows, g.bitmap_row_bytes, dtype=torch.uint8)
        extension.quantized_mask(_job(isa, weight), bitmap.data_ptr(), starts.data_ptr())
    nnz = int(starts[-1])
    codebook = None
    if codec == "int4":
        codebook = fit_codebook(weight.view(g.rows, g.cols), partial(_scales, extension, isa))
        sections["codebook"] = codebook
    codes = torch.zeros(-(-nnz // 2) if codec == "int4" else nnz, dtype=torch.uint8)
    sections["scales"] = _encode(extension, isa, weight, codebook, bitmap, starts, codes)
    sections["codes"] = codes if codec == "int4" else codes.view(torch.int8)
    if bitmap is not None:
        sections |= {"bitmap": bitmap, "row_offsets": starts.to(offsets_dtype(nnz))}
    params = MappingProxyType({"group_columns": GROUP_COLUMNS})
    return PackedTensor(TensorLayout(tuple(weight.shape), weight.dtype, mask, codec, nnz, params), sections)


def _scales(extension: Any, isa: int, matrix: Tensor, codebook: Tensor) -> Tensor:
    """As `fit_scales_int4`."""
    return _encode(extension, isa, matrix, codebook, None, None, None)


def _encode(  # noqa: PLR0917 - everything the extension is handed
    extension: Any,
    isa: int,
    weight: Tensor,
    codebook: Tensor | None,
    bitmap: Tensor | None,
    starts: Tensor | None,
    codes: Tensor | None,
) -> Tensor:
    """The scales; writes `codes`, if wanted, which must be zeros."""
    g = Geometry.of(tuple(weight.shape))
    scales = torch.empty(g.rows, -(-g.cols // GROUP_COLUMNS), dtype=torch.bfloat16)
    factors = torch.tensor(INT8_FACTORS if codebook is None else INT4_FACTORS, dtype=torch.float32)
    finite = extension.encode_quantized(
        _job(isa, weight),
        codebook is not None,
        _address(bitmap),
        _address(starts),
        factors.data_ptr(),
        len(factors),
        highest_scale(weight.dtype),
        _address(codebook),
        scales.data_ptr(),
        _address(codes),
    )
    if not finite:
        raise not_finite()
    return scales


def _job(isa: int, weight: Tensor) -> tuple[Any, ...]:
    g = Geometry.of(tuple(weight.shape))
    threads, kind = torch.get_num_threads(), _TYPES[weight.dtype]
    return (isa, threads, g.rows, g.cols, g.row_block, kind, weight.data_ptr())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

"""The C++ kernels, one backend per instruction set this machine has.

The extension `endor.kernels._native` is optional: without it there is no native backend and `reference`
does the work. It takes addresses and sizes; everything that could make an address wrong is checked here or
in `endor.kernels.dispatch` first, and everything a file could lie about is checked in C++.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.codecs import Params
from endor.formats.layout import Geometry
from endor.formats.packed import PackedTensor, TensorLayout, offsets_dtype
from endor.kernels.backend import Backend
from endor.kernels.native_exponent import decode_exponent, encode_exponent
from endor.kernels.native_memory import aligned, size_log2
from endor.kernels.native_quantized import decode_quantized, encode_quantized
from endor.kernels.openmp import parallel_address
from endor.kernels.reference import ReferenceBackend

__all__ = ["RULES", "NativeBackend", "native_backends"]

STREAMING_BYTES = 32 << 20
"""Outputs from this size on bypass the caches; a smaller one may still be there for the matmul that reads it
(23 MB: 4 % slower with streaming stores, 34 MB: 13 % faster, on a 32 MB cache: docs/design/kernels.md)."""
_CODECS = ("raw", "exponent", "int8", "int4")
_REFERENCE = ReferenceBackend()
_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}
RULES = (
    "row_offsets decrease, leave the values, or do not run from 0 to nnz",
    "the bitmap has bits set beyond the last column",
    "row_offsets and the number of bits set in the bitmap differ",
    "its record of exponents does not fill its bytes, or a scale is neither 0 nor a positive normal number",
)


class NativeBackend(Backend):
    """One instruction set of the extension."""

    def __init__(self, name: str, extension: Any, isa: int) -> None:
        self.name = name
        self._isa = isa
        self._extension = extension

    def supports(self, codec: str, device: torch.device) -> bool:
        return codec in _CODECS and device.type == "cpu"

    def encode(self, weight: Tensor, codec: str, *, mask: str = "bitmap") -> PackedTensor:
        if codec in {"int8", "int4"}:
            return encode_quantized(self._extension, self._isa, aligned(weight), codec, mask)
        weight = aligned(weight)
        g = Geometry.of(tuple(weight.shape))
        kept = self._keep(weight, g) if mask == "bitmap" else _keep_all(weight, g)
        params: Params = {}
        sections = {"values": kept.values}
        if codec == "exponent":
            params, sections = encode_exponent(self._extension, kept.values, kept.starts, g, mask)
        layout = TensorLayout(
            tuple(weight.shape), weight.dtype, mask, codec, len(kept.values), MappingProxyType(dict(params))
        )
        return PackedTensor(layout, {**kept.mask, **sections})

    def _keep(self, weight: Tensor, g: Geometry) -> _Kept:
        bitmap = torch.empty(g.rows, g.bitmap_row_bytes, dtype=torch.uint8)
        starts = torch.empty(g.row_blocks + 1, dtype=torch.int64)
        values = np.empty(weight.numel(), _INTEGERS[weight.dtype.itemsize])
        nnz = self.encode_into(weight, bitmap, starts, torch.from_numpy(values).view(weight.dtype))
        # How many values there are is known only now. Shrinking gives the untouched rest back without a copy.
        values.resize(nnz, refcheck=False)
        mask = {"bitmap": bitmap, "row_offsets": starts.to(offsets_dtype(nnz))}
        return _Kept(torch.from_numpy(values).view(weight.dtype), starts, mask)

    def encode_into(self, weight: Tensor, bitmap: Tensor, offsets: Tensor, values: Tensor) -> int:
        """Encode to memory that is there: int64 `offsets`, `values` with room for all. Returns nnz."""
        g = Geometry.of(tuple(weight.shape))
        nnz: int = self._extension.encode(
            self._isa,
            torch.get_num_threads(),
            g.rows,
            g.cols,
            g.row_block,
            size_log2(weight),
            weight.data_ptr(),
            bitmap.data_ptr(),
            offsets.data_ptr(),
            values.data_ptr(),
        )
        return nnz

    def decode(self, packed: PackedTensor, start_block: int, stop_block: int, out: Tensor) -> None:
        codec = packed.layout.codec
        if codec == "raw":
            failure = self._decode_raw(packed, start_block, stop_block, out)
        else:
            offsets = aligned(packed.sections["row_offsets"]) if packed.layout.mask == "bitmap" else None
            mask = self._mask(packed, offsets, start_block, stop_block, out)
            decode = decode_exponent if codec == "exponent" else decode_quantized
            failure = decode(self._extension, mask, packed)
        if failure >= 0:
            raise FormatError(f"row block {failure // 4}: {RULES[failure % 4]}")

    def _decode_raw(self, packed: PackedTensor, start_block: int, stop_block: int, out: Tensor) -> int:
        g, sections = packed.layout.geometry, packed.sections
        row_offsets, values = aligned(sections["row_offsets"]), aligned(sections["values"])
        failure: int = self._extension.decode(
            self._isa,
            torch.get_num_threads(),
            g.rows,
            g.cols,
            g.row_block,
            packed.layout.nnz,
            size_log2(out),
            sections["bitmap"].data_ptr(),
            row_offsets.data_ptr(),
            row_offsets.dtype == torch.int64,
            values.data_ptr(),
            out.data_ptr(),
            start_block,
            stop_block,
            out.nbytes >= STREAMING_BYTES,
        )
        return failure

    def _mask(
        self, packed: PackedTensor, row_offsets: Tensor | None, start_block: int, stop_block: int, out: Tensor
    ) -> tuple[Any, ...]:
        """What every codec but raw tells the extension first; see `parse_mask` in module.cpp."""
        g = packed.layout.geometry
        return (
            self._isa,
            torch.get_num_threads(),
            g.rows,
            g.cols,
            g.row_block,
            packed.layout.nnz,
            size_log2(out),
            packed.sections["bitmap"].data_ptr() if row_offsets is not None else 0,
            row_offsets.data_ptr() if row_offsets is not None else 0,
            row_offsets is not None and row_offsets.dtype == torch.int64,
            out.data_ptr(),
            start_block,
            stop_block,
            out.nbytes >= STREAMING_BYTES,
        )


@dataclass(frozen=True)
class _Kept:
    """The values that are kept, how many (int64) lie before each row block, and the mask's sections."""

    values: Tensor
    starts: Tensor
    mask: dict[str, Tensor]


def _keep_all(weight: Tensor, g: Geometry) -> _Kept:
    rows = torch.arange(g.row_blocks + 1) * g.row_block
    return _Kept(weight.reshape(-1), rows.clamp(max=g.rows) * g.cols, {})


def native_backends() -> tuple[NativeBackend, ...]:
    """A backend per instruction set, fastest first; none without the extension."""
    try:
        extension = importlib.import_module("endor.kernels._native")
    except ImportError:
        return ()
    extension.set_openmp(parallel_address())
    return tuple(NativeBackend(f"native-{name}", extension, isa) for name, isa in extension.isas().items())

"""The C++ kernels, one backend per instruction set this machine has.

The extension `endor.kernels._native` is optional: without it there is no native backend and `reference`
does the work. It takes addresses and sizes; everything that could make an address wrong is checked here or
in `endor.kernels.dispatch` first, and everything a file could lie about is checked in C++.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from endor.errors import FormatError
from endor.formats.layout import Geometry
from endor.formats.packed import PackedTensor, TensorLayout, offsets_dtype
from endor.kernels.backend import Backend
from endor.kernels.openmp import parallel_address

__all__ = ["NativeBackend", "native_backends"]

STREAMING_BYTES = 32 << 20
"""Outputs from this size on bypass the caches; a smaller one may still be there for the matmul that reads it
(23 MB: 4 % slower with streaming stores, 34 MB: 13 % faster, on a 32 MB cache: docs/design/kernels.md)."""
_CODECS = ("raw",)
_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}
_RULES = (
    "row_offsets decrease, leave the values, or do not run from 0 to nnz",
    "the bitmap has bits set beyond the last column",
    "row_offsets and the number of bits set in the bitmap differ",
)


class NativeBackend(Backend):
    """One instruction set of the extension."""

    def __init__(self, name: str, extension: Any, isa: int) -> None:
        self.name = name
        self._isa = isa
        self._encode = extension.encode
        self._decode = extension.decode

    def supports(self, codec: str, device: torch.device) -> bool:
        return codec in _CODECS and device.type == "cpu"

    def encode(self, weight: Tensor, codec: str, *, mask: str = "bitmap") -> PackedTensor:
        shape = tuple(weight.shape)
        g = Geometry.of(shape)
        weight = _aligned(weight)
        bitmap = torch.empty(g.rows, g.bitmap_row_bytes, dtype=torch.uint8)
        offsets = torch.empty(g.row_blocks + 1, dtype=torch.int64)
        values = np.empty(weight.numel(), _INTEGERS[weight.dtype.itemsize])
        nnz = self.encode_into(weight, bitmap, offsets, torch.from_numpy(values).view(weight.dtype))
        # How many values there are is known only now. Shrinking gives the untouched rest back without a copy.
        values.resize(nnz, refcheck=False)
        layout = TensorLayout(shape, weight.dtype, mask, codec, nnz)
        sections = {
            "bitmap": bitmap,
            "row_offsets": offsets.to(offsets_dtype(nnz)),
            "values": torch.from_numpy(values).view(weight.dtype),
        }
        return PackedTensor(layout, sections)

    def encode_into(self, weight: Tensor, bitmap: Tensor, offsets: Tensor, values: Tensor) -> int:
        """Encode to memory that is there: int64 `offsets`, `values` with room for all. Returns nnz."""
        g = Geometry.of(tuple(weight.shape))
        nnz: int = self._encode(
            self._isa,
            torch.get_num_threads(),
            g.rows,
            g.cols,
            g.row_block,
            _size_log2(weight),
            weight.data_ptr(),
            bitmap.data_ptr(),
            offsets.data_ptr(),
            values.data_ptr(),
        )
        return nnz

    def decode(self, packed: PackedTensor, start_block: int, stop_block: int, out: Tensor) -> None:
        g, sections = packed.layout.geometry, packed.sections
        row_offsets, values = _aligned(sections["row_offsets"]), _aligned(sections["values"])
        failure = self._decode(
            self._isa,
            torch.get_num_threads(),
            g.rows,
            g.cols,
            g.row_block,
            packed.layout.nnz,
            _size_log2(out),
            sections["bitmap"].data_ptr(),
            row_offsets.data_ptr(),
            row_offsets.dtype == torch.int64,
            values.data_ptr(),
            out.data_ptr(),
            start_block,
            stop_block,
            out.nbytes >= STREAMING_BYTES,
        )
        if failure >= 0:
            raise FormatError(f"row block {failure // 4}: {_RULES[failure % 4]}")


def _size_log2(tensor: Tensor) -> int:
    return tensor.dtype.itemsize.bit_length() - 1


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it starts in the middle of an element (a view of foreign memory can)."""
    return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor


def native_backends() -> tuple[NativeBackend, ...]:
    """A backend per instruction set, fastest first; none without the extension."""
    try:
        extension = importlib.import_module("endor.kernels._native")
    except ImportError:
        return ()
    extension.set_openmp(parallel_address())
    return tuple(NativeBackend(f"native-{name}", extension, isa) for name, isa in extension.isas().items())

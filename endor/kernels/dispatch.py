"""The one way in: check the request, choose a backend, run it.

A backend is chosen by name or, by default, as the fastest that supports the codec and the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from endor.errors import KernelError
from endor.formats.codecs import CODECS
from endor.formats.packed import DENSE_SECTION, MASKS, PackedTensor, TensorLayout
from endor.kernels.backend import rows_of
from endor.kernels.ops import decode_traced
from endor.kernels.registry import choose

__all__ = ["decode", "decode_rows", "encode"]


def encode(
    weight: Tensor, *, values: str = "raw", mask: str = "bitmap", backend: str | None = None
) -> PackedTensor:
    """Pack `weight`: bit-exactly, unless the codec is one of the lossy ones.

    Args:
        weight: any rank >= 1 and any strides; not changed, not kept.
        values: name of the values codec.
        mask: `bitmap` keeps the elements whose bits are not all zero; `dense` keeps all.
        backend: one of `backends()`; the fastest one by default.

    Raises KernelError where mask, codec, dtype and backend do not go together, and for NaN or infinity with a
    lossy codec.
    """
    if values not in CODECS or mask not in MASKS or not CODECS[values].supports(weight.dtype, mask):
        raise KernelError(f"cannot encode {weight.dtype} with values {values!r} and mask {mask!r}")
    source = weight.detach().resolve_neg().contiguous()
    if mask == "dense" and values == "raw":
        layout = TensorLayout(tuple(source.shape), source.dtype, "dense", "raw", source.numel())
        copied = source.data_ptr() != weight.data_ptr()
        return PackedTensor(layout, {DENSE_SECTION: source if copied else source.clone()})
    return choose(backend, values, source.device).encode(source, values, mask=mask)


def decode(packed: PackedTensor, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The dense tensor that `packed` stands for, bit for bit.

    Args:
        packed: contents may come from a file: whatever they say, nothing outside the sections is touched.
        out: contiguous tensor of the layout's shape and dtype to write to; a new one by default.
        backend: one of `backends()`; the fastest one by default.

    Raises FormatError where the contents contradict each other (then `out` is undefined), KernelError for an
    `out` or a backend that does not fit.
    """
    layout = packed.layout
    if out is not None:
        _check_out(out, layout.shape, packed)
        return _decode_into(packed, out, backend)
    out = torch.empty(layout.shape, dtype=layout.dtype, device=packed.device)
    return _decode_into(packed, out, backend)


def _decode_into(packed: PackedTensor, out: Tensor, backend: str | None) -> Tensor:
    layout = packed.layout
    if layout.is_plain:
        return out.copy_(packed.sections[DENSE_SECTION])
    if _is_traced(out):
        decode_traced(packed, out)
    else:
        choose(backend, layout.codec, packed.device).decode(packed, 0, layout.geometry.row_blocks, out)
    return out


def decode_rows(
    packed: PackedTensor, start_block: int, stop_block: int, out: Tensor, *, backend: str | None = None
) -> Tensor:
    """Decode row blocks [start_block, stop_block) to `out` [rows, cols].

    A row block is `layout.geometry.row_block` rows, the last one may be shorter. Only the blocks that are
    decoded are checked. Raises as `decode` does.
    """
    layout = packed.layout
    if not 0 <= start_block <= stop_block <= layout.geometry.row_blocks:
        raise KernelError(
            f"row blocks {start_block} to {stop_block} of {layout.geometry.row_blocks} do not exist"
        )
    rows = rows_of(layout, start_block, stop_block)
    _check_out(out, (len(rows), layout.geometry.cols), packed)
    if layout.is_plain:
        dense = packed.sections[DENSE_SECTION].view(layout.geometry.rows, layout.geometry.cols)
        return out.copy_(dense[rows.start : rows.stop])
    choose(backend, layout.codec, packed.device).decode(packed, start_block, stop_block, out)
    return out


def _check_out(out: Tensor, shape: tuple[int, ...], packed: PackedTensor) -> None:
    if (
        out.shape != shape
        or out.dtype != packed.layout.dtype
        or out.device != packed.device
        or not out.is_contiguous()
        or out.is_neg()
    ):
        raise KernelError(
            f"out must be a contiguous {packed.layout.dtype} tensor of shape {list(shape)} "
            f"on {packed.device}, found {out.dtype}{list(out.shape)} with strides {list(out.stride())} "
            f"on {out.device}"
        )


def _is_traced(tensor: Tensor) -> bool:
    """Whether a kernel could not take `tensor`'s address: fake and functional tensors are subclasses."""
    return torch.compiler.is_compiling() or type(tensor) not in {Tensor, torch.nn.Parameter}

"""A packed tensor in memory: what it stands for (`TensorLayout`), and its sections (`PackedTensor`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from endor.errors import FormatError
from endor.formats.codecs import Codec, Params, SectionSpec, ValuesContext, codec_named
from endor.formats.dtypes import dtype_name
from endor.formats.layout import WORD_BITS, Geometry, check_shape
from endor.formats.strict_json import short

__all__ = ["DENSE_SECTION", "MASKS", "PackedTensor", "TensorLayout", "check_mask"]

MASKS = ("dense", "bitmap")
DENSE_SECTION = "dense"
"""The one section of an entry that is stored as it is; in a file it carries the entry's own name."""


@dataclass(frozen=True)
class TensorLayout:
    """What a stored tensor is: shape, dtype, mask, codec, number of kept values and the codec's params.

    Attributes:
        shape: of the dense tensor; any rank for a dense/raw tensor, >= 1 otherwise, sizes may be zero.
        dtype: of the dense tensor.
        mask: `bitmap` (only elements whose bits are not all zero are kept) or `dense` (all are).
        codec: name of the values codec.
        nnz: number of kept values; the number of elements under mask `dense`.
        params: the codec's integers.

    Raises FormatError if the parts contradict each other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    mask: str
    codec: str
    nnz: int
    params: Params = field(default_factory=lambda: MappingProxyType({}), hash=False)

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise FormatError(f"unknown mask {short(self.mask)}; expected one of {', '.join(MASKS)} [F11]")
        check_shape(self.shape)
        if not self._codec.supports(self.dtype, self.mask):
            raise FormatError(
                f"codec {self.codec} with mask {self.mask} cannot hold {dtype_name(self.dtype)} [F11]"
            )
        if not self.shape and not self.is_plain:
            raise FormatError("a scalar has no rows: it can only be stored dense and raw [F11]")
        numel = self.geometry.numel
        if not 0 <= self.nnz <= numel or (self.mask == "dense" and self.nnz != numel):
            raise FormatError(
                f"nnz {self.nnz} does not fit shape {list(self.shape)} under mask {self.mask} [F11]"
            )
        _ = self.sections  # raises for params the codec cannot have

    def __reduce__(self) -> tuple[Any, ...]:
        # Also what copy.deepcopy uses; a read-only map of params can be neither pickled nor copied.
        fields = (self.shape, self.dtype, self.mask, self.codec, self.nnz, dict(self.params))
        return TensorLayout, fields

    @property
    def _codec(self) -> Codec:
        return codec_named(self.codec)

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is stored as it is, under its own name."""
        return self.mask == "dense" and self.codec == "raw"

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.of(self.shape) if self.shape else Geometry(rows=1, cols=1)

    @cached_property
    def values(self) -> ValuesContext:
        return ValuesContext(self.geometry, self.dtype, self.mask, self.nnz, self.params)

    @cached_property
    def sections(self) -> tuple[SectionSpec, ...]:
        """All sections in file order."""
        if self.is_plain:
            return (SectionSpec(DENSE_SECTION, self.dtype, self.shape),)
        return (*self._mask_sections(), *self._codec.sections(self.values))

    def _mask_sections(self) -> tuple[SectionSpec, ...]:
        if self.mask == "dense":
            return ()
        g = self.geometry
        return (
            SectionSpec("bitmap", torch.uint8, (g.rows, g.bitmap_row_bytes)),
            SectionSpec("row_offsets", offsets_dtype(self.nnz), (g.row_blocks + 1,)),
        )

    @property
    def dense_bytes(self) -> int:
        return self.geometry.numel * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all sections."""
        return sum(spec.nbytes for spec in self.sections)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all sections per element of the dense tensor; 0 for a tensor without elements."""
        numel = self.geometry.numel
        return 8 * self.nbytes / numel if numel else 0.0

    @property
    def sparsity(self) -> float:
        """Share of elements that are not kept; 0 for a tensor without elements."""
        numel = self.geometry.numel
        return 1 - self.nnz / numel if numel else 0.0


def offsets_dtype(nnz: int) -> torch.dtype:
    """Element type of row offsets: 32 bits wherever they reach."""
    return torch.int32 if nnz < 2**31 else torch.int64


@dataclass(frozen=True)
class PackedTensor:
    """A layout and its sections, checked against each other when constructed (sizes, not contents)."""

    layout: TensorLayout
    sections: Mapping[str, torch.Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        specs = self.layout.sections
        if set(self.sections) != {spec.name for spec in specs}:
            expected = [spec.name for spec in specs]
            raise FormatError(f"expected sections {expected}, found {sorted(self.sections)}")
        for spec in specs:
            _check_section(spec, self.sections[spec.name])

    @property
    def device(self) -> torch.device:
        return next(iter(self.sections.values())).device

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedTensor:
        """The same tensor with its sections on `device`."""
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in self.sections.items()}
        return PackedTensor(self.layout, moved)

    def check(self) -> None:
        """Check the contents: bitmap, row offsets and what the codec demands. Raises FormatError."""
        if self.layout.mask == "bitmap":
            check_mask(self.layout, self.sections["bitmap"], self.sections["row_offsets"])
        if not self.layout.is_plain:
            codec_named(self.layout.codec).check(self.layout.values, self.sections)


def _check_section(spec: SectionSpec, tensor: torch.Tensor) -> None:
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise FormatError(
            f"section {spec.name}: expected {dtype_name(spec.dtype)}{list(spec.shape)}, "
            f"found {dtype_name(tensor.dtype)}{list(tensor.shape)}"
        )
    if not tensor.is_contiguous():
        raise FormatError(f"section {spec.name} is not contiguous")


def check_mask(layout: TensorLayout, bitmap: torch.Tensor, row_offsets: torch.Tensor) -> None:
    """Check that bitmap and row offsets agree with each other and with nnz. Raises FormatError.

    Args:
        layout: of the tensor the two sections belong to.
        bitmap: uint8 [rows, bitmap_row_bytes], on the CPU.
        row_offsets: int32 or int64 [row_blocks + 1], on the CPU.
    """
    g = layout.geometry
    offsets = row_offsets.numpy().astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != layout.nnz:
        raise FormatError(
            f"row_offsets must run from 0 to nnz {layout.nnz}, found {offsets[0]} to {offsets[-1]} [F18]"
        )
    decrease = np.flatnonzero(offsets[1:] < offsets[:-1])  # not np.diff: hostile offsets overflow it
    if decrease.size:
        raise FormatError(f"row_offsets decrease at row block {int(decrease[0])} [F18]")
    if g.numel:
        _check_bits(g, bitmap.numpy().view(np.uint64), np.diff(offsets))


def _check_bits(g: Geometry, words: npt.NDArray[np.uint64], per_block: npt.NDArray[np.int64]) -> None:
    tail_bits = g.cols % WORD_BITS
    if tail_bits:
        ragged = np.flatnonzero(words[:, -1] >> np.uint64(tail_bits))
        if ragged.size:
            raise FormatError(f"bitmap row {int(ragged[0])} has bits set beyond column {g.cols} [F17]")
    per_row = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    found = np.add.reduceat(per_row, np.arange(0, g.rows, g.row_block))
    wrong = np.flatnonzero(found != per_block)
    if wrong.size:
        i = int(wrong[0])
        raise FormatError(
            f"row block {i} has {int(found[i])} bits set but row_offsets say {int(per_block[i])} [F18]"
        )

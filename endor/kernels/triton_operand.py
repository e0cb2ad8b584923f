"""A packed tensor as the Triton kernels take it: sections, sizes and what they are compiled for.

Made once per `PackedTensor` (`operand_of`): a token of a large model makes hundreds of launches, and putting
the arguments together takes longer than the rest of Python's part of a launch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from endor.formats.codecs.exponent import LOW_BITS, levels_of
from endor.formats.packed import PackedTensor, TensorLayout
from endor.kernels.triton_kernels import elements as te
from endor.kernels.triton_mode import is_interpreted

__all__ = [
    "INTEGERS",
    "LANES_PER_WARP",
    "OPTIONS",
    "TILE_LANES",
    "Launch",
    "Operand",
    "Sections",
    "operand_of",
    "tile_options",
]

OPTIONS = {"enable_fp_fusion": True}
"""For the compiler; Triton warns of launches that leave open whether products and sums may be fused."""
LANES_PER_WARP = 64 if torch.version.hip else 32
"""A lane is 32 columns and has a thread of its own, so that what is done once per lane is done once per 32
columns. A tile that is decoded has the lanes of one warp: its prefix sums need no other warp."""
TILE_LANES = 128 if is_interpreted() else LANES_PER_WARP
"""Lanes of a tile that is decoded; the interpreter, whose cost is per operation, takes more."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""What kernels take elements of so many bytes for."""
_CODECS = {"raw": te.RAW, "exponent": te.EXPONENT, "int8": te.INT8, "int4": te.INT4}
_KINDS = {torch.bfloat16: te.BFLOAT16, torch.float16: te.FLOAT16, torch.float32: te.FLOAT32}
_VALUES = {"raw": "values", "exponent": "sign_mantissa", "int8": "codes", "int4": "codes"}


@dataclass(frozen=True)
class Launch:
    """How a layout is decoded: the constants its kernel is compiled for."""

    layout: TensorLayout

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments, as plain numbers, that all layouts decoded in one launch share."""
        layout = self.layout
        levels = levels_of(layout.values) if layout.codec == "exponent" else None
        return {
            "WHOLE": layout.geometry.cols % 64 == 0,
            "MASKED": layout.mask == "bitmap",
            "CODEC": _CODECS[layout.codec].value,
            "PAIRS": levels.pairs if levels else 0,
            "SINGLES": levels.singles if levels else 0,
            "KIND": _KINDS.get(layout.dtype, te.BITS).value,
        }

    @property
    def element(self) -> torch.dtype:
        """The integer type that kernels take the elements for."""
        return INTEGERS[self.layout.dtype.itemsize]


class Sections:
    """The sections of a packed tensor as kernels take them; None for those that the codec does not have."""

    def __init__(self, packed: PackedTensor) -> None:
        sections, layout = packed.sections, packed.layout
        half = bool(LOW_BITS.get(layout.dtype))
        extra = "scales" if "scales" in sections else "mantissa_low" if half else ""
        self.bitmap = _aligned(sections.get("bitmap"), 4)
        self.row_offsets = _aligned(sections.get("row_offsets"), 8)
        values = _aligned(sections[_VALUES[layout.codec]], 4)
        self.values = values.view(INTEGERS[values.dtype.itemsize]) if layout.codec == "raw" else values
        self.exponent_offsets = _aligned(sections.get("exponent_offsets"), 8)
        self.exponents = _aligned(sections.get("exponents"), 4)
        scales = _aligned(sections.get(extra), 2)
        self.extra = scales.view(torch.int16) if extra == "scales" else scales
        self.codebook = sections.get("codebook")

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        """In the order of FIELDS from `bitmap` on, which is that of the kernels' arguments."""
        return (
            self.bitmap,
            self.row_offsets,
            self.values,
            self.exponent_offsets,
            self.exponents,
            self.extra,
            self.codebook,
        )


def _aligned(section: Any, alignment_bytes: int) -> Any:
    """`section`, or a copy where it starts in the middle of a word (a view of foreign memory can)."""
    return section if section is None or section.data_ptr() % alignment_bytes == 0 else section.clone()


class Operand:
    """What launches for one packed tensor have in common. It does not keep the `PackedTensor` alive.

    Attributes:
        sections: in the order of the kernels' arguments.
        sizes: rows, cols, row_block, nnz, exponent_bytes and group_columns, in that order.
        constants: see `Launch`.
        decode_options: all keyword arguments of `decode_kernel`.
        own_copies: whether a section had to be copied to be aligned; an operand then shows the contents at
            the time it was made.
    """

    def __init__(self, packed: PackedTensor) -> None:
        layout = packed.layout
        launch, g = Launch(layout), layout.geometry
        self.layout = layout
        self.device = packed.device
        self.sections = Sections(packed).all
        self.own_copies = _places(self.sections) - _places(tuple(packed.sections.values())) != set()
        extras = (layout.params.get("exponent_bytes", 0), layout.params.get("group_columns", 1))
        self.sizes = (g.rows, g.cols, g.row_block, layout.nnz, *extras)
        self.element = launch.element
        self.constants = launch.constants
        self.decode_options = {**launch.constants, **tile_options(TILE_LANES)}
        self.decoder: Any = None
        """What `triton_launch` keeps for decoding this weight."""
        self.product: Any = None
        """What `triton_matmul` keeps for products with this weight."""


def _places(sections: tuple[Tensor | None, ...]) -> set[int]:
    return {section.data_ptr() for section in sections if section is not None}


@dataclass(frozen=True)
class _Remembered:
    """An operand, and what it was made for: a number can be the id of one object after another, and the
    memory of sections can be exchanged."""

    made_for: weakref.ref[PackedTensor]
    places: list[int]
    operand: Operand


_operands: dict[int, _Remembered] = {}


def operand_of(packed: PackedTensor) -> Operand:
    """The operand of a packed tensor that is not plain: made at the first call, then remembered."""
    key = id(packed)
    remembered = _operands.get(key)
    places = [section.data_ptr() for section in packed.sections.values()]
    if remembered is not None and remembered.made_for() is packed and remembered.places == places:
        return remembered.operand
    operand = Operand(packed)
    if not operand.own_copies:
        made_for = weakref.ref(packed, lambda _: _operands.pop(key, None))
        _operands[key] = _Remembered(made_for, places, operand)
    return operand


def tile_options(lanes: int) -> dict[str, Any]:
    """Arguments that every launch with tiles of so many lanes takes."""
    return {"T": lanes, "num_warps": max(lanes // LANES_PER_WARP, 1), **OPTIONS}

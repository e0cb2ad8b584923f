"""What a values codec is to the format: a name, the sections it stores, and the rules their contents obey.

Encoding and decoding are kernels (`endor.kernels`); a codec here only says what the bytes mean. A new codec
is a new file in this folder and a line in the registry: header, writer, reader and verifier do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from endor.errors import FormatError
from endor.formats.layout import Geometry

__all__ = ["BlockRun", "Codec", "Params", "SectionPart", "SectionSpec", "ValuesContext", "ValuesSlice"]

Params = Mapping[str, int]
"""Integers a codec needs to know the sizes of its sections; they stand in the header."""


@dataclass(frozen=True)
class SectionSpec:
    """One section of an entry: its name, element type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class ValuesContext:
    """What a codec may rely on to size its sections."""

    geometry: Geometry
    dtype: torch.dtype
    mask: str
    nnz: int
    params: Params


@dataclass(frozen=True)
class BlockRun:
    """Row blocks [start, stop) of a tensor: their rows [first_row, stop_row), their values [first_value,
    stop_value)."""

    start: int
    stop: int
    first_row: int
    stop_row: int
    first_value: int
    stop_value: int

    @property
    def rows(self) -> int:
        return self.stop_row - self.first_row

    @property
    def nnz(self) -> int:
        return self.stop_value - self.first_value


@dataclass(frozen=True)
class SectionPart:
    """Bits [begin_bits, end_bits) of a section, and whole bytes behind them that a decoder may load."""

    section: str
    begin_bits: int
    end_bits: int
    slack_bytes: int = 0


@dataclass(frozen=True)
class ValuesSlice:
    """A codec's part of a run of row blocks.

    Attributes:
        params: of the run alone.
        parts: of the entry's sections that hold the run.
        ready: sections of the run that need no reading.
    """

    params: Params
    parts: tuple[SectionPart, ...]
    ready: Mapping[str, torch.Tensor]


class Codec(ABC):
    """How the values that the mask keeps are stored."""

    name: ClassVar[str]
    lossless: ClassVar[bool]
    index_sections: ClassVar[tuple[str, ...]] = ()
    """The small sections that say where rows lie in the others: who reads runs of rows has them in memory."""

    @abstractmethod
    def supports(self, dtype: torch.dtype, mask: str) -> bool:
        """Whether weights of `dtype` can be stored with this codec under `mask`."""

    @abstractmethod
    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        """The sections that hold the values, in file order. Raises FormatError for params that cannot be."""

    def check(  # noqa: B027 - most codecs have nothing to add
        self, values: ValuesContext, sections: Mapping[str, torch.Tensor]
    ) -> None:
        """Check the contents of the sections beyond their sizes. Raises FormatError."""

    def slice(
        self,
        values: ValuesContext,  # noqa: ARG002 - a codec without random access has no use for these
        index: Mapping[str, torch.Tensor],  # noqa: ARG002
        run: BlockRun,  # noqa: ARG002
    ) -> ValuesSlice:
        """Where the values of a run of row blocks are.

        Args:
            values: of the whole tensor.
            index: the sections `index_sections`, whose contents may be anything.
            run: lies inside the tensor.

        Raises FormatError where `index` points outside the sections, or if the codec has no random access.
        """
        raise FormatError(f"codec {self.name} cannot be read by rows: read the whole tensor")

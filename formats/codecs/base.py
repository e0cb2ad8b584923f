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

from endor.formats.layout import Geometry

__all__ = ["Codec", "Params", "SectionSpec", "ValuesContext"]

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


class Codec(ABC):
    """How the values that the mask keeps are stored."""

    name: ClassVar[str]
    lossless: ClassVar[bool]

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

"""An Endor checkpoint for people: names, packed tensors and dense tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Self

import torch

from endor.formats.packed import DENSE_SECTION
from endor.formats.reader import CheckpointReader
from endor.kernels.dispatch import decode
from endor.kernels.tensor import BitmapTensor

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint(CheckpointReader):
    """An open checkpoint whose tensors are read when asked for; every read is checked against its
    checksum."""

    def __enter__(self) -> Self:
        return self

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.aliases

    def __getitem__(self, name: str) -> torch.Tensor:
        """A BitmapTensor, or an ordinary tensor where the entry is stored as it is. Raises KeyError."""
        packed = self.read(name)
        if packed.layout.is_plain:
            return packed.sections[DENSE_SECTION]
        return BitmapTensor(packed.layout, packed)

    def read_dense(self, name: str) -> torch.Tensor:
        """The dense tensor, bit-exact. Raises KeyError."""
        packed = self.read(name)
        return packed.sections[DENSE_SECTION] if packed.layout.is_plain else decode(packed)


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open the Endor checkpoint in `directory`; all headers are checked now, payloads when they are read.

    Raises LoadError for missing files, FormatError for damaged ones.
    """
    return Checkpoint(directory)

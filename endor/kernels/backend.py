"""What a kernel backend is: something that turns dense tensors into packed ones and back, bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from endor.formats.packed import PackedTensor, TensorLayout

__all__ = ["Backend"]


class Backend(ABC):
    """One implementation of every kernel.

    Callers go through `endor.kernels`, which has already checked dtypes, shapes, devices and contiguity; a
    backend checks only what it alone can see: the contents of the sections, which come from files and may
    lie.
    """

    name: str

    @abstractmethod
    def supports(self, codec: str, device: torch.device) -> bool:
        """Whether this backend can encode and decode `codec` on `device`."""

    def is_default_on(self, device: torch.device) -> bool:  # noqa: ARG002 - most backends always are
        """Whether it may be chosen on `device` by a caller who names no backend."""
        return True

    @abstractmethod
    def encode(self, weight: torch.Tensor, codec: str, *, mask: str = "bitmap") -> PackedTensor:
        """Pack a contiguous `weight`; never raw under mask `dense`, which is a copy."""

    @abstractmethod
    def decode(self, packed: PackedTensor, start_block: int, stop_block: int, out: torch.Tensor) -> None:
        """Write row blocks [start_block, stop_block) of a tensor that is not plain to the contiguous `out`.

        Raises FormatError where the sections contradict each other; `out` is then undefined.
        """


def rows_of(layout: TensorLayout, start_block: int, stop_block: int) -> range:
    """The rows of row blocks [start_block, stop_block)."""
    g = layout.geometry
    return range(min(start_block * g.row_block, g.rows), min(stop_block * g.row_block, g.rows))

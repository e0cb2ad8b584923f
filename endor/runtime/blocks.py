"""A block of a model whose weights are packed: which bytes it needs, and how its weights get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from torch import nn

from endor.formats.checksums import tensor_bytes, verify_block, verify_section
from endor.formats.entries import Section
from endor.formats.packed import PackedTensor
from endor.formats.reader import BlockRange
from endor.kernels.tensor import BitmapTensor
from endor.loaders import ReadOp, Unit
from endor.runtime.slices import Table

__all__ = ["WeightBlock"]

_WORTH_A_READ_BYTES: Final = 64 << 10
"""Shorter gaps are read and thrown away."""


@dataclass(frozen=True)
class WeightBlock:
    """A block whose weights are packed.

    Attributes:
        module: that runs it.
        home: its bytes on disk.
        weights: by entry name.
        left_out: entries of the block that are read in parts, by others.
        table: set if the block is a head that is not resident: it is then read tile by tile.
    """

    module: nn.Module
    home: BlockRange
    weights: Mapping[str, BitmapTensor]
    left_out: frozenset[str] = frozenset()
    table: Table | None = None
    _views: dict[int, dict[str, PackedTensor]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.home.block.name

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(end - begin for begin, end in self.runs)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """The ranges [begin, end) of the payload that are read: one, but for what is left out."""
        block = self.home.block
        if not self.left_out:
            return ((block.begin, block.end),)
        kept = [entry for entry in block.entries if entry.name in self.weights]
        runs: list[tuple[int, int]] = []
        for section in (section for entry in kept for section in entry.sections):
            begin, end = section.begin, section.end
            if runs and begin - runs[-1][1] <= _WORTH_A_READ_BYTES:
                begin = runs.pop()[0]
            runs.append((begin, end))
        return tuple((begin, end) for begin, end in runs if end > begin)

    def attach(self, parts: Sequence[torch.Tensor]) -> None:
        """Give every weight its sections.

        A ring has few places for a block, so the views of each are made once: they would cost 0.2 ms per
        block.

        Args:
            parts: uint8, the bytes of `runs`.
        """
        views = self._views.get(parts[0].data_ptr())
        if views is None:
            views = self._views[parts[0].data_ptr()] = self._unpack(parts)
        for name, packed in views.items():
            self.weights[name].attach(packed)

    def _unpack(self, parts: Sequence[torch.Tensor]) -> dict[str, PackedTensor]:
        if not self.left_out:
            return self.home.block.unpack(parts[0], names=self.weights)
        views = {}
        for entry in (entry for entry in self.home.block.entries if entry.name in self.weights):
            raw = [self._bytes_of(section, parts) for section in entry.sections]
            pairs = zip(entry.layout.sections, raw, strict=True)
            sections = {spec.name: part.view(spec.dtype).view(spec.shape) for spec, part in pairs}
            views[entry.name] = PackedTensor(entry.layout, sections)
        return views

    def _bytes_of(self, section: Section, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        for (begin, end), part in zip(self.runs, parts, strict=True):
            if begin <= section.begin and section.end <= end:
                return part[section.begin - begin : section.end - begin]
        return parts[0][:0]

    def verify(self, parts: Sequence[torch.Tensor]) -> None:
        """Compare what was read with the checksums. Raises ChecksumError."""
        file = str(self.home.file)
        if not self.left_out:
            return verify_block(self.home.block, tensor_bytes(parts[0]), file=file)
        for entry in (entry for entry in self.home.block.entries if entry.name in self.weights):
            for section in entry.sections:
                verify_section(entry, section, tensor_bytes(self._bytes_of(section, parts)), file=file)
        return None

    def forget(self) -> None:
        """Detach, and drop every view of memory that is about to go."""
        self.detach()
        self._views.clear()

    def detach(self) -> None:
        for weight in self.weights.values():
            weight.detach_sections()

    def unit(self) -> Unit:
        payload_begin = self.home.offset - self.home.block.begin
        return Unit(
            self.name,
            tuple(ReadOp(self.home.file, payload_begin + begin, end - begin) for begin, end in self.runs),
        )

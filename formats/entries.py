"""What a shard holds: sections within entries within blocks within a header, each valid from construction on.

All offsets count from the start of the payload, which is the first byte behind the safetensors header.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch

from endor.errors import FormatError
from endor.formats.layout import BLOCK_ALIGNMENT_BYTES, PADDING_PREFIX, SECTION_ALIGNMENT_BYTES
from endor.formats.packed import DENSE_SECTION, PackedTensor, TensorLayout
from endor.formats.strict_json import short

__all__ = ["Block", "Header", "Section", "TensorEntry", "check_unique_names", "section_tensor_name"]


def section_tensor_name(entry: str, section: str) -> str:
    """The name that `section` of `entry` has in the safetensors file."""
    return entry if section == DENSE_SECTION else f"{entry}.{section}"


@dataclass(frozen=True)
class Section:
    """Where one section lies: bytes [begin, end) of the payload, and the xxh3-64 of them."""

    name: str
    begin: int
    end: int
    checksum: int

    def __post_init__(self) -> None:
        if self.begin % SECTION_ALIGNMENT_BYTES:
            raise FormatError(
                f"section {self.name} starts at {self.begin}, not on {SECTION_ALIGNMENT_BYTES} bytes [F12]"
            )

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its name, the other names it goes by (tied weights), its layout and its sections."""

    name: str
    aliases: tuple[str, ...]
    layout: TensorLayout
    sections: tuple[Section, ...]

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            _check_name(name)
        if not self.layout.is_plain and not self.layout.geometry.numel:
            raise FormatError(
                f"entry {short(self.name)} has no elements and must be stored dense and raw [F11]"
            )
        if [(s.name, s.nbytes) for s in self.sections] != [(s.name, s.nbytes) for s in self.layout.sections]:
            raise FormatError(f"entry {short(self.name)}: the sections do not have the layout's sizes [F12]")

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def section_tensor_name(self, section: str) -> str:
        """The name the section has in the safetensors file."""
        return section_tensor_name(self.name, section)

    def tensor_names(self) -> Iterator[str]:
        """The names of all its sections in the safetensors file."""
        return (section_tensor_name(self.name, section.name) for section in self.sections)


@dataclass(frozen=True)
class Block:
    """A contiguous range of the payload that is streamed as a unit: [begin, end), both multiples of 4096."""

    name: str
    begin: int
    end: int
    entries: tuple[TensorEntry, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise FormatError("a block needs a name [F9]")
        if self.begin % BLOCK_ALIGNMENT_BYTES or self.end % BLOCK_ALIGNMENT_BYTES or self.begin >= self.end:
            raise FormatError(
                f"block {short(self.name)} is [{self.begin}, {self.end}): expected whole pages of "
                f"{BLOCK_ALIGNMENT_BYTES} bytes, at least one [F9]"
            )
        self._check_order()

    def _check_order(self) -> None:
        """Check that the sections lie inside the block, in order, with little filler between."""
        position = self.begin
        for entry in self.entries:
            for section in entry.sections:
                where = (
                    f"entry {short(entry.name)}, section {section.name} at [{section.begin}, {section.end})"
                )
                if not self.begin <= section.begin <= section.end <= self.end:
                    raise FormatError(
                        f"{where} lies outside its block {short(self.name)}, [{self.begin}, {self.end}) [F12]"
                    )
                if section.begin < position:
                    raise FormatError(
                        f"{where} lies before the section that the header lists before it [F12]"
                    )
                _check_gap(position, section.begin, where)
                position = section.end
        _check_gap(position, self.end, f"the end of block {short(self.name)}")

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def padding(self) -> Iterator[tuple[int, int]]:
        """The ranges [begin, end) of the payload between sections and behind the last."""
        position = self.begin
        for entry in self.entries:
            for section in entry.sections:
                if section.begin > position:
                    yield position, section.begin
                position = section.end
        if self.end > position:
            yield position, self.end

    def unpack(self, memory: torch.Tensor, *, names: Container[str] | None = None) -> dict[str, PackedTensor]:
        """The block's tensors as views of `memory`, uint8 [nbytes], that holds the block's bytes.

        Args:
            memory: starts on a multiple of 64 bytes, as every allocator's memory does.
            names: of the entries that are wanted; all by default.

        Raises FormatError if `memory` has another size.
        """
        if memory.dtype != torch.uint8 or tuple(memory.shape) != (self.nbytes,):
            raise FormatError(
                f"block {self.name} needs a buffer of uint8 [{self.nbytes}], found {memory.dtype} "
                f"{list(memory.shape)}"
            )
        wanted = [entry for entry in self.entries if names is None or entry.name in names]
        return {entry.name: self._unpack_entry(entry, memory) for entry in wanted}

    def _unpack_entry(self, entry: TensorEntry, memory: torch.Tensor) -> PackedTensor:
        tensors = {}
        for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
            raw = memory[section.begin - self.begin : section.end - self.begin]
            tensors[spec.name] = raw.view(spec.dtype).view(spec.shape)
        return PackedTensor(entry.layout, tensors)


def _check_name(name: str) -> None:
    if not name or name.startswith(PADDING_PREFIX) or name == "__metadata__":
        raise FormatError(f"{name!r} cannot be the name of an entry [F10]")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{name!a} cannot be the name of an entry: it is not Unicode [F10]") from None


def _check_gap(begin: int, end: int, where: str) -> None:
    if end - begin > BLOCK_ALIGNMENT_BYTES:
        raise FormatError(
            f"{end - begin} bytes of padding before {where}; at most {BLOCK_ALIGNMENT_BYTES} [F12]"
        )


@dataclass(frozen=True)
class Header:
    """A valid header.

    Attributes:
        payload_begin: file offset of the payload, a multiple of 4096.
        payload_bytes: size of the payload; the file ends behind it.
        blocks: in file order, which is execution order.
    """

    payload_begin: int
    payload_bytes: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if self.payload_begin % BLOCK_ALIGNMENT_BYTES or not self.payload_begin:
            raise FormatError(
                f"the payload starts at byte {self.payload_begin}, not on a multiple of "
                f"{BLOCK_ALIGNMENT_BYTES} [F2]"
            )
        position = 0
        for block in self.blocks:
            if block.begin != position:
                raise FormatError(
                    f"block {short(block.name)} starts at {block.begin}, expected {position} [F9]"
                )
            position = block.end
        if position != self.payload_bytes:
            raise FormatError(f"the blocks end at {position}, the payload at {self.payload_bytes} [F9]")
        check_unique_names({"": self.blocks})

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        return MappingProxyType({entry.name: entry for block in self.blocks for entry in block.entries})

    @property
    def file_bytes(self) -> int:
        return self.payload_begin + self.payload_bytes


def check_unique_names(blocks_of: Mapping[str, tuple[Block, ...]]) -> None:
    """Check that no name means two things: entries, aliases and sections share one set, blocks have their
    own.

    Args:
        blocks_of: the blocks of each file; several files make one checkpoint.

    Raises FormatError.
    """
    tensors: dict[str, str] = {}
    blocks: dict[str, str] = {}
    for file, members in blocks_of.items():
        for block in members:
            _claim(blocks, block.name, "block name", file)
            for entry in block.entries:
                for name in {entry.name, *entry.tensor_names()}:
                    _claim(tensors, name, "name", file)
                for name in entry.aliases:
                    _claim(tensors, name, "name", file)


def _claim(seen: dict[str, str], name: str, what: str, file: str) -> None:
    if name in seen:
        where = f" in {seen[name]} and {file}" if file else ""
        raise FormatError(f"the {what} {short(name)} is used twice{where} [F14]")
    seen[name] = file

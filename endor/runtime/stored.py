"""Where a tensor lies on disk: a byte range of a file, whoever wrote the file.

A weight that is offloaded needs no format of its own: safetensors and raw numpy files hold a tensor's bytes
in one piece. `locate_safetensors` reads the ranges from a file's header, `MappedFiles` finds the range behind
a tensor that is mapped from a file, as `from_pretrained` leaves them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from endor.errors import FormatError, LoadError
from endor.formats.dtypes import parse_dtype
from endor.formats.layout import HEADER_LIMIT_BYTES, PREFIX_BYTES
from endor.formats.packed import PackedTensor, TensorLayout
from endor.formats.strict_json import load_object
from endor.kernels.tensor import BitmapTensor, Scratch

__all__ = ["MappedFiles", "StoredTensor", "locate_safetensors"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes: `nbytes` of `file` from `offset_bytes` on.

    Attributes:
        shape: of the tensor.
        dtype: of the bytes.
        wanted: the dtype the model computes with; conversion happens after each read.
        layout: of a packed tensor; its sections lie `sections` bytes behind the offset.
    """

    file: Path
    offset_bytes: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    wanted: torch.dtype
    layout: TensorLayout | None = None
    sections: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.layout is None and self.nbytes != math.prod(self.shape) * self.dtype.itemsize:
            raise FormatError(
                f"{self.file}: a tensor of shape {list(self.shape)} and {self.dtype} has "
                f"{math.prod(self.shape) * self.dtype.itemsize} bytes, found {self.nbytes}"
            )

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.nbytes

    def converted(self, wanted: torch.dtype) -> StoredTensor:
        """The same bytes for a model that computes in `wanted`; integers stay what they are."""
        return replace(self, wanted=wanted if self.dtype.is_floating_point else self.dtype)

    def tensor(self, memory: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
        """The tensor over `memory`, uint8 [nbytes]: a view of it wherever dtype and alignment allow one."""
        if self.layout is not None:
            return self._packed(memory, scratch)
        if memory.data_ptr() % self.dtype.itemsize or memory.storage_offset() % self.dtype.itemsize:
            memory = memory.clone()  # files older than the alignment rule of safetensors
        dense = memory.view(self.dtype).view(self.shape) if self.nbytes else self._empty()
        return dense if self.wanted == self.dtype else dense.to(self.wanted)

    def _empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)

    def _packed(self, memory: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
        assert self.layout is not None
        views: dict[str, torch.Tensor] = {}
        places = dict(self.sections)
        for spec in self.layout.sections:
            start = places[spec.name]
            views[spec.name] = memory[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)
        return BitmapTensor(self.layout, PackedTensor(self.layout, views), dtype=self.wanted, scratch=scratch)


def locate_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, from its header alone.

    Raises:
        LoadError: the file cannot be read.
        FormatError: the header is damaged, or does not fit the size of the file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(PREFIX_BYTES), "little")
            if length > min(HEADER_LIMIT_BYTES, file_bytes - PREFIX_BYTES):
                raise FormatError(f"{path}: expected a safetensors file, found a header of {length} bytes")
            table = load_object(file.read(length), where=f"{path}: the header")
    except OSError as error:
        raise LoadError(f"cannot read the header of {path}: {error.strerror}", errno=error.errno) from error
    table.pop("__metadata__", None)
    begin = PREFIX_BYTES + length
    return {name: _row(path, name, row, begin, file_bytes) for name, row in table.items()}


def _row(path: Path, name: str, row: Any, payload_begin: int, file_bytes: int) -> StoredTensor:
    where = f"{path}: tensor {name!r}"
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, found {row!r}") from None
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or end < begin:
        raise FormatError(f"{where}: expected non-negative integers, found {row!r}")
    if payload_begin + end > file_bytes:
        raise FormatError(
            f"{where} ends at byte {payload_begin + end} and the file at {file_bytes}: it was cut short; "
            "download or copy it again"
        )
    parsed = parse_dtype(dtype, where=where)
    return StoredTensor(path, payload_begin + begin, end - begin, shape, parsed, parsed)


@dataclass(frozen=True)
class _Mapping:
    """One line of /proc/self/maps that has a file behind it."""

    begin: int
    end: int
    offset_bytes: int
    device: int
    inode: int
    path: Path


_MAPS_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)$", re.MULTILINE
)


class MappedFiles:
    """The files this process has mapped privately and not written to since: a snapshot.

    A mapping with pages of its own was written to, so its memory may differ from the file and is left out.
    """

    def __init__(self) -> None:
        self._mappings = sorted(_unwritten_mappings(), key=lambda mapping: mapping.begin)
        self._tables: dict[Path, Mapping[int, StoredTensor]] = {}

    def locate(self, tensor: torch.Tensor) -> StoredTensor | None:
        """Where a contiguous CPU tensor is mapped from, if that is a whole tensor of a safetensors file."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.nbytes:
            return None
        address = tensor.data_ptr()
        for mapping in self._mappings:
            if mapping.begin <= address and address + tensor.nbytes <= mapping.end:
                return self._at(mapping, address - mapping.begin + mapping.offset_bytes, tensor)
        return None

    def _at(self, mapping: _Mapping, offset_bytes: int, tensor: torch.Tensor) -> StoredTensor | None:
        stored = self._table(mapping).get(offset_bytes)
        if stored is None or (stored.dtype, stored.shape) != (tensor.dtype, tuple(tensor.shape)):
            return None
        return stored

    def _table(self, mapping: _Mapping) -> Mapping[int, StoredTensor]:
        table = self._tables.get(mapping.path)
        if table is None:
            table = self._tables[mapping.path] = _table_of(mapping)
        return table


def _table_of(mapping: _Mapping) -> Mapping[int, StoredTensor]:
    """The tensors of a mapped file by their offset; none if the path now leads to another file."""
    try:
        status = mapping.path.stat()
        if (status.st_dev, status.st_ino) != (mapping.device, mapping.inode):
            return {}
        tensors = locate_safetensors(mapping.path).values()
        return {stored.offset_bytes: stored for stored in tensors if stored.nbytes}
    except (OSError, FormatError):
        return {}


def _unwritten_mappings() -> Iterator[_Mapping]:
    try:
        text = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux: nothing is known, everything is written once more
        return
    lines = list(_MAPS_LINE.finditer(text))
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        begin, end, rights, offset, major, minor, inode, path = line.groups()
        counts = text[line.end() : following.start() if following else len(text)]
        written = re.search(r"^Anonymous: +(\d+) kB$", counts, re.MULTILINE)  # the first is this mapping's
        if path.endswith(".safetensors") and rights.endswith("p") and written and written[1] == "0":
            device = os.makedev(int(major, 16), int(minor, 16))
            yield _Mapping(int(begin, 16), int(end, 16), int(offset, 16), device, int(inode), Path(path))

"""Files that hold the weights of a Hugging Face checkpoint: what is in them is known without reading the
weights.

Tensors of safetensors files are read with pread into fresh memory. A mapped file would be quicker to write
down, but a file truncated while it is mapped kills the process with SIGBUS, and every page touched counts as
resident memory.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from endor.errors import ConvertError, FormatError
from endor.formats.dtypes import parse_dtype
from endor.formats.layout import HEADER_LIMIT_BYTES
from endor.formats.strict_json import load_object

__all__ = ["SafetensorsFile", "SourceTensor", "TorchFile", "WeightFile", "open_weight_file"]


@dataclass(frozen=True)
class SourceTensor:
    """What a checkpoint says about one of its tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


class WeightFile(ABC):
    """An open file of weights; a context manager."""

    path: Path
    tensors: Mapping[str, SourceTensor]
    resident_bytes: int = 0
    """Memory the file itself occupies for as long as it is open."""

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in memory of its own. Raises ConvertError."""

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_weight_file(path: Path) -> WeightFile:
    """Open a safetensors file, or else a file that torch.save wrote. Raises ConvertError."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class SafetensorsFile(WeightFile):
    """A safetensors file. Its header is checked, against the file's size too, before anything relies on
    it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConvertError(f"cannot open {path}: {error.strerror}") from error
        try:
            self.tensors, self._offsets = _read_table(self._fd, path)
        except FormatError as error:
            self.close()
            raise ConvertError(f"{error}. Download or copy the file again") from None
        except OSError as error:
            self.close()
            raise ConvertError(f"cannot read {path}: {error.strerror}") from error

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        # numpy asks the system for huge pages, torch does not: 7 GB/s instead of 2 from the page cache.
        raw = torch.from_numpy(np.empty(max(tensor.nbytes, 1), np.uint8))[: tensor.nbytes]
        view, offset, done = raw.numpy().data, self._offsets[name], 0
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise ConvertError(f"{self.path}: cannot read tensor {name!r}: {error.strerror}") from error
            if n == 0:
                raise ConvertError(
                    f"{self.path}: the file ends at byte {offset + done}, inside tensor {name!r}; it was "
                    "truncated after the conversion started"
                )
            done += n
        return raw.view(tensor.dtype).view(tensor.shape)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _read_table(fd: int, path: Path) -> tuple[dict[str, SourceTensor], dict[str, int]]:
    """Tensors by name, and where the bytes of each begin in the file."""
    file_bytes = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > HEADER_LIMIT_BYTES:
        raise FormatError(f"{path}: not a safetensors file ({file_bytes} bytes, no sensible header length)")
    if 8 + length > file_bytes:
        raise FormatError(
            f"{path}: the header ends at byte {8 + length} but the file has {file_bytes}; it is truncated"
        )
    table = load_object(os.pread(fd, length, 8), where=f"{path}: the header")
    table.pop("__metadata__", None)
    spans = {name: _span(name, row, path) for name, row in table.items()}
    position = 8 + length
    offsets = {}
    for name, (tensor, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if 8 + length + begin != position or end - begin != tensor.nbytes:
            raise FormatError(
                f"{path}: tensor {name!r} at [{begin}, {end}) overlaps another, leaves a hole or has a wrong "
                "size"
            )
        offsets[name] = position
        position += tensor.nbytes
    if position != file_bytes:
        what = "truncated" if file_bytes < position else "damaged"
        raise FormatError(f"{path}: expected a file of {position} bytes, found {file_bytes}; it is {what}")
    return {name: tensor for name, (tensor, _, _) in spans.items()}, offsets


def _span(name: str, row: object, path: Path) -> tuple[SourceTensor, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        raise FormatError(f"{where}: expected dtype, shape and data_offsets")
    numbers = [row["shape"], row["data_offsets"]]
    if not all(isinstance(n, list) and all(type(i) is int and 0 <= i < 2**62 for i in n) for n in numbers):
        raise FormatError(f"{where}: shape and data_offsets must be lists of non-negative integers")
    if len(row["data_offsets"]) != 2:
        raise FormatError(f"{where}: data_offsets must be two integers")
    tensor = SourceTensor(name, tuple(row["shape"]), parse_dtype(row["dtype"], where=where))
    return tensor, row["data_offsets"][0], row["data_offsets"][1]


class TorchFile(WeightFile):
    """A `pytorch_model*.bin`, mapped; only plain tensors are unpickled (`weights_only`).

    Files that torch < 1.6 wrote cannot be mapped: they are loaded whole, and `resident_bytes` says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.resident_bytes = 0 if _is_zip(path) else path.stat().st_size
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=not self.resident_bytes)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConvertError(
                f"{path}: not a file of weights that torch can load, or truncated ({reason}). Download or "
                "copy it again"
            ) from error
        self._loaded = _only_tensors(loaded, path)
        self.tensors = {name: SourceTensor(name, tuple(t.shape), t.dtype) for name, t in self._loaded.items()}

    def read(self, name: str) -> torch.Tensor:
        mapped = self._loaded[name].detach()
        copy = mapped.clone(memory_format=torch.contiguous_format)
        if not self.resident_bytes:
            _drop_pages(mapped)
        return copy

    def close(self) -> None:
        self._loaded = {}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _only_tensors(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ConvertError(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise ConvertError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
        tensors[name] = value
    return tensors


def _drop_pages(mapped: torch.Tensor) -> None:
    """Take the pages of a mapped tensor out of resident memory; they are clean, so a later read gets them
    again."""
    if not sys.platform.startswith("linux"):
        return
    page = os.sysconf("SC_PAGE_SIZE")
    begin = -(-mapped.data_ptr() // page) * page
    length = mapped.data_ptr() + mapped.numel() * mapped.element_size() - begin
    if length > 0:
        libc: Any = ctypes.CDLL(None)
        madv_dontneed = 4
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), madv_dontneed)

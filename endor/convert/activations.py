"""Hidden states between two blocks, one tensor per batch, in memory or in a file when they are too many."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from endor.errors import ConvertError

__all__ = ["ActivationStore"]


class ActivationStore:
    """Tensors by number, each written as often as wanted; a context manager.

    The file is written and read with pwrite and pread: a mapped one would count as resident memory.

    Args:
        directory: where the file goes if there is one; made for it and removed with it.
        memory_bytes: what may be kept in memory.
        total_bytes: of all tensors; more than `memory_bytes` go to the file.
    """

    def __init__(self, directory: Path, *, memory_bytes: int, total_bytes: int) -> None:
        self._directory = directory
        self.on_disk = total_bytes > memory_bytes
        self._kept: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._fd = -1

    def __enter__(self) -> Self:
        if self.on_disk:
            try:
                self._directory.mkdir(exist_ok=True)
                # Unlinked at once, so that no way of dying leaves it behind.
                self._fd, name = tempfile.mkstemp(dir=self._directory)
                Path(name).unlink()
                self._directory.rmdir()
            except OSError as error:
                raise ConvertError(
                    f"cannot keep activations in {self._directory}: {error.strerror}"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        if not self.on_disk:
            self._kept[number] = tensor
            return
        if number not in self._places:
            self._places[number] = (self._end, tensor.shape, tensor.dtype)
            self._end += tensor.nbytes
        view, offset, done = tensor.view(-1).view(torch.uint8).numpy().data, self._places[number][0], 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset + done)
        except OSError as error:
            raise ConvertError(
                f"cannot keep activations in {self._directory}: {error.strerror}. Free some space, raise "
                "--memory or lower --samples, and run again with --resume"
            ) from error

    def __getitem__(self, number: int) -> torch.Tensor:
        if not self.on_disk:
            return self._kept[number]
        offset, shape, dtype = self._places[number]
        raw = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        while done < len(view):
            n = os.preadv(self._fd, [view[done:]], offset + done)
            if n == 0:
                raise ConvertError(f"activations in {self._directory} ended early; the disk may be failing")
            done += n
        return raw.view(dtype).view(shape)

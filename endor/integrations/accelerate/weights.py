"""Offloaded weights by name: some in memory, some on disk, read when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import offload as theirs

from endor.errors import LoadError, PlanError
from endor.integrations.accelerate.hooks import Device
from endor.runtime.filemap import MappedFile
from endor.runtime.stored import StoredTensor, locate_safetensors

__all__ = ["INDEX_NAME", "OffloadedWeightsLoader", "locate_index", "read_index"]

INDEX_NAME = "index.json"


class OffloadedWeightsLoader(theirs.OffloadedWeightsLoader):  # type: ignore[misc]  # accelerate has no types
    """A mapping from names to weights, in memory or on disk.

    Arguments are those of accelerate's class of this name; `stored` names places on disk directly. A value
    from disk is a tensor of its own, every time it is asked for.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: str | os.PathLike[str] | None = None,
        index: Mapping[str, Mapping[str, Any]] | None = None,
        device: Device | None = None,
        *,
        stored: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        if stored is None and state_dict is None and save_folder is None and index is None:
            raise ValueError(
                "Need either a `state_dict`, a `save_folder` or an `index` containing offloaded weights."
            )
        self.state_dict = {} if state_dict is None else state_dict
        self.save_folder = save_folder
        if index is None and save_folder is not None and stored is None:
            index = read_index(Path(save_folder))
        self.index = {} if index is None else index
        self.device = device
        self._stored = dict(stored or {})
        self.all_keys = list(dict.fromkeys([*self.state_dict, *self._stored, *self.index]))

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self.state_dict:
            return self.state_dict[key]
        stored = self.place_of(key)
        if stored is None:
            raise KeyError(key)
        tensor = _read(stored)
        return tensor if self.device is None else tensor.to(self.device)

    def __contains__(self, key: object) -> bool:
        return key in self.state_dict or key in self._stored or key in self.index

    def place_of(self, key: str) -> StoredTensor | None:
        """Where a weight lies on disk; None for one in memory."""
        if key in self.state_dict:
            return None
        if key not in self._stored and key in self.index:
            self._stored.update(locate_index(self.index, self.save_folder))
        return self._stored.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all_keys)

    def __len__(self) -> int:
        return len(self.all_keys)


def _read(stored: StoredTensor) -> torch.Tensor:
    if not stored.nbytes:
        return stored.tensor(torch.empty(0, dtype=torch.uint8))
    file = MappedFile(stored.file)
    try:
        return stored.tensor(file.bytes_at(stored.offset_bytes, stored.nbytes).clone())
    finally:
        file.close()


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The index of an offload folder. Raises LoadError."""
    path = folder / INDEX_NAME
    try:
        index: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", errno=error.errno) from error
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    return index


def locate_index(
    index: Mapping[str, Mapping[str, Any]], folder: str | os.PathLike[str] | None
) -> dict[str, StoredTensor]:
    """Places of the weights an index names: in safetensors files, or in the folder as raw `<name>.dat`."""
    tables: dict[Path, dict[str, StoredTensor]] = {}
    places: dict[str, StoredTensor] = {}
    for name, row in index.items():
        if row.get("safetensors_file") is None:
            places[name] = _raw(name, row, folder)
            continue
        path = Path(row["safetensors_file"])
        if path not in tables:
            tables[path] = locate_safetensors(path)
        stored = tables[path].get(row.get("weight_name", name))
        if stored is None:
            raise LoadError(
                f"{path}: expected a tensor {row.get('weight_name', name)!r} for {name!r}, found none"
            )
        places[name] = stored.converted(_dtype(row["dtype"])) if "dtype" in row else stored
    return places


def _raw(name: str, row: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> StoredTensor:
    if folder is None:
        raise PlanError(f"the index names no file for {name!r}, and no offload folder was given")
    path = Path(folder) / f"{name}.dat"
    dtype, shape = _dtype(row["dtype"]), tuple(row["shape"])
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return StoredTensor(path, 0, nbytes, shape, dtype, dtype)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, {"bool": "bool"}.get(name, name.removeprefix("torch.")), None)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"an offload index names dtype {name!r}, which torch does not have")
    return dtype

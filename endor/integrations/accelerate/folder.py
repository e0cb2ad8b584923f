"""An offload folder: one safetensors file per set of weights, named after their bytes.

The name holds a fingerprint of every tensor's name, type, shape and content. So a file that is there is
reused only for the weights it was written from, another model in the same folder gets a file of its own, and
a model that still runs from the first one is not disturbed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import xxhash

from endor.errors import ConvertError, EndorError, LoadError
from endor.formats.checksums import checksum, tensor_bytes
from endor.formats.entries import TensorEntry
from endor.formats.header import read_header
from endor.formats.packed import DENSE_SECTION, PackedTensor
from endor.formats.writer import ShardWriter, atomic_write, header_bytes_bound
from endor.integrations.accelerate.state import host_key
from endor.integrations.accelerate.weights import INDEX_NAME, read_index
from endor.kernels.tensor import BitmapTensor, encode as encode_tensor
from endor.runtime.stored import StoredTensor, locate_safetensors

__all__ = ["write_index", "write_weights"]

_PREFIX = "endor-"


@dataclass(frozen=True)
class _Weight:
    """One tensor to be written, and all its names."""

    names: tuple[str, ...]
    tensor: torch.Tensor

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def identity(self) -> str:
        """What must be the same for a file to be reused."""
        shown = [list(self.names), str(self.tensor.dtype), list(self.tensor.shape)]
        if isinstance(self.tensor, BitmapTensor):
            packed = self.tensor.packed
            return repr(
                [*shown, packed.layout, [checksum(tensor_bytes(t.cpu())) for t in packed.sections.values()]]
            )
        return repr([*shown, checksum(tensor_bytes(self.tensor.detach().cpu().contiguous()))])

    def section_source(self, encoded: Collection[str], values: str) -> PackedTensor | torch.Tensor:
        """What is written: packed already, packed now, or as it is."""
        tensor = self.tensor.detach().cpu()
        if isinstance(self.tensor, BitmapTensor):
            return self.tensor.packed
        if self.name in encoded:
            return encode_tensor(tensor, values=values).packed
        return tensor.contiguous()


def write_weights(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    encode: str | None = None,
    encoded: Collection[str] = (),
) -> dict[str, StoredTensor]:
    """Put `weights` into `folder`, each tensor once, unless they are there already.

    Args:
        folder: made if missing.
        weights: in the order in which they will be used.
        encode: a lossless values codec, or `auto`, for the weights named in `encoded`.
        encoded: names of the weights that may be packed.

    Returns where each of them lies. Raises LoadError where the folder cannot be written.
    """
    unique = _unique(weights)
    packed_names = frozenset(encoded) if encode else frozenset()
    rows = [f"{weight.identity()} {weight.name in packed_names}" for weight in unique]
    digest = xxhash.xxh3_128_hexdigest("\n".join([encode or "", *rows]).encode())
    path = folder / f"{_PREFIX}{digest}.safetensors"
    if not _is_whole(path):
        _write(path, unique, packed_names, encode or "")
    return _places(path, weights)


def _unique(weights: Mapping[str, torch.Tensor]) -> list[_Weight]:
    """Each tensor once, with the names that share it."""
    names: dict[Any, list[str]] = {}
    for name, tensor in weights.items():
        names.setdefault(host_key(tensor), []).append(name)
    return [_Weight(tuple(group), weights[group[0]]) for group in names.values()]


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        read_header(path)
    except EndorError:  # cut short by a full disk or a copy: written again
        return False
    return True


def _write(path: Path, weights: Sequence[_Weight], encoded: Collection[str], values: str) -> None:
    names = [name for weight in weights for name in (*weight.names, weight.module)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ShardWriter(path, header_reserve_bytes=header_bytes_bound(names)) as shard:
            for module, members in _by_module(weights):
                with shard.block(module):
                    for weight in members:
                        source = weight.section_source(encoded, values)
                        shard.add(weight.name, source, aliases=weight.names[1:])
    except ConvertError as error:
        raise LoadError(
            f"the offload folder {path.parent} cannot take the weights: {error.__cause__}"
        ) from error
    except OSError as error:
        raise LoadError(
            f"the offload folder {path.parent} cannot be made: {error.strerror}", errno=error.errno
        ) from error


def _by_module(weights: Sequence[_Weight]) -> Iterator[tuple[str, list[_Weight]]]:
    seen: dict[str, int] = {}
    for module, members in groupby(weights, key=lambda weight: weight.module):
        seen[module] = count = seen.get(module, 0) + 1
        name = module or "(root)"
        yield (name if count == 1 else f"{name} ({count})"), list(members)


def _places(path: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    header, data = read_header(path)
    places: dict[str, StoredTensor] = {}
    for entry in header.entries.values():
        for name in (entry.name, *entry.aliases):
            if name in weights:
                places[name] = _place(path, len(data), entry, weights[name].dtype)
    return places


def _place(path: Path, payload_begin: int, entry: TensorEntry, wanted: torch.dtype) -> StoredTensor:
    layout = entry.layout
    begin, end = entry.sections[0].begin, entry.sections[-1].end
    if layout.is_plain:
        section = next(section for section in entry.sections if section.name == DENSE_SECTION)
        return StoredTensor(
            path,
            payload_begin + section.begin,
            section.end - section.begin,
            layout.shape,
            layout.dtype,
            wanted,
        )
    sections = tuple((section.name, section.begin - begin) for section in entry.sections)
    return StoredTensor(
        path, payload_begin + begin, end - begin, layout.shape, layout.dtype, wanted, layout, sections
    )


def write_index(folder: Path, places: Mapping[str, StoredTensor]) -> None:
    """Write the folder's index as accelerate reads it, unless the one there is another's.

    Args:
        folder: where it goes.
        places: of the weights; packed ones are left out, since accelerate could not read them.
    """
    if not _is_ours(folder):
        return
    names = _names_in_files(places)
    index = {
        name: {
            "safetensors_file": str(stored.file.absolute()),
            "weight_name": names.get(name, name),
            "dtype": str(stored.wanted).removeprefix("torch."),
        }
        for name, stored in places.items()
        if stored.layout is None and stored.file.suffix == ".safetensors"
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / INDEX_NAME, json.dumps(index, indent=2).encode())
    except (ConvertError, OSError) as error:
        raise LoadError(f"the offload folder {folder} cannot be written: {error}") from error


def _names_in_files(places: Mapping[str, StoredTensor]) -> dict[str, str]:
    """What each weight is called in its file."""
    tables: dict[Path, dict[int, str]] = {}
    names: dict[str, str] = {}
    for name, stored in places.items():
        if stored.file.suffix == ".safetensors":
            if stored.file not in tables:
                table = locate_safetensors(stored.file)
                tables[stored.file] = {t.offset_bytes: n for n, t in table.items() if t.nbytes}
            names[name] = tables[stored.file].get(stored.offset_bytes, name)
    return names


def _is_ours(folder: Path) -> bool:
    """Whether the index may be replaced: there is none, or it points to safetensors files only."""
    if not (folder / INDEX_NAME).exists():
        return True
    try:
        return all(row.get("safetensors_file") is not None for row in read_index(folder).values())
    except (LoadError, AttributeError):
        return False

"""`load_checkpoint_in_model` and `load_checkpoint_and_dispatch`: a checkpoint into a model, tensor by tensor.

What the device map sends to disk is not read at all: it stays in its safetensors files, and the model learns
where. Whether the checkpoint fits the model is decided from the names, before the model is touched.
"""

# ruff: noqa: PLR0917 - accelerate's signatures take everything by position

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    find_tied_parameters,
    get_balanced_memory,
    infer_auto_device_map,
    set_module_tensor_to_device,
)
from accelerate.utils.modeling import (
    check_tied_parameters_in_config,
    check_tied_parameters_on_same_device,
    load_checkpoint_in_model as load_with_accelerate,
)
from safetensors import safe_open
from torch import nn

from endor.errors import FormatError, LoadError
from endor.integrations.accelerate.dispatch import dispatch_model, recall_places, remember_places, retie
from endor.integrations.accelerate.folder import write_index, write_weights
from endor.integrations.accelerate.hooks import Device
from endor.integrations.accelerate.placeholder import placeholder
from endor.runtime.stored import StoredTensor, locate_safetensors

__all__ = ["load_checkpoint_and_dispatch", "load_checkpoint_in_model"]

logger = logging.getLogger("accelerate.utils.modeling")

DeviceMap = Mapping[str, Device]
_POLICIES = ("auto", "balanced", "balanced_low_0", "sequential")
_SHOWN = 5


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | DeviceMap | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    no_split_module_classes: list[str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> nn.Module:
    """Load a checkpoint into a model, each part where the device map says, and make it run there.

    Arguments are those of `load_checkpoint_in_model` and `dispatch_model`; a `device_map` of "auto",
    "balanced", "balanced_low_0" or "sequential" is worked out from `max_memory`. Without a map the checkpoint
    is only loaded.
    """
    if isinstance(device_map, str):
        device_map = _worked_out(
            model, device_map, max_memory, no_split_module_classes, dtype, offload_buffers=offload_buffers
        )
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_state_dict=bool(offload_state_dict),
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map=device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
    )


def _worked_out(
    model: nn.Module,
    policy: str,
    max_memory: dict[int | str, int | str] | None,
    no_split_module_classes: list[str] | None,
    dtype: str | torch.dtype | None,
    *,
    offload_buffers: bool,
) -> DeviceMap:
    if policy not in _POLICIES:
        raise ValueError(
            "If passing a string for `device_map`, please choose 'auto', 'balanced', 'balanced_low_0' or "
            f"'sequential'; found {policy!r}."
        )
    if policy != "sequential":
        max_memory = get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=no_split_module_classes,
            dtype=dtype,
            low_zero=policy == "balanced_low_0",
        )
    device_map: DeviceMap = infer_auto_device_map(
        model,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        offload_buffers=offload_buffers,
    )
    return device_map


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: list[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Load a checkpoint into a model, each tensor straight to where the device map says.

    Args:
        model: its weights may be on meta.
        checkpoint: a file of weights, an index of several, or a folder with either.
        device_map: where each part goes; without one every tensor stays where it is in the model.
        offload_folder: for weights on disk that are not in safetensors files.
        dtype: of the floating-point weights; the model's own by default.
        offload_state_dict: has no effect: there never is a whole state dict in memory.
        offload_buffers: whether buffers may go to disk too.
        keep_in_fp32_modules: names of modules that stay in float32 where `dtype` is float16.
        offload_8bit_bnb: bitsandbytes' weights are left to accelerate.
        strict: refuse a checkpoint that lacks a weight of the model or has one it does not know.
        full_state_dict: False is left to accelerate, as is everything distributed.
        broadcast_from_rank0: as above.

    Raises:
        ValueError: the map names the disk without a folder, or leaves a tensor out; as FormatError, the
            checkpoint does not fit the model.
        LoadError: a file cannot be read.
    """
    their_map = None if device_map is None else dict(device_map)
    if offload_8bit_bnb or broadcast_from_rank0 or not full_state_dict:
        load_with_accelerate(
            model, checkpoint, their_map, offload_folder, dtype, offload_state_dict, offload_buffers,
            keep_in_fp32_modules, offload_8bit_bnb, strict, full_state_dict, broadcast_from_rank0,
        )  # fmt: skip
        return
    ties = find_tied_parameters(model)
    _check_ties(model, ties, device_map)
    on_disk = device_map is not None and "disk" in device_map.values()
    if on_disk and offload_folder is None:
        raise ValueError(
            "At least one of the model submodule will be offloaded to disk, please pass along an "
            "`offload_folder`."
        )
    files = [_CheckpointFile(path) for path in _checkpoint_files(Path(checkpoint))]
    names = [name for file in files for name in file.names]
    if any(".SCB" in name for name in names):  # statistics of bitsandbytes
        load_with_accelerate(
            model, checkpoint, their_map, offload_folder, dtype, offload_state_dict, offload_buffers,
            keep_in_fp32_modules, strict=strict,
        )  # fmt: skip
        return
    _check_names(model, names, ties, checkpoint, strict=strict)
    wanted = _dtype_of(dtype)
    loading = _Loading(model, device_map, wanted, tuple(keep_in_fp32_modules or ()), offload_buffers)
    for file in files:
        loading.take(file)
    loading.finish(None if offload_folder is None else Path(offload_folder), ties)
    retie(model, ties)


class _CheckpointFile:
    """One file of weights: names at once, tensors one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_safetensors = path.suffix == ".safetensors"
        self.places: dict[str, StoredTensor] = {}
        if self.is_safetensors:
            self.places = locate_safetensors(path)
            self.names = list(self.places)
            self._check_metadata()
        else:
            self._tensors = _torch_load(path)
            self.names = list(self._tensors)

    def _check_metadata(self) -> None:
        with safe_open(self.path, framework="pt") as opened:
            metadata = opened.metadata() or {"format": "pt"}
        if metadata.get("format", "pt") not in ("pt", "tf", "flax"):
            raise LoadError(f"{self.path}: the metadata names format {metadata['format']!r}, expected 'pt'")

    def items(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of these names; of a safetensors file they are mapped, not read."""
        if not self.is_safetensors:
            for name in names:
                yield name, self._tensors[name]
            return
        with safe_open(self.path, framework="pt", device="cpu") as opened:
            for name in names:
                yield name, opened.get_tensor(name)


def _torch_load(path: Path) -> dict[str, torch.Tensor]:
    """What torch.save wrote. Mapped where the file allows it, so that only what is used is read."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}", errno=error.errno) from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: expected a state dict, found a {type(loaded).__name__}")
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


@dataclass
class _Loading:
    """Puts tensors into a model and remembers what stays on disk."""

    model: nn.Module
    device_map: DeviceMap | None
    dtype: torch.dtype | None
    kept_in_float32: tuple[str, ...]
    offload_buffers: bool

    def __post_init__(self) -> None:
        self._known = set(self.model.state_dict())
        self._buffers = {name for name, _ in self.model.named_buffers()}
        self._places: dict[str, StoredTensor] = {}
        self._names: dict[str, str] = {}
        self._unwritten: dict[str, torch.Tensor] = {}

    def take(self, file: _CheckpointFile) -> None:
        """Load what the model knows of one file."""
        names = [name for name in file.names if name in self._known]
        devices = {name: self._device_of(name) for name in names}
        for name in names:
            if devices[name] == "disk":
                self._leave_on_disk(name, file)
        for name, tensor in file.items([name for name in names if devices[name] != "disk"]):
            self._place(name, tensor if file.is_safetensors else tensor.clone(), devices[name])

    def finish(self, folder: Path | None, ties: Iterable[Iterable[str]]) -> None:
        """Write what is not in safetensors files; note for the dispatch where everything is."""
        if self._unwritten and folder is not None:
            written = write_weights(folder, self._unwritten)
            self._places.update(
                {name: place.converted(self._places_dtype(name)) for name, place in written.items()}
            )
        for group in ties:
            self._leave_with_its_tie(list(group))
        if self._places:
            remember_places(self.model, self._places)
        if folder is not None and self._places:
            write_index(folder, recall_places(self.model))

    def _leave_with_its_tie(self, group: list[str]) -> None:
        """A checkpoint has a tied weight under one of its names; the others are in the same place."""
        found = next((name for name in group if name in self._places), None)
        if found is None:
            return
        for name in group:
            self._places.setdefault(name, self._places[found])
            standing = _tensor(self.model, name)
            if standing.device.type != "meta":
                _replace(self.model, name, placeholder(standing, name=name))

    def _places_dtype(self, name: str) -> torch.dtype:
        return _tensor(self.model, name).dtype

    def _device_of(self, name: str) -> Device | None:
        if self.device_map is None:
            return None
        module = name
        while module and module not in self.device_map:
            module = module.rpartition(".")[0]
        if module not in self.device_map:
            raise ValueError(f"{name} doesn't have any device set.")
        device = self.device_map[module]
        return "cpu" if device == "disk" and name in self._buffers and not self.offload_buffers else device

    def _dtype_for(self, name: str, stored: torch.dtype) -> torch.dtype | None:
        """The dtype to convert to; None for the model's own."""
        if self.dtype is None or not stored.is_floating_point:
            return None
        if self.dtype == torch.float16 and any(
            re.search(rf"(^|\.){re.escape(kept)}(\.|$)", name) for kept in self.kept_in_float32
        ):
            return torch.float32
        return self.dtype

    def _leave_on_disk(self, name: str, file: _CheckpointFile) -> None:
        standing = _tensor(self.model, name)
        if file.is_safetensors:
            stored = file.places[name]
            shape, dtype = stored.shape, stored.dtype
        else:
            tensor = file._tensors[name]
            shape, dtype = tuple(tensor.shape), tensor.dtype
        if shape != tuple(standing.shape):
            raise FormatError(
                f"{file.path}: tensor {name!r} has shape {list(shape)}, the model expects "
                f"{list(standing.shape)}"
            )
        wanted = self._dtype_for(name, dtype) or (dtype if self.dtype is None else standing.dtype)
        _replace(self.model, name, placeholder(standing, name=name, dtype=wanted))
        if file.is_safetensors:
            self._places[name] = file.places[name].converted(wanted)
        else:
            self._unwritten[name] = file._tensors[name]

    def _place(self, name: str, tensor: torch.Tensor, device: Device | None) -> None:
        standing = _tensor(self.model, name)
        if device is None and standing.device.type != "meta" and standing.shape == tensor.shape:
            with torch.no_grad():  # whoever holds the parameter sees the weight
                standing.copy_(tensor)
            return
        if device is None:
            device = "cpu" if standing.device.type == "meta" else standing.device
        if standing.shape != tensor.shape and type(standing) in (nn.Parameter, torch.Tensor):
            raise FormatError(
                f"tensor {name!r} has shape {list(tensor.shape)} in the checkpoint, the model expects "
                f"{list(standing.shape)}"
            )
        set_module_tensor_to_device(
            self.model, name, device, value=tensor, dtype=self._dtype_for(name, tensor.dtype)
        )


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(parent), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _replace(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    holder: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    holder[leaf] = tensor


def _check_ties(model: nn.Module, ties: list[list[str]], device_map: DeviceMap | None) -> None:
    if check_tied_parameters_in_config(model) and not ties:
        logger.warning(
            "The model weights are not tied. Please use the `tie_weights` method before using the "
            "`infer_auto_device` function."
        )
    if device_map is not None:
        check_tied_parameters_on_same_device(ties, device_map)


def _check_names(
    model: nn.Module,
    names: Iterable[str],
    ties: list[list[str]],
    checkpoint: str | os.PathLike[str],
    *,
    strict: bool,
) -> None:
    """Compare the checkpoint's names with the model's; a tied weight is there if one of its names is."""
    expected, found = set(model.state_dict()), set(names)
    unexpected = sorted(found - expected)
    tied_to = {name: set(group) for group in ties for name in group}
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        name
        for name in sorted(expected - found)
        if not tied_to.get(name, set()) & found and not any(pattern.search(name) for pattern in ignored)
    ]
    if strict and (missing or unexpected):
        raise FormatError(
            f"{checkpoint} does not fit {type(model).__name__}: {_listed('missing', missing)}; "
            f"{_listed('unexpected', unexpected)}. Pass strict=False to load what fits"
        )
    if unexpected:
        logger.warning(
            "Some weights of the model checkpoint at %s were not used when initializing %s: %s. This may or "
            "may not be an issue.",
            checkpoint,
            type(model).__name__,
            ", ".join(unexpected),
        )
    if missing:
        logger.warning(
            "The checkpoint at %s has no %s: %s keep the values they had.",
            checkpoint,
            ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else ""),
            "these weights" if len(missing) > 1 else "this weight",
        )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return f"nothing {what}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def _dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{dtype!r} is not a dtype of torch")  # noqa: TRY004 - as torch does for names
        return found
    return dtype


def _checkpoint_files(checkpoint: Path) -> list[Path]:
    """The files of weights behind a path. Raises ValueError where there are none or several readings."""
    if checkpoint.is_file():
        return _indexed_files(checkpoint) if checkpoint.suffix == ".json" else [checkpoint]
    if not checkpoint.is_dir():
        raise ValueError(
            "`checkpoint` should be a file with a whole state dict, the index of a sharded checkpoint, or a "
            f"folder with either, but got {checkpoint}."
        )
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (checkpoint / name).is_file():
            return [checkpoint / name]
    indexes = sorted(checkpoint.glob("*.index.json"))
    if len(indexes) != 1:
        found = "none" if not indexes else ", ".join(path.name for path in indexes)
        raise ValueError(
            f"{checkpoint}: expected pytorch_model.bin, model.safetensors or exactly one .index.json, found "
            f"{found}"
        )
    return _indexed_files(indexes[0])


def _indexed_files(index: Path) -> list[Path]:
    try:
        loaded = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read the index {index}: {error}") from error
    weight_map = loaded.get("weight_map", loaded)
    return [index.parent / name for name in sorted(set(weight_map.values()))]

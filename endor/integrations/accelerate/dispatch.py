"""`cpu_offload`, `disk_offload` and `dispatch_model`: where each part of a model lives, and how it comes."""

# ruff: noqa: PLR0917 - accelerate's signatures take everything by position

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import accelerate.big_modeling
import torch
from accelerate.utils import (
    check_cuda_p2p_ib_support,
    find_tied_parameters,
    is_bnb_available,
    is_mlu_available,
    is_musa_available,
    is_npu_available,
    is_sdaa_available,
    is_xpu_available,
    retie_parameters,
)
from accelerate.utils.modeling import get_non_persistent_buffers
from torch import nn

from endor.errors import PlanError
from endor.formats.dtypes import PACKABLE
from endor.integrations.accelerate.attach import attach_align_device_hook, attach_align_device_hook_on_blocks
from endor.integrations.accelerate.folder import write_index, write_weights
from endor.integrations.accelerate.hooks import (
    AlignDevicesHook,
    CpuOffload,
    Device,
    UserCpuOffloadHook,
    add_hook_to_module,
    align_hooks,
    remove_hook_from_submodules,
)
from endor.integrations.accelerate.state import OffloadState
from endor.integrations.accelerate.weights import INDEX_NAME, OffloadedWeightsLoader, locate_index, read_index
from endor.runtime.offload import OffloadStats, WeightGroup, WeightStream
from endor.runtime.stored import MappedFiles, StoredTensor

__all__ = [
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "offload_stats",
    "recall_places",
    "remember_places",
    "retie",
]

logger = logging.getLogger("accelerate.big_modeling")
"""Theirs: programs that listen for its warnings go on hearing them."""

_PLACES: WeakKeyDictionary[nn.Module, dict[str, StoredTensor]] = WeakKeyDictionary()
"""Where a model's weights are that `load_checkpoint_in_model` left on disk, until it is dispatched."""


def remember_places(model: nn.Module, places: Mapping[str, StoredTensor]) -> None:
    """Note where weights of `model` are, which stay on disk."""
    _PLACES.setdefault(model, {}).update(places)


def recall_places(model: nn.Module) -> dict[str, StoredTensor]:
    """What was noted for `model`."""
    return dict(_PLACES.get(model, {}))


def cpu_offload(
    model: nn.Module,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
    preload_module_classes: list[str] | None = None,
) -> nn.Module:
    """Keep the model's weights in host memory and bring each module's to where it runs for its forward.

    On a CPU they are used where they are.

    Args:
        model: any module; changed in place and returned.
        execution_device: where to compute; where the first parameter is by default.
        offload_buffers: whether buffers are offloaded too.
        state_dict: the weights to use; the model's own by default.
        preload_module_classes: classes whose instances need the weights of all their submodules at once.
    """
    device = _execution_device(model, execution_device)
    if state_dict is None:
        state_dict = _values_of(model)
    ties = find_tied_parameters(model)
    _attach_all(model, device, state_dict, offload_buffers, preload_module_classes)
    retie(model, ties)
    _connect(model, OffloadState(), {})
    return model


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: Device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Bring the whole model to the execution device at its first forward and leave it there.

    Returns the model and a hook whose `offload` sends it back; given as `prev_module_hook` for the next model
    of a pipeline, that happens when the next one runs.
    """
    hook = CpuOffload(execution_device=execution_device, prev_module_hook=prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: list[str] | None = None,
    *,
    encode: str | None = None,
) -> nn.Module:
    """Keep the model's weights on disk and read each module's for its forward, ahead of time.

    Weights that are mapped from safetensors files, as `from_pretrained` leaves them, are read from there.
    Others are written once to `offload_dir`, and found there again by their content.

    Args:
        model: any module; changed in place and returned.
        offload_dir: a folder for what has to be written.
        execution_device: where to compute; where the first parameter is by default.
        offload_buffers: whether buffers are offloaded too.
        preload_module_classes: classes whose instances need the weights of all their submodules at once.
        encode: `auto`, or a values codec, packs the weights of linear layers without loss before they are
            written: fewer bytes to read.

    Raises:
        PlanError: a weight is neither in memory nor in the folder.
        LoadError: the folder cannot be written, or a file cannot be read.
    """
    device = _execution_device(model, execution_device)
    ties = find_tied_parameters(model)
    names = _offloadable(model, offload_buffers=offload_buffers)
    places = _put_on_disk(model, names, Path(offload_dir), encode=encode)
    weights = OffloadedWeightsLoader(stored=places)
    _attach_all(model, device, weights, offload_buffers, preload_module_classes)
    retie(model, ties)
    _connect(model, OffloadState(), places)
    return model


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
    *,
    encode: str | None = None,
) -> nn.Module:
    """Place each part of a model where `device_map` says: on devices, in host memory or on disk.

    Args:
        model: any module; changed in place and returned, with `hf_device_map`.
        device_map: from names of modules or parameters ("" is all) to devices, "cpu" or "disk".
        main_device: where offloaded parts compute; the map's first device by default, else the CPU.
        state_dict: weights of the parts kept in host memory.
        offload_dir: a folder for the weights on disk that have to be written.
        offload_index: where weights on disk are, as transformers and accelerate note it.
        offload_buffers: whether buffers are offloaded too.
        skip_keys: names of arguments that are not moved between devices.
        preload_module_classes: classes whose instances need the weights of all their submodules at once.
        force_hooks: hooks even where one device holds everything.
        encode: as for `disk_offload`.

    Raises:
        ValueError: the map leaves a tensor out, or names the disk without a folder or index.
        PlanError: a weight is neither in memory nor on disk.
        LoadError: a file cannot be written or read.
    """
    accelerate.big_modeling.check_device_map(
        model, dict(device_map)
    )  # there, because transformers replaces it there
    devices = list(dict.fromkeys(device_map.values()))
    if len(devices) > 1 or "disk" in devices or force_hooks or _is_immovable(model):
        _dispatch(
            model,
            device_map,
            main_device=_main_device(devices) if main_device is None else main_device,
            state_dict=state_dict,
            offload_dir=offload_dir,
            offload_index=offload_index,
            offload_buffers=offload_buffers,
            skip_keys=skip_keys,
            preload_module_classes=preload_module_classes,
            encode=encode,
        )
        _warn_about_old_drivers(devices)
    else:
        model.to(_indexed(devices[0]))
    vars(model)["hf_device_map"] = dict(device_map)
    return model


def offload_stats(model: nn.Module) -> OffloadStats:
    """What the model's weights have cost so far. Raises PlanError for one with nothing on disk."""
    for module in model.modules():
        for hook in align_hooks(module):
            if hook.state.stream is not None:
                return hook.state.stream.stats()
    raise PlanError(f"this {type(model).__name__} has no weights on disk that Endor streams")


# Dispatching.


def _dispatch(
    model: nn.Module,
    device_map: Mapping[str, Device],
    *,
    main_device: Device,
    state_dict: dict[str, torch.Tensor] | None,
    offload_dir: str | os.PathLike[str] | None,
    offload_index: Mapping[str, Mapping[str, Any]] | None,
    offload_buffers: bool,
    skip_keys: str | list[str] | None,
    preload_module_classes: list[str] | None,
    encode: str | None,
) -> None:
    on_host = [name for name, device in device_map.items() if str(device) == "cpu"]
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    host_is_main = str(main_device) in ("cpu", "mps")
    if state_dict is None and on_host and not host_is_main:
        state_dict = _below(_values_of(model), on_host)
    if on_disk and offload_dir is None and offload_index is None:
        raise ValueError(
            "We need an `offload_dir` to dispatch this model according to this `device_map`, the following "
            f"submodules need to be offloaded: {', '.join(on_disk)}."
        )
    ties = find_tied_parameters(model)
    places: dict[str, StoredTensor] = {}
    if on_disk:
        names = _below(_offloadable(model, offload_buffers=offload_buffers), on_disk)
        known = {} if offload_index is None else locate_index(offload_index, offload_dir)
        folder = None if offload_dir is None else Path(offload_dir)
        places = _put_on_disk(model, names, folder, known=known, encode=encode)
    weights = OffloadedWeightsLoader(state_dict=state_dict, stored=places) if state_dict or places else None
    offloaded = ("disk",) if host_is_main else ("cpu", "disk")
    _forget_hooks(model)
    attach_align_device_hook_on_blocks(
        model,
        execution_device={
            **{n: main_device if str(d) in ("cpu", "disk") else d for n, d in device_map.items()},
            "": device_map[""] if _stays(device_map.get("")) else main_device,
        },
        offload={name: str(device) in offloaded for name, device in device_map.items()},
        weights_map=weights,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        tied_params_map=_tied_pointers(model, ties),
    )
    where = " and ".join(sorted({str(d) for d in device_map.values()} & {"cpu", "disk"}))
    if where:
        logger.warning("Some parameters are on the meta device because they were offloaded to the %s.", where)
    retie(model, ties)
    _connect(model, OffloadState(), places)
    _guard_moves(model)


def _stays(device: Device | None) -> bool:
    return device is not None and str(device) not in ("cpu", "disk")


def _main_device(devices: Iterable[Device]) -> Device:
    return next((device for device in devices if str(device) not in ("cpu", "disk")), "cpu")


def _is_immovable(model: nn.Module) -> bool:
    """Whether this is a model of bitsandbytes that `to` would refuse."""
    if getattr(model, "quantization_method", "bitsandbytes") != "bitsandbytes":
        return False
    eight = getattr(model, "is_loaded_in_8bit", False) and not is_bnb_available(min_version="0.48.0")
    four = getattr(model, "is_loaded_in_4bit", False) and not is_bnb_available(min_version="0.43.2")
    return bool(eight or four)


def _indexed(device: Device) -> Device:
    """A number as the device it stands for, where torch itself would not know."""
    kinds = {
        "npu": is_npu_available,
        "mlu": is_mlu_available,
        "sdaa": is_sdaa_available,
        "musa": is_musa_available,
    }
    if isinstance(device, int):
        return next((f"{kind}:{device}" for kind, there in kinds.items() if there()), device)
    return device


def _warn_about_old_drivers(devices: Iterable[Device]) -> None:
    several = len([device for device in devices if str(device) not in ("cpu", "disk")]) > 1
    if several and not check_cuda_p2p_ib_support():
        logger.warning(
            "We've detected an older driver with an RTX 4000 series GPU. These drivers have issues with P2P; "
            "please update the driver."
        )


def _tied_pointers(
    model: nn.Module, ties: Iterable[Iterable[str]]
) -> dict[int, dict[torch.device, torch.Tensor]]:
    """One entry per tied weight in memory, under which hooks note what is on which device already."""
    tensors = (model.get_parameter(name) for group in ties for name in group)
    return {tensor.data_ptr(): {} for tensor in tensors if tensor.device.type != "meta"}


class _Guarded:
    """`model.to` and its kind: a warning, and an error where weights are not there to be moved."""

    def __init__(self, model: nn.Module, name: str) -> None:
        functools.update_wrapper(self, getattr(type(model), name))
        self._model, self._name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        moves = self._name != "to" or torch._C._nn._parse_to(*args, **kwargs)[0] is not None
        if moves:
            logger.warning("You shouldn't move a model that is dispatched using accelerate hooks.")
        if any(parameter.device.type == "meta" for parameter in self._model.parameters()):
            raise RuntimeError("You can't move a model that has some modules offloaded to cpu or disk.")
        return getattr(type(self._model), self._name)(self._model, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guarded, (self._model, self._name)


def _guard_moves(model: nn.Module) -> None:
    kinds: dict[str, Callable[[], bool]] = {
        "npu": is_npu_available,
        "mlu": is_mlu_available,
        "sdaa": is_sdaa_available,
        "musa": is_musa_available,
        "xpu": is_xpu_available,
    }
    vars(model)["to"] = _Guarded(model, "to")
    second = next((kind for kind, there in kinds.items() if there() and hasattr(type(model), kind)), "cuda")
    vars(model)[second] = _Guarded(model, second)


# What a model has, and where.


def _execution_device(model: nn.Module, asked: Device | None) -> Device:
    if asked is not None:
        return asked
    hooks = (hook for module in model.modules() for hook in align_hooks(module))
    kept = next((hook.execution_device for hook in hooks if hook.offload), None)
    first = next(iter(model.parameters()), torch.empty(0)).device
    if first.type != "meta":
        return first
    return "cpu" if kept is None else kept


def _offloadable(model: nn.Module, *, offload_buffers: bool) -> dict[str, torch.Tensor]:
    """The tensors that offloading takes away, all names of tied ones included."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if offload_buffers:
        fleeting = get_non_persistent_buffers(model, recurse=True, fqns=True)
        named = model.named_buffers(remove_duplicate=False)
        tensors.update({name: buffer for name, buffer in named if name not in fleeting})
    return tensors


def _values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state on the CPU, also of one that is offloaded already."""
    values = {
        name: tensor.to("cpu") for name, tensor in model.state_dict().items() if tensor.device.type != "meta"
    }
    missing = {name for name in model.state_dict() if name not in values}
    for name, value in _hooked_values(model).items():
        if name in missing:
            values[name] = value()
    return values


def _hooked_values(model: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """How to get the weights that hooks of an earlier dispatch keep."""
    values: dict[str, Callable[[], torch.Tensor]] = {}
    for path, module in model.named_modules():
        for hook in align_hooks(module):
            if hook.offload and hook.weights_map is not None:
                for name in hook.slot_names(module):
                    full = f"{path}.{name}" if path else name
                    values[full] = functools.partial(hook.weights_map.__getitem__, name)
    return values


def _hooked_places(model: nn.Module) -> dict[str, StoredTensor]:
    """Places on disk that hooks of an earlier dispatch know."""
    places: dict[str, StoredTensor] = {}
    for path, module in model.named_modules():
        for hook in align_hooks(module):
            dataset = getattr(hook.weights_map, "dataset", None)
            if hook.offload and isinstance(dataset, OffloadedWeightsLoader):
                for name in hook.slot_names(module):
                    full = f"{path}.{name}" if path else name
                    place = dataset.place_of(full)
                    if place is not None:
                        places[full] = place
    return places


def _below(named: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """What belongs to `modules`; "" has everything."""
    wanted = list(modules)
    return {
        name: value
        for name, value in named.items()
        if any(not module or name == module or name.startswith(f"{module}.") for module in wanted)
    }


def _put_on_disk(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    folder: Path | None,
    *,
    known: Mapping[str, StoredTensor] | None = None,
    encode: str | None = None,
) -> dict[str, StoredTensor]:
    """Where each of `tensors` is on disk: known, mapped from there, in the folder, or written to it now."""
    places = {name: stored for name, stored in (known or {}).items() if name in tensors}
    in_memory = {name: t for name, t in tensors.items() if t.device.type != "meta" and name not in places}
    absent = {name for name in tensors if name not in in_memory and name not in places}
    for source in (recall_places(model), _hooked_places(model) if absent else {}):
        places.update({name: stored for name, stored in source.items() if name in absent})
        absent -= places.keys()
    held = _hooked_values(model) if absent else {}
    in_memory |= {name: held[name]() for name in tensors if name in absent and name in held}
    absent -= in_memory.keys()
    if absent and folder is not None:
        places.update(_from_folder(folder, {name: tensors[name] for name in absent}))
        absent -= places.keys()
    if absent:
        raise PlanError(
            f"{type(model).__name__}: no data for {', '.join(sorted(absent)[:3])} ({len(absent)} weights in "
            "all): they are neither in memory nor in the offload folder. Load a checkpoint first, or use "
            "load_checkpoint_and_dispatch"
        )
    for name, stored in places.items():
        _check_fits(name, stored, tensors[name])
    mapped = {} if encode else _mapped_places(in_memory)
    places.update(mapped)
    rest = {name: tensor for name, tensor in in_memory.items() if name not in mapped}
    if rest:
        if folder is None:
            raise PlanError(f"an offload folder is needed to write {', '.join(list(rest)[:3])} ... to disk")
        places.update(
            write_weights(folder, rest, encode=encode, encoded=_linear_weights(model) if encode else ())
        )
    if folder is not None:
        write_index(folder, places)
    return {name: places[name].converted(tensors[name].dtype) for name in tensors}


def _mapped_places(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    files = MappedFiles()
    found = {name: files.locate(tensor) for name, tensor in tensors.items() if type(tensor) is nn.Parameter}
    return {name: stored for name, stored in found.items() if stored is not None}


def _linear_weights(model: nn.Module) -> set[str]:
    """Weights that one linear layer alone uses, in a dtype that can be packed."""
    tied = {name for group in find_tied_parameters(model) for name in group}
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.dtype in PACKABLE
    } - tied


def _from_folder(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Weights that are on meta in the model and were left in the folder by an earlier call."""
    if not (folder / INDEX_NAME).exists():
        return {}
    places = locate_index(read_index(folder), folder)
    return {name: stored for name, stored in places.items() if name in tensors}


def _check_fits(name: str, stored: StoredTensor, tensor: torch.Tensor) -> None:
    if stored.shape != tuple(tensor.shape):
        raise PlanError(
            f"{stored.file}: weight {name!r} has shape {list(stored.shape)}, the model expects "
            f"{list(tensor.shape)}: these are another model's weights. Use another offload folder"
        )


# Hooking.


def retie(model: nn.Module, ties: list[list[str]]) -> None:
    """Make tied names one parameter again, or one placeholder where all of them are offloaded."""
    retie_parameters(model, ties)
    for group in ties:
        standing = [model.get_parameter(name) for name in group]
        if all(parameter.device.type == "meta" for parameter in standing):
            for name in group[1:]:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent)._parameters[leaf] = standing[0]


def _attach_all(
    model: nn.Module,
    device: Device,
    weights: Mapping[str, torch.Tensor],
    offload_buffers: bool,
    preload_module_classes: list[str] | None,
) -> None:
    _forget_hooks(model)
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
    attach_align_device_hook(
        model,
        execution_device=device,
        offload=True,
        offload_buffers=offload_buffers,
        weights_map=weights,
        preload_module_classes=preload_module_classes,
    )


def _forget_hooks(model: nn.Module) -> None:
    """Remove an earlier dispatch's hooks, if there are, and leave the placeholders: others take over."""
    if not any(hook.offload for module in model.modules() for hook in align_hooks(module)):
        return
    for module in model.modules():
        for hook in align_hooks(module):
            hook.forget_weights()
    remove_hook_from_submodules(model)


def _connect(model: nn.Module, state: OffloadState, places: Mapping[str, StoredTensor]) -> None:
    """Let the model's hooks share `state`, and a stream of what is on disk."""
    hooked = [(path, module, align_hooks(module)) for path, module in model.named_modules()]
    offloading = {path for path, _, hooks in hooked if any(hook.offload for hook in hooks)}
    groups: list[WeightGroup] = []
    roots = align_hooks(model)[-1:]
    for path, module, hooks in hooked:
        for hook in hooks:
            group = _group_of(path, module, hook, places, offloading) if hook.offload else None
            is_root = any(hook is root for root in roots)
            if hook.offload or is_root:
                hook.join(
                    state,
                    group=None if group is None else len(groups),
                    is_root=is_root,
                    by_rows=group is not None and group.by_rows,
                )
            if group is not None:
                groups.append(group)
    if groups:
        offloaded = [hook for _, _, hooks in hooked for hook in hooks if hook.offload]
        state.stream = WeightStream(groups, device=_cuda_device(offloaded))


def _cuda_device(hooks: Iterable[AlignDevicesHook]) -> torch.device | None:
    """The CUDA device that weights are moved to; any of several, since pinned memory is pinned for all."""
    for hook in hooks:
        device = hook.execution_device
        if device is None:
            continue
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if found.type == "cuda" and torch.cuda.is_available():
            return found
    return None


def _group_of(
    path: str,
    module: nn.Module,
    hook: AlignDevicesHook,
    places: Mapping[str, StoredTensor],
    offloading: set[str],
) -> WeightGroup | None:
    prefix = f"{path}." if path else ""
    names = hook.slot_names(module)
    tensors = {name: places[prefix + name] for name in names if prefix + name in places}
    if not tensors:
        return None
    parent = not hook.place_submodules and any(
        other != path and other.startswith(prefix) for other in offloading
    )
    return WeightGroup(path or "(root)", tensors, by_rows=_uses_rows(module, hook), ahead=not parent)


def _uses_rows(module: nn.Module, hook: AlignDevicesHook) -> bool:
    """Whether a forward reads single rows of the weight: torch's own embedding, on the CPU."""
    return type(module) is nn.Embedding and module.max_norm is None and hook.runs_on_cpu

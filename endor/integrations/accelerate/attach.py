"""Which module gets which hook: accelerate's rules, on any module tree.

A module with tensors of its own gets a hook that brings them; one of a preloaded class gets one for its whole
subtree. A module that occurs in several places gets one hook.
"""

# ruff: noqa: PLR0917 - accelerate's signatures take everything by position

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import PrefixedDataset
from torch import nn

from endor.integrations.accelerate.hooks import AlignDevicesHook, Device, add_hook_to_module, align_hooks

__all__ = [
    "attach_align_device_hook",
    "attach_align_device_hook_on_blocks",
    "attach_execution_device_hook",
]

TiedParams = dict[int, dict[torch.device, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What is the same for every hook of one call."""

    weights_map: Mapping[str, torch.Tensor] | None = None
    offload_buffers: bool = False
    skip_keys: str | list[str] | None = None
    preload_module_classes: frozenset[str] = frozenset()
    tied_params_map: TiedParams | None = None
    attached: set[int] = field(default_factory=set)
    """Modules that have got an offloading hook."""

    def preloads(self, module: nn.Module) -> bool:
        return type(module).__name__ in self.preload_module_classes

    def hook(self, device: Device | None, **more: Any) -> AlignDevicesHook:
        more.setdefault("tied_params_map", self.tied_params_map)
        return AlignDevicesHook(execution_device=device, skip_keys=self.skip_keys, **more)

    def weights_of(self, module_name: str) -> Mapping[str, torch.Tensor] | None:
        if self.weights_map is None:
            return None
        prefixed: Mapping[str, torch.Tensor] = PrefixedDataset(
            self.weights_map, f"{module_name}." if module_name else ""
        )
        return prefixed


def attach_execution_device_hook(
    module: nn.Module,
    execution_device: Device,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    tied_params_map: TiedParams | None = None,
) -> None:
    """Make `module` and everything in it that has tensors, and no hook yet, run on `execution_device`."""
    options = _Options(
        skip_keys=skip_keys,
        preload_module_classes=frozenset(preload_module_classes or ()),
        tied_params_map=tied_params_map,
    )
    _run_on(module, execution_device, options)


def _run_on(module: nn.Module, device: Device | None, options: _Options) -> None:
    if not hasattr(module, "_hf_hook") and _is_callable(module) and _has_state(module):
        add_hook_to_module(module, options.hook(device))
    if not options.preloads(module):
        for child in module.children():
            _run_on(child, device, options)


def _is_callable(module: nn.Module) -> bool:
    """Whether the module has a forward that a hook could run around; a ModuleList has none."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _has_state(module: nn.Module) -> bool:
    """Whether the module's state dict has anything in it."""
    return any(
        any(parameter is not None for parameter in owner._parameters.values())
        or any(
            buffer is not None and name not in owner._non_persistent_buffers_set
            for name, buffer in owner._buffers.items()
        )
        for owner in module.modules()
    )


def attach_align_device_hook(
    module: nn.Module,
    execution_device: Device | None = None,
    offload: bool = False,
    weights_map: Mapping[str, torch.Tensor] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    tied_params_map: TiedParams | None = None,
) -> None:
    """Hook every module in `module` that has tensors of its own; `weights_map` has full names."""
    options = _Options(
        weights_map=weights_map,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=frozenset(preload_module_classes or ()),
        tied_params_map=tied_params_map,
    )
    _align(module, module_name, execution_device, options, offload=offload)


def _align(module: nn.Module, name: str, device: Device | None, options: _Options, *, offload: bool) -> None:
    whole = offload and options.preloads(module)
    if (whole or _has_tensors(module)) and id(module) not in options.attached:
        options.attached.add(id(module))
        hook = options.hook(
            device,
            offload=offload,
            weights_map=options.weights_of(name),
            offload_buffers=options.offload_buffers,
            place_submodules=whole,
        )
        add_hook_to_module(module, hook, append=True)
    if not whole:
        for child_name, child in module.named_children():
            _align(child, _join(name, child_name), device, options, offload=offload)


def _has_tensors(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None for tensor in tensors)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: Device | Mapping[str, Device] | None = None,
    offload: bool | Mapping[str, bool] = False,
    weights_map: Mapping[str, torch.Tensor] | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    tied_params_map: TiedParams | None = None,
) -> None:
    """Hook the blocks of a model that `execution_device` and `offload` name, each as these say."""
    options = _Options(
        weights_map=weights_map,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=frozenset(preload_module_classes or ()),
        tied_params_map=tied_params_map,
    )
    if not isinstance(execution_device, Mapping) and not isinstance(offload, Mapping):
        if offload:
            _align(module, module_name, execution_device, replace(options, attached=set()), offload=True)
        else:
            add_hook_to_module(
                module, options.hook(execution_device, io_same_device=True, place_submodules=True)
            )
        return
    if isinstance(execution_device, Mapping):
        devices: dict[str, Device | None] = dict(execution_device)
    else:
        assert isinstance(offload, Mapping)
        devices = dict.fromkeys(offload, execution_device)
    offloads = dict(offload) if isinstance(offload, Mapping) else dict.fromkeys(devices, offload)
    _on_blocks(module, module_name, devices, offloads, options)


def _on_blocks(
    module: nn.Module,
    name: str,
    devices: Mapping[str, Device | None],
    offloads: Mapping[str, bool],
    options: _Options,
) -> None:
    if name in devices and name in offloads:
        _place_block(module, name, devices[name], options, offload=offloads[name])
    elif name == "":
        add_hook_to_module(module, options.hook(devices.get(""), io_same_device=True))
    for child_name, child in module.named_children():
        _on_blocks(child, _join(name, child_name), devices, offloads, options)


def _place_block(
    module: nn.Module, name: str, device: Device | None, options: _Options, *, offload: bool
) -> None:
    """One entry of the maps: a block that stays on its device, or one whose weights come for each forward."""
    if not offload:
        hook = options.hook(
            device,
            offload_buffers=options.offload_buffers,
            io_same_device=name == "",
            place_submodules=True,
        )
        add_hook_to_module(module, hook)
        _run_on(module, device, replace(options, preload_module_classes=frozenset()))
        return
    _align(module, name, device, options, offload=True)
    if not hasattr(module, "_hf_hook"):
        if _is_callable(module):
            add_hook_to_module(module, options.hook(device, io_same_device=name == ""))
    elif name == "":
        for hook in align_hooks(module)[:1]:
            hook.io_same_device = True
    _run_on(module, device, options)

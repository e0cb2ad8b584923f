"""Hooks with accelerate's names and effects, whose weights come in time and leave in every case.

A module's forward is replaced by one that calls its hook before and after. That is what code written for
accelerate looks for (`_hf_hook`, `_old_forward`), so it stays; what is behind it changes: an exception takes
the weights out again, threads take turns, a hooked model can be copied and pickled, weights on disk are read
ahead, and those in memory are used in place.
"""

# ruff: noqa: PLR0917 - accelerate's signatures take everything by position

from __future__ import annotations

import functools
import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import hooks as theirs
from accelerate.hooks import CpuOffload, LayerwiseCastingHook, ModelHook, UserCpuOffloadHook
from accelerate.utils import PrefixedDataset, find_device, send_to_device, set_module_tensor_to_device
from accelerate.utils.operations import recursively_apply
from torch import nn

from endor.integrations.accelerate.placeholder import OffloadedParameter, OffloadedTensor, placeholder
from endor.integrations.accelerate.state import OffloadState, host_key
from endor.kernels.tensor import BitmapTensor

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "LayerwiseCastingHook",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "align_hooks",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]

Device = int | str | torch.device
P = ParamSpec("P")
R = TypeVar("R")
_PLAIN = (nn.Parameter, torch.Tensor, nn.Buffer, OffloadedParameter, OffloadedTensor)
_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""What `dispatch_model` guards on a model."""


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` at the first call: it imports the compiler, which takes seconds."""
    disabled: list[Any] = []

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        result: R = disabled[0](*args, **kwargs)
        return result

    return wrapper


class SequentialHook(theirs.SequentialHook):  # type: ignore[misc]  # accelerate has no types
    """Several hooks as one."""

    def abort_forward(self, module: nn.Module) -> None:
        """All of them, the last first."""
        for hook in reversed(self.hooks):
            _abort(hook, module)


def _abort(hook: object, module: nn.Module) -> None:
    """Tell a hook that the forward raised; those of other libraries have no such method."""
    abort = getattr(hook, "abort_forward", None)
    if abort is not None:
        abort(module)


def _hooked_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    hook: Any = module._hf_hook
    old_forward: Any = module._old_forward
    try:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        if hook.no_grad:
            with torch.no_grad():
                output = old_forward(*args, **kwargs)
        else:
            output = old_forward(*args, **kwargs)
        return hook.post_forward(module, output)
    except BaseException:  # also Ctrl-C: what was loaded must not stay
        _abort(hook, module)
        raise


class HookedForward(functools.partial[Any]):
    """A module's forward with its hook around it: looks like the one it replaces, and can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_forward, (self.args[0], vars(self)["__wrapped__"])


def _hook_forward(module: nn.Module, old_forward: Callable[..., Any]) -> HookedForward:
    hooked = HookedForward(_hooked_forward, module)
    functools.update_wrapper(hooked, old_forward)
    return hooked


def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> nn.Module:
    """Run `hook` around every forward of `module`, in place of the hook it has, or after it with `append`.

    Returns the module, which is changed in place.
    """
    if append and getattr(module, "_hf_hook", None) is not None:
        old_hook: Any = module._hf_hook
        remove_hook_from_module(module)
        hook = SequentialHook(old_hook, hook)
    if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward"):
        old_forward: Any = module._old_forward
    else:
        old_forward = module.forward
        vars(module)["_old_forward"] = old_forward
    module = hook.init_hook(module)
    vars(module)["_hf_hook"] = hook
    _set_forward(module, _hook_forward(module, old_forward))
    return module


def _set_forward(module: nn.Module, forward: Any) -> None:
    # A traced module's forward belongs to its class, which is its own: an instance's would hide later edits.
    target: Any = type(module) if "GraphModuleImpl" in str(type(module)) else module
    target.forward = forward


def remove_hook_from_module(module: nn.Module, recurse: bool = False) -> nn.Module:
    """Undo `add_hook_to_module`, and what `dispatch_model` put on the module. Returns the module."""
    if hasattr(module, "_hf_hook"):
        hook: Any = module._hf_hook
        hook.detach_hook(module)
        delattr(module, "_hf_hook")
    if hasattr(module, "_old_forward"):
        _restore_forward(module)
    for name in _MOVERS:
        vars(module).pop(name, None)
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    return module


def _restore_forward(module: nn.Module) -> None:
    old_forward: Any = vars(module).pop("_old_forward")
    if "GraphModuleImpl" in str(type(module)):
        _set_forward(module, old_forward)
    elif getattr(old_forward, "__func__", None) is type(module).forward:
        vars(module).pop("forward", None)
    else:
        module.forward = old_forward


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Remove the hooks of a module and of everything in it."""
    remove_hook_from_module(module, recurse=True)


class AlignDevicesHook(theirs.AlignDevicesHook):  # type: ignore[misc]  # as above
    """Brings a module's weights and inputs to where it runs, and takes the weights away afterwards.

    Arguments and attributes are those of accelerate's class of this name. A hook made by `dispatch_model` and
    its relatives shares an `OffloadState` with the others; one made by hand has its own.
    """

    weights_map: Mapping[str, torch.Tensor] | None
    tied_params_map: dict[int, dict[torch.device, torch.Tensor]] | None
    tied_params_names: set[str]
    io_same_device: bool

    def __init__(
        self,
        execution_device: Device | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, torch.Tensor] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | list[str] | None = None,
        tied_params_map: dict[int, dict[torch.device, torch.Tensor]] | None = None,
    ) -> None:
        self._start()
        super().__init__(
            execution_device=execution_device,
            offload=offload,
            io_same_device=io_same_device,
            weights_map=weights_map,
            offload_buffers=offload_buffers,
            place_submodules=place_submodules,
            skip_keys=skip_keys,
            tied_params_map=tied_params_map,
        )
        self.tied_pointers_to_remove: set[tuple[int, Device]] = set()
        self._state = OffloadState()
        self._group: int | None = None
        self._is_root = False
        self._by_rows = False

    def _start(self) -> None:
        """What a copy does not take over."""
        self._local = threading.local()
        self._placed: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._depth = 0
        self._entered = 0
        self._holds_group = False

    def join(self, state: OffloadState, *, group: int | None, is_root: bool, by_rows: bool = False) -> None:
        """Share `state`; the weights are its stream's group number `group`."""
        self._state, self._group, self._is_root, self._by_rows = state, group, is_root, by_rows
        state.members += 1

    @property
    def state(self) -> OffloadState:
        """What this hook shares with the others of its model."""
        return self._state

    @property
    def input_device(self) -> torch.device | None:
        """Where this thread's input was."""
        return getattr(self._local, "device", None)

    @input_device.setter
    def input_device(self, device: torch.device | None) -> None:
        self._local.device = device

    # Attaching.

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Place the module's tensors, or put placeholders where they were."""
        if not self.offload:
            placed: nn.Module = super().init_hook(module)
            return placed
        self.original_devices = {
            name: owner_tensor.device for _, _, name, owner_tensor in self._slots(module, every=True)
        }
        slots = list(self._slots(module))
        if self.weights_map is None:
            self.weights_map = {name: tensor.detach().to("cpu") for _, _, name, tensor in slots}
        for holder, leaf, name, tensor in slots:
            if self.tied_params_map is not None and tensor.data_ptr() in self.tied_params_map:
                self.tied_params_names.add(name)
            if _is_plain(tensor):
                holder[leaf] = placeholder(tensor, name=self._full_name(name))
            else:
                set_module_tensor_to_device(module, name, "meta")
        self._place_buffers(module)
        return module

    def _place_buffers(self, module: nn.Module) -> None:
        """Buffers that are not offloaded stay where the module runs."""
        if self.execution_device is None:
            return
        offloaded = {name for _, _, name, _ in self._slots(module)}
        for name, buffer in module.named_buffers(recurse=self.place_submodules):
            if name not in offloaded:
                value = (self.weights_map or {}).get(name) if buffer.device.type == "meta" else None
                set_module_tensor_to_device(
                    module, name, self.execution_device, value=value, tied_params_map=self.tied_params_map
                )

    def _slots(
        self, module: nn.Module, *, every: bool = False
    ) -> Iterator[tuple[dict[str, Any], str, str, torch.Tensor]]:
        """The tensors this hook moves: the dict that holds each, its key there, its name, itself."""
        owners = module.named_modules() if self.place_submodules else (("", module),)
        for path, owner in owners:
            prefix = f"{path}." if path else ""
            for leaf, parameter in owner._parameters.items():
                if parameter is not None:
                    yield owner._parameters, leaf, prefix + leaf, parameter
            if self.offload_buffers or every:
                for leaf, buffer in owner._buffers.items():
                    if buffer is not None and (every or leaf not in owner._non_persistent_buffers_set):
                        yield owner._buffers, leaf, prefix + leaf, buffer

    def _full_name(self, name: str) -> str:
        return f"{self.weights_map.prefix}{name}" if isinstance(self.weights_map, PrefixedDataset) else name

    def slot_names(self, module: nn.Module) -> list[str]:
        """Names of the tensors this hook moves."""
        return [name for _, _, name, _ in self._slots(module)]

    # Around a forward.

    @untraced
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Load the module's weights and move its inputs to where it runs."""
        if self.offload or self._is_root:
            self._enter()
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        if not self.offload:
            return self._moved(args), self._moved(kwargs, self.skip_keys)
        self._depth += 1
        if self._depth > 1:  # called again inside its own forward: everything is there
            return self._moved(args), self._moved(kwargs, self.skip_keys)
        self._state.loaded[id(self)] = self
        if not self.runs_on_cpu:
            return self._load_to_device(module, args, kwargs)
        args, kwargs = self._moved(args), self._moved(kwargs, self.skip_keys)
        self._load_in_place(module, args)
        return args, kwargs

    @untraced
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take the weights away; bring the output to where the input was."""
        if self.offload:
            self._depth = max(0, self._depth - 1)
            if not self._depth:
                output = self._detached_from_ring(output)
                if not self.runs_on_cpu:
                    self._forget_tied(module)
                self.unload()
        if self.io_same_device and self.input_device is not None:
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        self._leave(complete=True)
        return output

    def abort_forward(self, module: nn.Module) -> None:
        """After a forward that raised: as if it had never begun."""
        if self.offload and not self.runs_on_cpu:
            self._forget_tied(module)
        self.unload()
        self._leave(complete=False)

    def abandon(self) -> None:
        """Unload, for a forward whose end will never be told."""
        self.unload()
        self._entered = 0

    def unload(self) -> None:
        """Put the placeholders back and give up what was lent."""
        self._depth = 0
        while self._placed:
            holder, leaf, standing = self._placed.pop()
            holder[leaf] = standing
        if self._holds_group and self._state.stream is not None and self._group is not None:
            self._holds_group = False
            self._state.stream.done(self._group)
        self._state.loaded.pop(id(self), None)

    def _enter(self) -> None:
        self._state.turn.enter()
        self._entered += 1
        if self._is_root:
            self._state.begin_forward()

    def _leave(self, *, complete: bool) -> None:
        if not self._entered:
            return
        self._entered -= 1
        if self._is_root:
            if complete:
                self._state.end_forward()
            else:
                self._state.abort_forward()
        self._state.turn.leave()

    @property
    def runs_on_cpu(self) -> bool:
        """Whether weights are used where they are, or have to be copied to a device."""
        device = self.execution_device
        return device is None or (not isinstance(device, int) and torch.device(device).type == "cpu")

    def _moved(self, value: Any, skip_keys: str | list[str] | None = None) -> Any:
        device = self.execution_device
        if device is None or (self.runs_on_cpu and _is_on_cpu(value, _as_set(skip_keys))):
            return value
        return send_to_device(value, device, skip_keys=skip_keys)

    def _values(self, args: tuple[Any, ...]) -> Mapping[str, torch.Tensor]:
        """The module's weights: out of the stream what it has, out of the map the others."""
        weights: Mapping[str, torch.Tensor] = self.weights_map or {}
        stream = self._state.stream
        if stream is None or self._group is None:
            return weights
        if self._by_rows and args and isinstance(args[0], torch.Tensor):
            stream.expect_rows(self._group, args[0].numel())
        loaded = stream.load(self._group, keep=torch.is_grad_enabled() and self.runs_on_cpu)
        self._holds_group = True
        return ChainMap(loaded, weights)  # type: ignore[arg-type]  # only read

    def _load_in_place(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        values = self._values(args)
        with torch._C.DisableTorchFunctionSubclass():  # asking a placeholder for its shape is no use of it
            for slot in self._slots(module):
                if slot[3].device.type == "meta":  # else it was put there since, by whoever wanted it
                    self._put(module, slot, values[slot[2]])

    def _put(
        self, module: nn.Module, slot: tuple[dict[str, Any], str, str, torch.Tensor], value: torch.Tensor
    ) -> None:
        """A weight in place of its placeholder."""
        holder, leaf, name, standing = slot
        self._placed.append((holder, leaf, standing))
        if not _is_plain(standing):
            statistics = self._statistics(name, value)
            set_module_tensor_to_device(module, name, "cpu", value=value, fp16_statistics=statistics)
            return
        if value.shape != standing.shape:
            raise ValueError(
                f"{self._full_name(name)}: expected a tensor of shape {list(standing.shape)}, found "
                f"{list(value.shape)}: these are not the weights of this model"
            )
        if value.dtype != standing.dtype:
            value = value.to(standing.dtype)
        if isinstance(standing, nn.Parameter):
            value = _as_parameter(value, requires_grad=standing.requires_grad)
        holder[leaf] = value

    def _load_to_device(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """accelerate's own way, with the stream's tensors where it has them."""
        for holder, leaf, _, standing in self._slots(module):
            if standing.device.type == "meta":
                self._placed.append((holder, leaf, standing))
        io_same_device, self.io_same_device = self.io_same_device, False
        weights, ties = self.weights_map, self.tied_params_map
        names = self.tied_params_names
        try:
            self.weights_map = self._values(args)
            if self._holds_group:
                # Staging memory has addresses that a tied weight may have had before: they say nothing.
                self.tied_params_map, self.tied_params_names = None, set()
            moved: tuple[Any, Any] = super().pre_forward(module, *args, **kwargs)
            return moved
        finally:
            self.weights_map, self.tied_params_map, self.tied_params_names = weights, ties, names
            self.io_same_device = io_same_device
            if self._holds_group and self._state.stream is not None and self._group is not None:
                self._holds_group = False
                self._state.stream.done(self._group)

    def _forget_tied(self, module: nn.Module) -> None:
        """Tied weights that this forward brought to the device go with it."""
        for pointer, device in self.tied_pointers_to_remove:
            on_devices = (self.tied_params_map or {}).get(pointer, {})
            for known in [known for known in on_devices if known == device]:
                del on_devices[known]
        self.tied_pointers_to_remove = set()
        if type(module).__name__ == "Linear8bitLt":  # bitsandbytes keeps them beside the weight
            state: Any = module.state
            state.SCB = state.CxB = None

    def _statistics(self, name: str, value: torch.Tensor) -> Any:
        """The scales that bitsandbytes keeps beside an int8 weight."""
        scales = name.replace("weight", "SCB")
        if value.dtype != torch.int8 or "weight" not in name or self.weights_map is None:
            return None
        return self.weights_map.get(scales)

    def _detached_from_ring(self, output: Any) -> Any:
        """An output that is a view of a weight gets memory of its own: the weight's is another's soon."""
        stream = self._state.stream
        if not self._holds_group or stream is None or stream.mode != "ring" or not self.runs_on_cpu:
            return output
        if isinstance(output, torch.Tensor):
            return output.clone() if stream.is_volatile(output) else output
        return recursively_apply(torch.clone, output, test_type=_volatile_test(stream.is_volatile))

    # Detaching.

    def forget_weights(self) -> None:
        """Before another hook takes over: detaching restores nothing."""
        self.weights_map = None

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Give the module its tensors back, where it had any."""
        self.unload()
        if self.offload:
            for slot in list(self._slots(module, every=True)):
                self._restore(module, slot)
        if self._state.members:
            self._state.leave()
        return module

    def _restore(self, module: nn.Module, slot: tuple[dict[str, Any], str, str, torch.Tensor]) -> None:
        holder, leaf, name, standing = slot
        device = self.original_devices.get(name, standing.device)
        if device.type == "meta" or standing.device == device or self.weights_map is None:
            return
        value = self.weights_map.get(name) if standing.device.type == "meta" else standing.detach()
        if value is None or not _is_plain(standing):
            statistics = None if value is None else self._statistics(name, value)
            set_module_tensor_to_device(module, name, device, value=value, fp16_statistics=statistics)
            return
        tensor = value.to(device=device, dtype=standing.dtype)
        if not isinstance(standing, nn.Parameter):
            holder[leaf] = tensor
            return
        parameter = _as_parameter(tensor, requires_grad=standing.requires_grad)
        holder[leaf] = self._state.restored_parameter(self._tie_key(name, value), parameter)

    def _tie_key(self, name: str, value: torch.Tensor) -> tuple[object, ...]:
        """What tied names have in common: a place on disk, or in memory."""
        weights = self.weights_map
        if isinstance(weights, PrefixedDataset):
            place = getattr(weights.dataset, "place_of", lambda _: None)(self._full_name(name))
            if place is not None:
                return ("disk", place)
        return host_key(value)

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        for name in ("_local", "_placed", "_depth", "_entered", "_holds_group"):
            state.pop(name, None)
        # Its keys are addresses, which mean nothing in another process.
        state["tied_params_map"] = None if self.tied_params_map is None else {}
        state["tied_params_names"] = set()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()
        self.__dict__.update(state)


def align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of this kind that a module has, alone or in a sequence."""
    return list(_flattened([getattr(module, "_hf_hook", None)]))


def _flattened(hooks: Iterable[Any]) -> Iterator[AlignDevicesHook]:
    for hook in hooks:
        if isinstance(hook, theirs.SequentialHook):
            yield from _flattened(hook.hooks)
        elif isinstance(hook, AlignDevicesHook):
            yield hook


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a tensor without habits of its own; others are left to accelerate, which knows them."""
    return type(tensor) in _PLAIN or isinstance(tensor, BitmapTensor)


def _as_parameter(value: torch.Tensor, *, requires_grad: bool) -> nn.Parameter:
    if isinstance(value, BitmapTensor):
        return nn.Parameter(value, requires_grad=False)
    return nn.Parameter(value, requires_grad=requires_grad)


def _as_set(skip_keys: str | list[str] | None) -> frozenset[str]:
    return frozenset([skip_keys] if isinstance(skip_keys, str) else skip_keys or ())


def _is_on_cpu(value: Any, skip_keys: frozenset[str]) -> bool:
    """Whether nothing in `value` would have to move."""
    if isinstance(value, torch.Tensor):
        return value.device.type == "cpu"
    if isinstance(value, (tuple, list)):
        return all(_is_on_cpu(item, skip_keys) for item in value)
    if isinstance(value, Mapping):
        return all(key in skip_keys or _is_on_cpu(item, skip_keys) for key, item in value.items())
    return not hasattr(value, "to")


def _volatile_test(is_volatile: Callable[[torch.Tensor], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, torch.Tensor) and is_volatile(value)

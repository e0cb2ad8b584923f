"""What the hooks of one dispatched model share: whose turn it is, and the stream its weights come from."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

from endor.kernels.tensor import BitmapTensor
from endor.runtime.offload import WeightStream
from endor.runtime.turns import ThreadTurn

__all__ = ["Loaded", "OffloadState", "host_key"]


class Loaded(Protocol):
    """A hook that has put weights into its module."""

    def abandon(self) -> None:
        """Take them out again, whatever else happened."""


class OffloadState:
    """Shared by all hooks that one call of `dispatch_model`, `disk_offload` or `cpu_offload` attached.

    Weights are in one place and only one forward can have them, so threads that call the model take turns.
    Copied and pickled with the model; whose turn it is stays behind.
    """

    def __init__(self, stream: WeightStream | None = None) -> None:
        self.stream = stream
        self.members = 0
        """Hooks attached; when the last one goes, so do the stream's threads and files."""
        self._start()

    def _start(self) -> None:
        self.turn = ThreadTurn()
        self.loaded: dict[int, Loaded] = {}
        self.restored: WeakValueDictionary[Any, nn.Parameter] = WeakValueDictionary()
        self._forwards = 0

    def begin_forward(self) -> None:
        """The model's forward begins; the turn has been taken."""
        self._forwards += 1
        if self._forwards == 1 and self.stream is not None:
            self.stream.begin_forward()

    def end_forward(self) -> None:
        """It came to its end."""
        self._forwards = max(0, self._forwards - 1)
        if not self._forwards and self.stream is not None:
            self.stream.end_forward()

    def abort_forward(self) -> None:
        """It raised: whatever is still in a module is taken out, also by those whose own end never came."""
        self._forwards = max(0, self._forwards - 1)
        if self._forwards:
            return
        for hook in list(self.loaded.values()):
            hook.abandon()
        self.loaded.clear()
        if self.stream is not None:
            self.stream.abort_forward()
        self.turn.begin()  # the next line gives it up, however often it was entered below

    def leave(self) -> None:
        """One hook is detached."""
        self.members -= 1
        if self.members <= 0 and self.stream is not None:
            self.stream.close()

    def restored_parameter(self, key: object, parameter: nn.Parameter) -> nn.Parameter:
        """`parameter`, or the one made before for the same `key`: tied weights come back as one."""
        known = self.restored.get(key)
        if known is not None and known.device == parameter.device and known.dtype == parameter.dtype:
            return known
        self.restored[key] = parameter
        return parameter

    def __getstate__(self) -> dict[str, Any]:
        return {"stream": self.stream, "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()


def host_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two names of one tensor in memory have in common."""
    if isinstance(tensor, BitmapTensor):  # it has no memory of its own, its sections have
        return ("packed", *(section.data_ptr() for section in tensor.packed.sections.values()))
    if not tensor.numel():
        return ("empty", id(tensor))
    return ("host", tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)

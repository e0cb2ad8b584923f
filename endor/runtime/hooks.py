"""What torch calls while a model runs, and what stands between the model and its runtime.

None of it keeps the runtime alive, can be copied, or can be traced: torch.compile breaks its graph there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from endor.errors import PlanError

if TYPE_CHECKING:
    from endor.runtime.streaming import Runtime

__all__ = ["ExpertsHook", "RuntimeHook", "TileLease", "refuse_to_save"]


def refuse_to_save(*_: object, **__: object) -> None:
    """Stands for `save_pretrained`, which would begin by overwriting the config of what it cannot save."""
    raise PlanError(
        "a streamed model cannot be saved: its weights are in its Endor checkpoint, which can be copied as "
        "it is; endor.open(...).read_dense(name) gives them dense"
    )


class RuntimeHook:
    """Calls a method of the runtime when torch calls it."""

    def __init__(self, runtime: Runtime, method: Callable[..., None], *arguments: object) -> None:
        self._runtime = weakref.ref(runtime)
        self._method = method
        self._arguments = arguments

    def __call__(self, *_: object) -> None:
        self._run()  # pyright: ignore[reportCallIssue] - it does not see through the decorator

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        runtime = self._runtime()
        if runtime is not None:
            self._method(runtime, *self._arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise PlanError("a streamed model cannot be copied; load its checkpoint a second time")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise PlanError("a streamed model cannot be pickled; load its checkpoint where you need it")


class ExpertsHook:
    """Reads the router's choice off the arguments of a layer's experts before they run."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self._runtime = weakref.ref(runtime)
        self._layer = layer

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._run(args, kwargs)  # pyright: ignore[reportCallIssue] - it does not see through the decorator

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime = self._runtime()
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        chosen = next((t for t in tensors if t.dtype in (torch.int64, torch.int32)), None)
        if runtime is not None:
            runtime.enter_experts(self._layer, chosen)


class TileLease:
    """Lends the tiles of one head."""

    def __init__(self, runtime: Runtime, name: str, first_unit: int) -> None:
        self._runtime = weakref.ref(runtime)
        self._name = name
        self._first_unit = first_unit

    def __call__(self, tile: int) -> AbstractContextManager[Sequence[torch.Tensor]]:
        runtime = self._runtime()
        if runtime is None:
            raise PlanError("the model was collected while one of its weights was used")
        return runtime.lease_tile(self._name, self._first_unit + tile)

"""Puts Endor's functions where other libraries have bound accelerate's, and takes them away again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import Any, Self

__all__ = ["Installation", "install"]

_HOMES = ("accelerate", "accelerate.big_modeling", "accelerate.hooks", "accelerate.utils")
_USERS = ("transformers.integrations.accelerate", "transformers.integrations.peft")
_REPLACED = (
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "load_checkpoint_and_dispatch",
)


class Installation:
    """What `install` changed; `undo`, or the end of a `with`, changes it back."""

    def __init__(self) -> None:
        self._changed: list[tuple[ModuleType, str, Any]] = []

    def replace(self, module: ModuleType, name: str, value: Any) -> None:
        """Bind `name` in `module` to `value`, and remember what it was."""
        self._changed.append((module, name, vars(module)[name]))
        setattr(module, name, value)

    def undo(self) -> None:
        """Bind everything to what it was. Idempotent."""
        while self._changed:
            module, name, value = self._changed.pop()
            setattr(module, name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def install() -> Installation:
    """Make transformers, accelerate and whoever bound accelerate's functions use Endor's.

        endor.integrations.accelerate.install()                   # for the whole process
        with endor.integrations.accelerate.install():             # or for a while
            model = AutoModelForCausalLM.from_pretrained(name, device_map={"": "disk"})

    Functions that a program imported by name itself (`from accelerate import disk_offload`) before the call
    are its own and stay what they are.
    """
    ours = _ours()
    for name in _USERS:
        importlib.import_module(name)
    installation = Installation()
    originals = {id(getattr(importlib.import_module("accelerate.big_modeling"), n)): n for n in ours}
    for module in _loaded(_HOMES + _USERS):
        for name, value in list(vars(module).items()):
            if id(value) in originals:
                installation.replace(module, name, ours[originals[id(value)]])
    return installation


def _ours() -> Mapping[str, Any]:
    from endor.integrations.accelerate import checkpoint, dispatch

    homes = (dispatch, checkpoint)
    return {name: next(vars(home)[name] for home in homes if name in home.__all__) for name in _REPLACED}


def _loaded(names: tuple[str, ...]) -> list[ModuleType]:
    return [sys.modules[name] for name in names if name in sys.modules]

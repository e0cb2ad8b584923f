"""Watches what goes into modules while a model runs, and keeps the 2-norm of every input feature."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

__all__ = ["InputNorms"]


class InputNorms:
    """Accumulates the squares of inputs in float32; a context manager that leaves no hook behind.

    Args:
        modules: whose first input is watched, by the name under which the norms are asked for.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._squares: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._watcher(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _watcher(self, name: str) -> Any:
        def watch(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).to(torch.float32)
            squares = x.square_().sum(0) if x.data_ptr() != args[0].data_ptr() else x.square().sum(0)
            if name in self._squares:
                self._squares[name] += squares
            else:
                self._squares[name] = squares

        return watch

    def norms(self, name: str) -> torch.Tensor | None:
        """float32 [features] on the CPU; None for a module that was never called."""
        squares = self._squares.get(name)
        return None if squares is None else squares.sqrt().cpu()

"""Registers Endor with transformers at the moment transformers becomes able to load a model.

transformers has no plugin discovery, and a checkpoint of an unregistered method gets random weights and one
warning. So `import endor` (and `import torch`, through the entry point group torch.backends, where Endor is
installed) puts a finder on `sys.meta_path` that adds one call behind the execution of transformers' own
modules. Nothing is imported before that, and nothing here can make an import of torch or transformers fail.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["install"]

_REGISTRY = "transformers.quantizers.auto"
# The second is for an `install` in the middle of the first, which whoever loads a model imports later.
_TRIGGERS = (_REGISTRY, "transformers.modeling_utils")


def install() -> None:
    """Register now if transformers is loaded, else as soon as it is. Idempotent; never raises."""
    if hasattr(sys.modules.get(_REGISTRY), "get_hf_quantizer"):  # the last thing the module defines
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    try:
        importlib.import_module("endor.integrations.transformers")  # registers as its last act
    except Exception as error:  # noqa: BLE001 - importing transformers must not fail because Endor is there
        warnings.warn(
            f"Endor cannot register with this transformers: {error}. from_pretrained would give Endor "
            "checkpoints random weights; use endor.load",
            RuntimeWarning,
            stacklevel=2,
        )


class _AfterImport(MetaPathFinder):
    """Finds the trigger modules where they are, with a loader that registers once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _TRIGGERS else None
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterAfter(Loader):
    """Another loader and one call; it puts the other one in its own place, so that no trace is left."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()

"""Endor: run language models too big for memory from bitmap-compressed, streamed weights.

Importing this package is cheap; what a name needs is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from endor.integrations import autoload as _autoload

if TYPE_CHECKING:
    from endor.checkpoint import (
        Checkpoint,
        open_checkpoint as open,  # noqa: A004
    )
    from endor.convert import ConvertReport, convert
    from endor.integrations.accelerate import (
        cpu_offload,
        cpu_offload_with_hook,
        disk_offload,
        dispatch_model,
        infer_auto_device_map,
        init_empty_weights,
        load_checkpoint_and_dispatch,
    )
    from endor.kernels.tensor import BitmapTensor, decode, encode
    from endor.runtime import load

__version__ = "0.1.0"

__all__ = [
    "BitmapTensor",
    "Checkpoint",
    "ConvertReport",
    "__version__",
    "convert",
    "cpu_offload",
    "cpu_offload_with_hook",
    "decode",
    "disk_offload",
    "dispatch_model",
    "encode",
    "infer_auto_device_map",
    "init_empty_weights",
    "load",
    "load_checkpoint_and_dispatch",
    "open",
]

_HOMES = {
    "BitmapTensor": "endor.kernels.tensor",
    "Checkpoint": "endor.checkpoint",
    "ConvertReport": "endor.convert",
    "cpu_offload": "endor.integrations.accelerate",
    "cpu_offload_with_hook": "endor.integrations.accelerate",
    "decode": "endor.kernels.tensor",
    "disk_offload": "endor.integrations.accelerate",
    "dispatch_model": "endor.integrations.accelerate",
    "encode": "endor.kernels.tensor",
    "infer_auto_device_map": "endor.integrations.accelerate",
    "init_empty_weights": "endor.integrations.accelerate",
    "load": "endor.runtime",
    "load_checkpoint_and_dispatch": "endor.integrations.accelerate",
    "open": "endor.checkpoint:open_checkpoint",
}

# The one thing done at import: without it `from_pretrained` gives Endor checkpoints random weights.
_autoload.install()


def __getattr__(name: str) -> Any:
    if name == "convert":
        # A function and a package share this name; the function is what `endor.convert(...)` means.
        value = importlib.import_module("endor.convert").convert
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(module), attribute or name)
    else:
        raise AttributeError(f"module 'endor' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from endor.kernels.tensor import BitmapTensor, decode, encode
    from endor.runtime import load

__version__ = "0.1.0"

__all__ = [
    "BitmapTensor",
    "Checkpoint",
    "ConvertReport",
    "__version__",
    "convert",
    "decode",
    "encode",
    "load",
    "open",
]

_HOMES = {
    "BitmapTensor": "endor.kernels.tensor",
    "Checkpoint": "endor.checkpoint",
    "ConvertReport": "endor.convert",
    "decode": "endor.kernels.tensor",
    "encode": "endor.kernels.tensor",
    "load": "endor.runtime",
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

"""Conversion of Hugging Face checkpoints, one tensor in memory at a time (docs/design/conversion.md)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from endor.convert.pipeline import convert
    from endor.convert.report import ConvertReport, Progress

__all__ = ["ConvertReport", "Progress", "convert"]

_HOMES = {
    "ConvertReport": "endor.convert.report",
    "Progress": "endor.convert.report",
    "convert": "endor.convert.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _CallableModule(ModuleType):
    """Lets `endor.convert(source, out)` work whatever was imported first.

    The function and this package share their name in `endor`, and importing the package puts the package
    there.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.convert(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

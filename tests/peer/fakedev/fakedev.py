# ruff: noqa: ARG005 - torch says with which arguments its devices are called
"""Importing this registers the torch device `fakedev`: two accelerators in host memory.

For tests that need an accelerator on machines without one. It refuses to mix devices, has a limit of memory,
and counts what is copied to it (`torch.fakedev.stats()`).
"""

from __future__ import annotations

import os
import types
from typing import Any

import _fakedev  # type: ignore[import-not-found]
import torch

NAME = "fakedev"
TOTAL_BYTES = int(os.environ.get("FAKEDEV_BYTES", str(768 << 20)))


def _index(device: Any) -> int:
    if device is None:
        return int(_fakedev.current_device())
    return device if isinstance(device, int) else torch.device(device).index or 0


class _Selected:
    """`with torch.fakedev.device(1):`"""

    def __init__(self, device: Any) -> None:
        self._wanted = _index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = _fakedev.current_device()
        _fakedev.set_device(self._wanted)

    def __exit__(self, *_: object) -> None:
        _fakedev.set_device(self._before)


def _module() -> Any:
    """What torch expects of a device's module."""
    module: Any = types.ModuleType(NAME)
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = _fakedev.device_count
    module.current_device = _fakedev.current_device
    module.set_device = lambda device: _fakedev.set_device(_index(device))
    module.device = _Selected
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_bf16_supported = lambda *args, **kwargs: True
    module.memory_allocated = lambda device=None: _fakedev.memory_allocated(_index(device))
    module.max_memory_allocated = lambda device=None: _fakedev.max_memory_allocated(_index(device))
    module.reset_peak_memory_stats = lambda device=None: _fakedev.reset_peak(_index(device))
    module.mem_get_info = lambda device=None: (
        TOTAL_BYTES - _fakedev.memory_allocated(_index(device)),
        TOTAL_BYTES,
    )
    module.stats = _fakedev.stats
    return module


_fakedev.set_limit(TOTAL_BYTES)
_utils: Any = torch.utils
_utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module())
_utils.generate_methods_for_privateuse1_backend()
_fakedev.init()

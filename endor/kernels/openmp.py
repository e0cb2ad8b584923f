"""Finds the OpenMP runtime that torch itself uses, so that native kernels run on torch's own threads.

Torch's workers spin for a while after each parallel region. A second set of threads would compete with them
for the same cores; see docs/design/kernels.md for what that costs.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

__all__ = ["parallel_address"]


def parallel_address() -> int:
    """Address of `GOMP_parallel` in the runtime libtorch_cpu is linked against; 0 where there is none."""
    library = Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"
    mode = getattr(os, "RTLD_NOLOAD", None)
    if mode is None:
        return 0
    try:
        # Looked up in the library and in what it depends on: torch's own runtime, not another one.
        function = ctypes.CDLL(str(library), mode=mode | os.RTLD_LAZY).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0

"""Where Triton's kernels run in this process: on a GPU or, interpreted, on the CPU."""

from __future__ import annotations

import os

__all__ = ["is_interpreted"]


def is_interpreted() -> bool:
    """Whether Triton's interpreter was asked for; Triton reads the same variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"

"""Encode and decode packed tensors: one operation, several backends, all bit-identical.

`reference` is plain torch and the ground truth; `native` is C++ that picks its instruction set at run time.
"""

from __future__ import annotations

from endor.kernels.dispatch import decode, decode_rows, encode
from endor.kernels.registry import active_backend, backends

__all__ = ["active_backend", "backends", "decode", "decode_rows", "encode"]

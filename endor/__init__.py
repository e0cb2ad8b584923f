"""Endor: run language models too big for memory from bitmap-compressed, streamed weights."""

from __future__ import annotations

__version__ = "0.1.0"

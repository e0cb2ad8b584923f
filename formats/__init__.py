"""What the bytes of an Endor checkpoint mean: layout, codecs, header, writer and reader (docs/format.md)."""

from __future__ import annotations

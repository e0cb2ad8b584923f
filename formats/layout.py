"""The constants and the arithmetic of docs/format.md: where rows, words, row blocks and sections lie.

Every number of the format stands here and nowhere else; the C++ kernels receive them as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from endor.errors import FormatError

__all__ = [
    "BLOCK_ALIGNMENT_BYTES",
    "FORMAT_VERSION",
    "HEADER_LIMIT_BYTES",
    "METADATA_KEY",
    "PADDING_PREFIX",
    "ROW_BLOCK_ELEMENTS",
    "SECTION_ALIGNMENT_BYTES",
    "WORD_BITS",
    "Geometry",
    "align_up",
]

FORMAT_VERSION = 1
METADATA_KEY = "endor"
"""Key of the safetensors `__metadata__` map that holds Endor's part of the header."""
PADDING_PREFIX = "endor.padding."
"""Names of the filler tensors that keep the file free of holes."""
HEADER_LIMIT_BYTES = 100_000_000
"""The safetensors library refuses longer headers."""
BLOCK_ALIGNMENT_BYTES = 4096
"""O_DIRECT and GPUDirect transfer whole pages."""
SECTION_ALIGNMENT_BYTES = 64
"""One cache line, one AVX-512 register."""
WORD_BITS = 64
"""Bitmap rows are padded to whole words of this many bits."""
ROW_BLOCK_ELEMENTS = 4096
"""A row offset is stored for every run of rows that holds at least this many elements: 32 / 4096 < 0.01 b/w."""
_MAX_ELEMENTS = 2**62


def align_up(n: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `n`."""
    return -(-n // alignment) * alignment


@dataclass(frozen=True)
class Geometry:
    """A tensor of any rank >= 1 seen as a matrix: its last dimension are the columns, the others the rows."""

    rows: int
    cols: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Geometry:
        """Geometry of `shape`; a vector is one row. Raises FormatError for a scalar or an impossible shape."""
        if not shape:
            raise FormatError("a scalar has no rows and cannot be packed; store it dense")
        if any(n < 0 for n in shape) or math.prod(shape) > _MAX_ELEMENTS:
            raise FormatError(f"shape {list(shape)} is negative or has more than 2**62 elements")
        return cls(rows=math.prod(shape[:-1]), cols=shape[-1])

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def words_per_row(self) -> int:
        return -(-self.cols // WORD_BITS)

    @property
    def bitmap_row_bytes(self) -> int:
        return self.words_per_row * (WORD_BITS // 8)

    @property
    def row_block(self) -> int:
        """Rows that share one row offset: the smallest power of two that covers ROW_BLOCK_ELEMENTS elements."""
        if self.cols == 0:
            return 1
        wanted = -(-ROW_BLOCK_ELEMENTS // self.cols)
        return 1 << (wanted - 1).bit_length()

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.row_block)

"""The constants and the arithmetic of docs/format.md: where rows, words, row blocks and sections lie.

Every number of the format stands here and nowhere else; the C++ kernels receive them as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from endor.errors import FormatError

__all__ = [
    "BLOCK_ALIGNMENT_BYTES",
    "FORMAT_VERSION",
    "HEADER_LIMIT_BYTES",
    "MAX_ELEMENTS",
    "MAX_INTEGER",
    "MAX_RANK",
    "METADATA_KEY",
    "PADDING_PREFIX",
    "PREFIX_BYTES",
    "ROW_BLOCK_ELEMENTS",
    "SECTION_ALIGNMENT_BYTES",
    "WORD_BITS",
    "Geometry",
    "align_up",
    "check_shape",
]

FORMAT_VERSION = 1
METADATA_KEY = "endor"
"""Key of the safetensors `__metadata__` map that holds Endor's part of the header."""
PADDING_PREFIX = "endor.padding."
"""Names of the filler tensors that keep the file free of holes."""
PREFIX_BYTES = 8
"""A safetensors file starts with the length of its header, little-endian."""
HEADER_LIMIT_BYTES = 100_000_000
"""The safetensors library refuses longer headers."""
BLOCK_ALIGNMENT_BYTES = 4096
"""O_DIRECT and GPUDirect transfer whole pages."""
SECTION_ALIGNMENT_BYTES = 64
"""One cache line, one AVX-512 register."""
WORD_BITS = 64
"""Bitmap rows are padded to whole words of this many bits."""
ROW_BLOCK_ELEMENTS = 4096
"""A row offset is stored per run of rows with at least this many elements: 32 / 4096 < 0.01 b/w."""
MAX_INTEGER = 2**62
"""No integer of a header is larger, so that sums and differences of two fit 64 signed bits."""
MAX_ELEMENTS = 2**59
"""No tensor has more: its bytes, at 8 each, and every stride then fit MAX_INTEGER."""
MAX_RANK = 16


def align_up(n: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `n`."""
    return -(-n // alignment) * alignment


@dataclass(frozen=True)
class Geometry:
    """A tensor of any rank >= 1 seen as a matrix: its last dimension are the columns, the others the rows.

    Attributes:
        rows: product of all sizes but the last.
        cols: the last size.
        matrix_rows: rows of one matrix in a stack of them (an expert in a 3-D parameter); 0 where there is no
        stack.
    """

    rows: int
    cols: int
    matrix_rows: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Geometry:
        """Geometry of `shape`; a vector is one row. Raises FormatError for a scalar or an overflow."""
        if not shape:
            raise FormatError("a scalar has no rows and cannot be packed; store it dense")
        check_shape(shape)
        return cls(rows=math.prod(shape[:-1]), cols=shape[-1], matrix_rows=shape[-2] if len(shape) > 2 else 0)

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def words_per_row(self) -> int:
        return -(-self.cols // WORD_BITS)

    @property
    def bitmap_row_bytes(self) -> int:
        return self.words_per_row * (WORD_BITS // 8)

    @cached_property
    def row_block(self) -> int:
        """Rows that share one row offset, a power of two.

        The smallest that covers ROW_BLOCK_ELEMENTS elements, but never one that straddles two matrices of a
        stack: any run of experts is then a run of whole row blocks.
        """
        if self.cols == 0:
            return _power_of_two_from(self.rows)  # one row block: without elements there is nothing to divide
        block = _power_of_two_from(-(-ROW_BLOCK_ELEMENTS // self.cols))
        return min(block, self.matrix_rows & -self.matrix_rows) if self.matrix_rows else block

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.row_block)


def check_shape(shape: tuple[int, ...], *, where: str = "tensor") -> None:
    """Raises FormatError for a shape whose strides, element count or rank no reader could hold."""
    if len(shape) > MAX_RANK:
        raise FormatError(f"{where} has {len(shape)} dimensions; at most {MAX_RANK} are possible [F4]")
    # A size of zero must not hide an overflow of the others: strides are products of them.
    if any(n < 0 for n in shape) or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise FormatError(
            f"{where}: shape {list(shape)} is negative or overflows {MAX_ELEMENTS} elements [F4]"
        )


def _power_of_two_from(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()

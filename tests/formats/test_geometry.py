"""Row blocks: where offsets point, for every shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given

from endor.errors import FormatError
from endor.formats import Geometry
from endor.formats.layout import MAX_ELEMENTS, ROW_BLOCK_ELEMENTS, align_up
from tests.support.strategies import packable_shapes


@given(packable_shapes())
def test_row_blocks_are_powers_of_two_that_cover_enough_elements(shape: tuple[int, ...]) -> None:
    g = Geometry.of(shape)
    assert g.row_block & (g.row_block - 1) == 0
    assert g.rows * g.cols == math.prod(shape)
    assert (g.row_blocks - 1) * g.row_block < g.rows <= g.row_blocks * g.row_block
    if len(shape) < 3:
        assert g.row_block * g.cols >= ROW_BLOCK_ELEMENTS
        assert g.row_block == 1 or g.row_block // 2 * g.cols < ROW_BLOCK_ELEMENTS


@given(packable_shapes())
def test_no_row_block_straddles_two_matrices_of_a_stack(shape: tuple[int, ...]) -> None:
    g = Geometry.of(shape)
    if len(shape) > 2:
        assert shape[-2] % g.row_block == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4096, 11008), (4096, 11008, 1, 4096, 172)),
        ((2048, 2048), (2048, 2048, 2, 1024, 32)),
        ((2, 5), (2, 5, 1024, 1, 1)),
        ((70,), (1, 70, 64, 1, 2)),
        ((128, 768, 2048), (98304, 2048, 2, 49152, 32)),
        ((3, 6, 33), (18, 33, 2, 9, 1)),
        ((3, 7, 33), (21, 33, 1, 21, 1)),
        ((0, 5), (0, 5, 1024, 0, 1)),
        ((5, 0), (5, 0, 8, 1, 0)),
        ((2**40, 0), (2**40, 0, 2**40, 1, 0)),
    ],
    ids=str,
)
def test_geometry_of_known_shapes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Rows, columns, rows per block, blocks, words per row."""
    g = Geometry.of(shape)
    assert (g.rows, g.cols, g.row_block, g.row_blocks, g.words_per_row) == expected
    assert g.bitmap_row_bytes == 8 * g.words_per_row


@pytest.mark.parametrize("shape", [(), (-1, 4), (2**30, 2**30), (2**59 + 1,), (1,) * 17], ids=str)
def test_impossible_shapes_have_no_geometry(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        Geometry.of(shape)
    assert Geometry.of((MAX_ELEMENTS,)).numel == MAX_ELEMENTS


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_align_up(n: int, expected: int) -> None:
    assert align_up(n, 64) == expected

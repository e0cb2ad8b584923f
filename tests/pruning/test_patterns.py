"""Patterns keep exactly what their rule says, whatever the scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from endor.errors import ConvertError
from endor.pruning import NofM, Unstructured, parse_pattern
from endor.pruning.patterns import Scores


def scores_of(draw: st.DrawFn, rows: int, columns: int) -> Scores:
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32]))
    # Few distinct values: ties are what goes wrong.
    values = draw(st.lists(st.integers(0, 5), min_size=rows * columns, max_size=rows * columns))
    return np.array(values, dtype).reshape(rows, columns)


@st.composite
def matrices(draw: st.DrawFn, multiple: int = 1) -> Scores:
    return scores_of(draw, draw(st.integers(1, 5)), multiple * draw(st.integers(1, 9)))


@given(matrices(), st.floats(0, 0.99))
def test_matrix_count_is_exact_and_the_highest_stay(scores: Scores, sparsity: float) -> None:
    keep = Unstructured(sparsity).keep(scores, per_row=False)
    assert keep.size - keep.sum() == int(sparsity * scores.size + 1e-6)
    if keep.any() and not keep.all():
        assert scores[keep].min() >= scores[~keep].max()


@given(matrices(), st.floats(0, 0.99))
def test_row_counts_are_exact_and_the_highest_stay(scores: Scores, sparsity: float) -> None:
    pattern = Unstructured(sparsity)
    keep = pattern.keep(scores, per_row=True)
    for row, kept in zip(scores, keep, strict=True):
        order = np.argsort(row, kind="stable")
        expected = np.ones(row.size, bool)
        expected[order[: int(sparsity * row.size + 1e-6)]] = False
        assert np.array_equal(kept, expected)
    assert keep.sum() == pattern.kept_at_most(*scores.shape, per_row=True)


@given(matrices(multiple=4))
def test_two_of_four_keeps_the_two_highest_of_each_group(scores: Scores) -> None:
    keep = NofM(2, 4).keep(scores, per_row=True)
    for group, kept in zip(scores.reshape(-1, 4), keep.reshape(-1, 4), strict=True):
        expected = np.ones(4, bool)
        expected[np.argsort(group, kind="stable")[:2]] = False
        assert np.array_equal(kept, expected)


@given(matrices(multiple=8))
def test_four_of_eight_keeps_four_of_each_group(scores: Scores) -> None:
    keep = NofM(4, 8).keep(scores, per_row=False).reshape(-1, 8)
    assert (keep.sum(1) == 4).all()
    groups = scores.reshape(-1, 8)
    assert (np.where(keep, groups, 99).min(1) >= np.where(keep, 0, groups).max(1)).all()


def test_choosing_does_not_change_the_scores() -> None:
    scores = np.arange(16, dtype=np.uint16).reshape(2, 8)
    before = scores.copy()
    Unstructured(0.5).keep(scores, per_row=False)
    NofM(2, 4).keep(scores, per_row=False)
    assert np.array_equal(scores, before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ConvertError, match="at least 0 and below 1"):
        Unstructured(sparsity)


def test_width_that_the_pattern_does_not_divide_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConvertError, match=r"layer\.weight: its input width 10 .* multiple of 4.*--exclude"):
        NofM(2, 4).check_shape("layer.weight", 10)


@pytest.mark.parametrize("text", ["3:2", "0:4", "4:4"])
def test_impossible_groups_are_refused(text: str) -> None:
    with pytest.raises(ConvertError):
        parse_pattern(text, sparsity=0.5)


def test_unknown_pattern_is_refused() -> None:
    with pytest.raises(ConvertError, match="unknown pattern 'blocks'"):
        parse_pattern("blocks", sparsity=0.5)


def test_sparsity_that_the_pattern_cannot_have_is_refused() -> None:
    with pytest.raises(ConvertError, match=r"2:4 always has sparsity 0\.5"):
        parse_pattern("2:4", sparsity=0.6)

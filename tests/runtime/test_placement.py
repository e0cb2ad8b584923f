"""The placement keeps within its budget, uses it, and spreads what is resident."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from endor.errors import PlanError
from endor.runtime.placement import plan_placement, spread

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@given(SIZES, st.integers(1000, 40_000))
def test_resident_blocks_fit_the_budget_and_no_other_would(sizes: list[int], budget: int) -> None:
    placement = plan_placement([str(i) for i in range(len(sizes))], sizes, host_bytes=budget)
    used = sum(sizes[i] for i in placement.host)
    assert used <= budget
    assert all(used + sizes[i] > budget for i in placement.disk)
    assert sorted((*placement.host, *placement.disk)) == list(range(len(sizes)))


def test_a_budget_of_zero_streams_every_block() -> None:
    assert plan_placement(["a", "b"], [10, 10], host_bytes=0).disk == (0, 1)


def test_half_of_equal_blocks_are_every_second_one() -> None:
    placement = plan_placement([str(i) for i in range(8)], [10] * 8, host_bytes=40)
    assert placement.host == (1, 3, 5, 7)


@given(st.integers(1, 60), st.integers(0, 60))
def test_spread_has_the_count_and_even_gaps(total: int, count: int) -> None:
    count = min(count, total)
    chosen = spread(count, total)
    assert len(chosen) == count
    gaps = [b - a for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("budget", [-1, 1, 9])
def test_a_budget_for_no_block_is_refused_with_what_is_needed(budget: int) -> None:
    with pytest.raises(PlanError, match="'b', needs 10 bytes"):
        plan_placement(["a", "b"], [20, 10], host_bytes=budget)


def test_a_model_without_blocks_needs_no_placement() -> None:
    assert plan_placement([], [], host_bytes=0).counts() == {"device": 0, "host": 0, "disk": 0}

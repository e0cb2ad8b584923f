"""The simulated ring, and placements of blocks of uneven size that leave the disk no time to rest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from endor.errors import PlanError
from endor.runtime.overlap import Overlap, Step, overlap
from endor.runtime.placement import plan_placement, spread


def run(sizes: Sequence[int], host: Sequence[int], *, slowness: float, depth: int = 2) -> Overlap:
    """A pass over blocks that take a second of work per byte, and to be read `slowness` times that."""
    resident = set(host)
    steps = [Step(size, 0.0 if i in resident else size * slowness) for i, size in enumerate(sizes)]
    return overlap(steps, depth=depth)


def by_number(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """As many blocks as fit, evenly apart by number: what uneven sizes make idle."""
    for count in range(len(sizes), 0, -1):
        chosen = spread(count, len(sizes))
        if sum(sizes[i] for i in chosen) <= budget:
            return chosen
    return ()


def test_nothing_read_ahead_is_a_sum() -> None:
    assert overlap([Step(1, 2), Step(3, 4)], depth=0) == Overlap(pass_s=10, stall_s=6, disk_idle_s=4)


def test_reading_ahead_hides_the_shorter_side() -> None:
    assert overlap([Step(1, 2)] * 4, depth=1).pass_s == 8
    assert overlap([Step(2, 1)] * 4, depth=1).pass_s == 8
    assert overlap([Step(2, 1)] * 4, depth=1).stall_s == 0


def test_one_streamed_unit_is_read_while_it_is_used() -> None:
    assert overlap([Step(3), Step(1, 2)], depth=2).pass_s == 4


def test_copying_overlaps_with_reading_and_work() -> None:
    assert overlap([Step(1, 2, 3)] * 5, depth=2).pass_s == pytest.approx(15)


def test_a_ring_that_is_full_makes_the_disk_rest() -> None:
    clustered = [Step(1, 2)] * 4 + [Step(1)] * 4  # as long to read as to work on
    assert overlap(clustered, depth=1).disk_idle_s > 1
    assert overlap([Step(1, 2), Step(1)] * 4, depth=1).disk_idle_s == 0


@pytest.mark.parametrize("step", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_a_step_that_takes_less_than_no_time_is_refused(step: tuple[int, int, int]) -> None:
    with pytest.raises(PlanError, match="0 seconds or more"):
        Step(*step)


UNEVEN = {
    "sizes rise and fall": [3, 9] * 8,
    "small ones first": [2] * 8 + [8] * 8,
    "a large head": [4] * 20 + [24],
    "a large head and tail": [24, *[4] * 20, 24],
}


@pytest.mark.parametrize("sizes", UNEVEN.values(), ids=UNEVEN.keys())
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("slowness", [0.5, 1, 2, 4])
def test_uneven_blocks_are_as_fast_as_evenly_numbered_ones_at_any_disk(
    sizes: list[int], share: float, slowness: float
) -> None:
    budget = int(sum(sizes) * share)
    ours = run(sizes, _placed(sizes, budget), slowness=slowness)
    theirs = run(sizes, by_number(sizes, budget), slowness=slowness)
    assert ours.pass_s <= theirs.pass_s * 1.02


def test_sizes_that_rise_and_fall_make_a_disk_rest_unless_bytes_are_spread() -> None:
    sizes = UNEVEN["sizes rise and fall"]
    budget, slowness = sum(sizes) // 2, 2.0  # what is left to read takes as long as all the work
    evenly_numbered = run(sizes, by_number(sizes, budget), slowness=slowness)
    ours = run(sizes, _placed(sizes, budget), slowness=slowness)
    assert evenly_numbered.pass_s > 1.1 * sum(sizes)
    assert evenly_numbered.disk_idle_s > 0.05 * sum(sizes)
    assert ours.disk_idle_s == pytest.approx(0, abs=1e-9)
    assert ours.pass_s == pytest.approx(sum(sizes))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=24), st.integers(1, 9))
def test_bytes_that_stay_are_no_fewer_than_evenly_numbered_blocks_would_be(
    sizes: list[int], tenths: int
) -> None:
    budget = sum(sizes) * tenths // 10
    if budget < min(sizes):
        budget = 0

    def passes_s(host: tuple[int, ...]) -> float:
        balanced = sum(sizes) / max(1, sum(sizes) - budget)
        return sum(run(sizes, host, slowness=balanced * factor).pass_s for factor in (0.75, 1.0, 1.5))

    assert passes_s(_placed(sizes, budget)) <= passes_s(by_number(sizes, budget)) * (1 + 1e-6)


def _placed(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    return plan_placement([str(i) for i in range(len(sizes))], sizes, host_bytes=budget).host

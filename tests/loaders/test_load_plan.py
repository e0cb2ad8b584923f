"""Plans cannot be built wrong, and the memory they ask for is enough and not wasteful."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from endor.errors import PlanError
from endor.loaders import PAGE_BYTES, LoadPlan, ReadOp, Unit
from endor.loaders.plan import first_fit

FILE = Path("model.safetensors")


def unit(name: str, pages: int) -> Unit:
    return Unit(name, (ReadOp(FILE, 0, pages * PAGE_BYTES),))


def units(*pages: int) -> tuple[Unit, ...]:
    return tuple(unit(f"unit {index}", count) for index, count in enumerate(pages))


@pytest.mark.parametrize(
    ("file", "offset_bytes", "length_bytes", "message"),
    [
        ("model.safetensors", 0, 1, "pathlib.Path, found str"),
        (FILE, -1, 1, "offset >= 0, found -1"),
        (FILE, 0, 0, "at least one byte, found 0"),
    ],
    ids=["path-is-text", "negative-offset", "empty"],
)
def test_read_that_means_nothing_is_refused(
    file: Path, offset_bytes: int, length_bytes: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        ReadOp(file, offset_bytes, length_bytes)


def test_unit_without_name_or_reads_is_refused() -> None:
    with pytest.raises(PlanError, match="needs a name"):
        Unit("", (ReadOp(FILE, 0, 1),))
    with pytest.raises(PlanError, match="'empty' reads nothing"):
        Unit("empty", ())


def test_plan_without_units_negative_depth_or_unique_names_is_refused() -> None:
    with pytest.raises(PlanError, match="at least one unit"):
        LoadPlan((), depth=1)
    with pytest.raises(PlanError, match="found -1"):
        LoadPlan(units(1), depth=-1)
    with pytest.raises(PlanError, match="'twice' is used twice"):
        LoadPlan((unit("twice", 1), unit("twice", 2)), depth=1)


def test_reads_keep_their_place_within_a_page() -> None:
    ops = (ReadOp(FILE, 4096, 5000), ReadOp(FILE, 100, 10), ReadOp(FILE, 8191, 2), ReadOp(FILE, 0, 1))
    made = Unit("ragged", ops)
    assert made.op_offsets == (0, 8192 + 100, 12288 + 4095, 20480)
    assert made.span_bytes == 24576
    assert made.total_bytes == 5013


def test_sizes_of_a_plan_are_those_of_its_units() -> None:
    plan = LoadPlan(units(1, 5, 2), depth=0)
    assert plan.largest_unit_bytes == 5 * PAGE_BYTES
    assert plan.total_bytes == 8 * PAGE_BYTES
    assert plan.ring_bytes == 5 * PAGE_BYTES


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 22])
def test_equal_units_need_one_place_more_than_the_depth(count: int, depth: int) -> None:
    assert LoadPlan(units(*[7] * count), depth).ring_bytes == (depth + 1) * 7 * PAGE_BYTES


def test_one_large_unit_does_not_make_every_place_large() -> None:
    plan = LoadPlan(units(*[50] * 22, 131), depth=2)
    assert plan.ring_bytes <= (131 + 3 * 50) * PAGE_BYTES < 3 * plan.largest_unit_bytes


@given(
    pages=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    depth=st.integers(0, 5),
)
def test_ring_holds_the_unit_in_use_and_those_ahead_for_ever(pages: list[int], depth: int) -> None:
    plan = LoadPlan(units(*pages), depth)
    live: deque[tuple[int, int]] = deque(maxlen=depth)
    for position in range(5 * len(pages)):
        size = plan.units[position % len(pages)].span_bytes
        start = first_fit(live, size)
        assert start + size <= plan.ring_bytes
        assert all(start >= end or start + size <= begin for begin, end in live)
        live.append((start, start + size))


def test_first_fit_takes_the_lowest_gap_that_is_long_enough() -> None:
    taken = [(30, 40), (0, 10), (15, 20)]
    assert first_fit(taken, 5) == 10
    assert first_fit(taken, 10) == 20
    assert first_fit(taken, 11) == 40
    assert first_fit([], 11) == 0

"""Which blocks of a device's three tiers: passes are as short as link, disk and work allow, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from endor.errors import PlanError
from endor.runtime.overlap import Step, overlap
from endor.runtime.placement import Placement, plan_tiers, spread

UNIFORM = [100] * 40
MIXED = {
    "uniform": UNIFORM,
    "small and large in turn": [60, 140] * 20,
    "one small, three large": [40, 160, 160, 160] * 10,
    "with a head": [*UNIFORM, 260],
}
WORK = 400.0
"""Bytes per second, where the link has 20."""


def tiers(sizes: Sequence[int], device: float, host: float, *, depth: int = 2) -> Placement:
    """With budgets of these shares of all bytes."""
    budgets = [int(share * sum(sizes)) for share in (device, host)]
    names = [str(i) for i in range(len(sizes))]
    return plan_tiers(names, sizes, device_bytes=budgets[0], host_bytes=budgets[1], depth=depth)


def timed(
    sizes: Sequence[int],
    placement: Placement,
    *,
    link: float,
    disk: float,
    depth: int = 2,
    work: float = WORK,
) -> tuple[float, float]:
    """Seconds of a pass, and the bound that work, link and disk set."""
    steps = [
        Step(
            work_s=size / work,
            read_s=size / disk if i in placement.disk else 0.0,
            copy_s=0.0 if i in placement.device else size / link,
        )
        for i, size in enumerate(sizes)
    ]
    bound = max(sum(getattr(step, part) for step in steps) for part in ("work_s", "read_s", "copy_s"))
    return overlap(steps, depth=depth).pass_s, bound


def slowness(sizes: Sequence[int], placement: Placement, **rates: Any) -> float:
    """Of a pass, in times of the bound."""
    pass_s, bound_s = timed(sizes, placement, **rates)
    return pass_s / bound_s


def by_number(sizes: Sequence[int], device: float, host: float) -> Placement:
    """Each tier evenly apart by number among what is left: what uneven sizes make wait."""
    near = _spread(sizes, range(len(sizes)), int(device * sum(sizes)))
    rest = [i for i in range(len(sizes)) if i not in near]
    far = _spread(sizes, rest, int(host * sum(sizes)))
    return Placement(far, tuple(i for i in rest if i not in far), near)


def _spread(sizes: Sequence[int], among: Sequence[int], budget: int) -> tuple[int, ...]:
    sets = (tuple(among[i] for i in spread(n, len(among))) for n in range(len(among), -1, -1))
    return next(chosen for chosen in sets if sum(sizes[i] for i in chosen) <= budget)


@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("device", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("work", [400.0, 60.0, 30.0])
def test_link_alone_is_always_busy(sizes: list[int], device: float, work: float) -> None:
    placement = tiers(sizes, device, 1.0)
    assert placement.disk == ()
    assert slowness(sizes, placement, link=20, disk=1, work=work) <= 1.02


@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize(("device", "host"), [(0.0, 0.5), (0.25, 0.5), (0.5, 0.25), (0.25, 0.0)])
def test_disk_and_link_are_both_busy_where_both_matter(sizes: list[int], device: float, host: float) -> None:
    placement = tiers(sizes, device, host, depth=4)
    read = sum(sizes[i] for i in placement.disk)
    copied = read + sum(sizes[i] for i in placement.host)
    assert slowness(sizes, placement, link=20, disk=20 * read / copied, depth=4) <= 1.06


@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize(("device", "host"), [(0.25, 0.5), (0.25, 0.65), (0.0, 0.9), (0.5, 0.1)])
@pytest.mark.parametrize(("link", "disk"), [(20.0, 3.0), (25.0, 6.0), (12.0, 6.0)])
def test_two_units_ahead_do_for_a_few_blocks_from_disk_among_many_of_the_host(
    sizes: list[int], device: float, host: float, link: float, disk: float
) -> None:
    assert slowness(sizes, tiers(sizes, device, host), link=link, disk=disk) <= 1.005


@pytest.mark.parametrize(("host", "disk", "most"), [(0.5, 6.0, 1.03), (0.25, 12.0, 1.02), (0.0, 3.0, 1.001)])
def test_two_units_ahead_do_for_blocks_of_one_size(host: float, disk: float, most: float) -> None:
    assert slowness(UNIFORM, tiers(UNIFORM, 0.25, host), link=12, disk=disk) <= most


@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize(("device", "host"), [(0.0, 0.5), (0.0, 0.8), (0.25, 0.5), (0.5, 0.25), (0.5, 0.4)])
@pytest.mark.parametrize("depth", [2, 4])
def test_tiers_are_not_slower_than_evenly_numbered_ones(
    sizes: list[int], device: float, host: float, depth: int
) -> None:
    rates: dict[str, Any] = {"link": 12.0, "disk": 6.0, "depth": depth}
    ours, _ = timed(sizes, tiers(sizes, device, host, depth=depth), **rates)
    theirs, _ = timed(sizes, by_number(sizes, device, host), **rates)
    assert ours <= 1.05 * theirs


SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=24)


@settings(deadline=None)
@given(SIZES, st.integers(0, 10), st.integers(0, 10), st.integers(0, 3))
def test_tiers_hold_every_block_once_and_are_within_their_budgets(
    sizes: list[int], device_tenths: int, host_tenths: int, depth: int
) -> None:
    budgets = [n * sum(sizes) // 10 for n in (device_tenths, host_tenths)]
    budgets = [budget if budget >= min(sizes) else 0 for budget in budgets]
    names = [str(i) for i in range(len(sizes))]
    found = plan_tiers(names, sizes, device_bytes=budgets[0], host_bytes=budgets[1], depth=depth)
    assert sorted((*found.device, *found.host, *found.disk)) == list(range(len(sizes)))
    for tier, budget in zip((found.device, found.host), budgets, strict=True):
        used = sum(sizes[i] for i in tier)
        assert used <= budget
        assert all(used + sizes[i] > budget for i in found.disk)


def test_each_budget_for_no_block_is_refused() -> None:
    for device_bytes, host_bytes in ((5, 0), (0, 5)):
        with pytest.raises(PlanError, match="a memory budget of 5 bytes holds no block"):
            plan_tiers(["a", "b"], [10, 20], device_bytes=device_bytes, host_bytes=host_bytes)
    assert plan_tiers([], [], device_bytes=0, host_bytes=0).counts() == {"device": 0, "host": 0, "disk": 0}

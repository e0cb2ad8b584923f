"""What the planner decides and predicts, from sizes, budgets and rates alone: no file, no hardware."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from endor.errors import PlanError
from endor.loaders.plan import PAGE_BYTES, round_up
from endor.runtime.planner import (
    BlockSize,
    Budgets,
    ExpertSize,
    ModelSizes,
    Overheads,
    Piece,
    Rates,
    TableSize,
    Timing,
    check_room,
    decide,
    plan,
)

MIB = 1 << 20
RATES = Rates(disk_bytes_per_s=1e9, work_bytes_per_s=4e9)


def piece(nbytes: int, *, stored: int = 0, cast: int = 0) -> Piece:
    return Piece(nbytes, round_up(nbytes, PAGE_BYTES), stored, cast, {"bitmap/raw": nbytes})


def blocks(*sizes: int) -> tuple[BlockSize, ...]:
    return tuple(BlockSize(f"layer.{i}", piece(size)) for i, size in enumerate(sizes))


def layers(count: int = 8, *, mib: int = 10) -> ModelSizes:
    return ModelSizes(blocks(*[mib * MIB] * count), dense_bytes=MIB)


def test_time_is_that_of_the_slower_side() -> None:
    streamed = plan(layers(), Budgets(0), RATES, depth=2).timing
    assert streamed.token_s == pytest.approx(80 * MIB / 1e9)
    assert streamed.bound == "disk"
    assert streamed.exposed_s == pytest.approx(0.0)
    kept = plan(layers(), Budgets(80 * MIB), RATES, depth=2).timing
    assert kept.token_s == pytest.approx(80 * MIB / 4e9)
    assert kept.bound == "work"


def test_half_the_model_kept_doubles_the_speed_where_the_disk_decides() -> None:
    none, half = (plan(layers(), Budgets(n * MIB), RATES, depth=2).timing for n in (0, 40))
    assert half.tokens_per_s == pytest.approx(2 * none.tokens_per_s)


def test_without_reading_ahead_everything_adds_up() -> None:
    timing = plan(layers(), Budgets(0), RATES, depth=0).timing
    assert timing.token_s == pytest.approx(80 * MIB / 1e9 + 80 * MIB / 4e9)
    assert timing.exposed_s == pytest.approx(80 * MIB / 4e9)


def test_bytes_per_token_are_those_of_the_tiers() -> None:
    sizes = replace(layers(), tables=(TableSize("embed", 64 * MIB, 64 * MIB, 4096),))
    some = plan(sizes, Budgets(30 * MIB), RATES, depth=2)
    assert (some.traffic.host, some.traffic.disk) == (30 * MIB, 50 * MIB + 4096)
    every = plan(sizes, Budgets(200 * MIB), RATES, depth=2)
    assert (every.traffic.host, every.traffic.disk) == (80 * MIB, 0)
    assert every.decision.memory.dense == 65 * MIB


def test_memory_has_every_part_and_the_ring_all_that_is_ahead() -> None:
    sizes = replace(
        layers(),
        blocks=(*layers().blocks[:-1], BlockSize("head", piece(40 * MIB, stored=7 * MIB, cast=14 * MIB))),
    )
    memory = decide(sizes, Budgets(20 * MIB), depth=2).memory
    assert memory.resident == 20 * MIB
    assert memory.ring >= 60 * MIB  # the head and a layer on either side
    assert memory.scratch == (8 + 14) * MIB  # whole huge pages
    assert memory.dense == MIB
    assert memory.total == memory.ring + memory.resident + memory.experts + memory.scratch + memory.dense


def test_head_in_tiles_needs_a_ring_for_tiles() -> None:
    tiles = tuple(piece(10 * MIB) for _ in range(4))
    whole = replace(layers(), blocks=(*blocks(10 * MIB, 10 * MIB), BlockSize("head", piece(40 * MIB))))
    tiled = replace(whole, blocks=(*whole.blocks[:-1], BlockSize("head", piece(40 * MIB), tiles)))
    assert decide(whole, Budgets(0), depth=1).memory.ring >= 50 * MIB
    assert decide(tiled, Budgets(0), depth=1).memory.ring == 20 * MIB
    assert decide(tiled, Budgets(60 * MIB), depth=1).memory.ring == 0


def test_kinds_are_worked_on_at_their_own_rate() -> None:
    rates = replace(RATES, kinds={"bitmap/raw": 8e9})
    assert rates.work_s(16, {"bitmap/raw": 8, "dense/raw": 8}) == pytest.approx(8 / 8e9 + 8 / 4e9)
    timing = plan(layers(), Budgets(80 * MIB), rates, depth=2).timing
    assert timing.work_s == pytest.approx(80 * MIB / 8e9)


def test_what_does_not_depend_on_bytes_is_added() -> None:
    overheads = Overheads(block_s=1.0, cold_s=0.5, cold_bytes=10 * MIB, streamed_s=0.25, token_s=2.0)
    kept, streamed = (
        plan(layers(), Budgets(n * MIB), replace(RATES, overheads=overheads), depth=2).timing.work_s
        for n in (80, 0)
    )
    assert kept == pytest.approx(80 * MIB / 4e9 + 8 * 1.5 + 2.0)
    assert streamed == pytest.approx(kept + 8 * 0.25)
    small = plan(layers(mib=9), Budgets(80 * MIB), replace(RATES, overheads=overheads), depth=2).timing
    assert small.work_s == pytest.approx(72 * MIB / 4e9 + 8 * 1.0 + 2.0)


def test_reading_slows_work_down_while_it_lasts() -> None:
    rates = replace(RATES, overheads=Overheads(slowdown=0.5))
    idle, busy = (plan(layers(), Budgets(n * MIB), rates, depth=2).timing.work_s for n in (80, 0))
    assert busy == pytest.approx(1.5 * idle)
    half = plan(layers(), Budgets(70 * MIB), rates, depth=2).timing
    assert half.work_s == pytest.approx(idle + 0.5 * half.read_s)


# Budgets.


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    st.lists(st.integers(1, 3000), max_size=3),
    st.integers(1000, 30_000),
    st.integers(0, 4),
)
def test_what_stays_is_within_the_budget(
    sizes: list[int], tables: list[int], budget: int, depth: int
) -> None:
    embeddings = tuple(TableSize(f"t{i}", n, n, 1) for i, n in enumerate(tables))
    model = ModelSizes(blocks(*sizes), embeddings)
    decision = decide(model, Budgets(budget), depth=depth)
    used = sum(sizes[i] for i in decision.placement.host)
    used += sum(table.nbytes for table in embeddings if table.name in decision.dense_tables)
    assert used <= budget
    assert sorted((*decision.placement.host, *decision.placement.disk)) == list(range(len(sizes)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(0, 3))
def test_more_memory_is_never_slower_by_more_than_what_cannot_be_divided(
    sizes: list[int], depth: int
) -> None:
    model = ModelSizes(blocks(*sizes))
    budgets = [0, *range(max(sizes), sum(sizes) + max(sizes), max(1, sum(sizes) // 5))]
    times = [plan(model, Budgets(n), RATES, depth=depth).timing.token_s for n in budgets]
    assert all(later <= earlier + max(sizes) / 1e9 * 2 for earlier, later in pairwise(times))
    assert times[-1] <= times[0]


def test_budget_for_no_block_says_what_would_do() -> None:
    expected = r"memory budget of 100 bytes holds no block: the smallest, 'layer.0', needs 10485760 bytes.*"
    with pytest.raises(
        PlanError, match=expected + r"0 to stream every block; all blocks together need 83886080"
    ):
        decide(layers(), Budgets(100), depth=2)


def test_plan_larger_than_the_free_memory_says_which_budget_fits() -> None:
    check_room(layers(), Budgets(80 * MIB), depth=2, free_bytes=90 * MIB)
    check_room(layers(), Budgets(80 * MIB), depth=2, free_bytes=None)
    with pytest.raises(PlanError, match=r"83886080 bytes of memory are needed, 73400320 are free.*") as error:
        check_room(layers(), Budgets(80 * MIB), depth=2, free_bytes=70 * MIB)
    fits = int(str(error.value).rpartition("host_memory=")[2].split()[0])
    assert fits > 0
    check_room(layers(), Budgets(fits), depth=2, free_bytes=70 * MIB)


def test_memory_for_no_plan_says_what_is_needed_at_least() -> None:
    with pytest.raises(PlanError, match="at least 10485760 bytes are needed, with host_memory=0 and depth=0"):
        check_room(layers(), Budgets(0), depth=2, free_bytes=MIB)
    check_room(layers(), Budgets(0), depth=0, free_bytes=10 * MIB)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_rate_that_moves_nothing_is_refused(rate: float) -> None:
    with pytest.raises(PlanError, match="disk bandwidth must be more than 0 bytes/s"):
        Rates(rate, 1.0)
    with pytest.raises(PlanError, match="memory bandwidth must be more than 0 bytes/s"):
        Rates(1.0, rate)


# Experts.


def moe(*, count: int = 64, routed: int = 8) -> ModelSizes:
    experts = tuple(ExpertSize(count, routed, piece(MIB, stored=2 * MIB)) for _ in range(4))
    return replace(layers(4), experts=experts)


def test_only_routed_experts_are_read() -> None:
    none = plan(moe(), Budgets(0), RATES, depth=2)
    assert none.traffic.disk == 4 * 10 * MIB + 4 * 8 * MIB
    assert none.decision.memory.experts == 4 * MIB  # three in the ring's depth, in whole huge pages
    assert plan(moe(routed=16), Budgets(0), RATES, depth=2).traffic.disk == 4 * 10 * MIB + 4 * 16 * MIB


def test_experts_that_stay_are_hit_as_often_as_their_share() -> None:
    half = plan(moe(), Budgets(40 * MIB + 128 * MIB), RATES, depth=2)
    assert half.decision.expert_slots == 128
    assert half.traffic.disk == pytest.approx(4 * 8 * MIB / 2, rel=1e-3)
    every = plan(moe(), Budgets(40 * MIB + 256 * MIB), RATES, depth=2)
    assert every.traffic.disk == 0
    assert every.timing.exposed_s == pytest.approx(0.0)


def test_fewer_slots_than_a_token_routes_to_hit_nothing() -> None:
    few = plan(moe(), Budgets(40 * MIB + 31 * MIB), RATES, depth=2)
    assert few.traffic.disk == 4 * 8 * MIB


def test_first_expert_of_a_layer_waits_for_the_router() -> None:
    fast_disk = Rates(disk_bytes_per_s=8e9, work_bytes_per_s=1e9)
    timing = plan(moe(), Budgets(40 * MIB), fast_disk, depth=2).timing
    assert timing.bound == "work"
    assert timing.exposed_s == pytest.approx(4 * MIB / 8e9)


def test_missing_experts_hide_behind_those_that_are_there() -> None:
    disk_as_fast_as_half_the_work = Rates(disk_bytes_per_s=1e9, work_bytes_per_s=0.5e9)
    timing = plan(moe(), Budgets(40 * MIB + 128 * MIB), disk_as_fast_as_half_the_work, depth=2).timing
    assert timing.exposed_s == pytest.approx(4 * MIB / 1e9 / 2)  # half of the layers' first ones are missing


def test_short_reads_of_experts_are_slower_and_cost_work() -> None:
    overheads = Overheads(expert_s=1.0, expert_read_s=0.5, expert_disk_share=0.5)
    plain = plan(moe(), Budgets(40 * MIB), RATES, depth=2).timing
    found = plan(moe(), Budgets(40 * MIB), replace(RATES, overheads=overheads), depth=2).timing
    assert found.read_s == pytest.approx(2 * plain.read_s)
    assert found.work_s == pytest.approx(plain.work_s + 4 * 8 * 1.5)


@pytest.mark.parametrize("routed", [0, 65])
def test_experts_that_nobody_has_are_refused(routed: int) -> None:
    with pytest.raises(PlanError, match=f"of 64 experts a token takes 1 to 64, found {routed}"):
        moe(routed=routed)


# A device with its own memory.


def test_tiers_of_a_device_are_filled_from_the_top() -> None:
    found = plan(layers(), Budgets(20 * MIB, 30 * MIB), replace(RATES, copy_bytes_per_s=2e9), depth=2)
    assert found.decision.placement.counts() == {"device": 3, "host": 2, "disk": 3}
    assert (found.traffic.device, found.traffic.host, found.traffic.disk) == (30 * MIB, 20 * MIB, 30 * MIB)
    assert found.timing.copy_s == pytest.approx(50 * MIB / 2e9)
    assert found.decision.host_memory is not None
    assert found.decision.host_memory.resident == 20 * MIB
    assert found.decision.memory.resident == 30 * MIB


def test_copying_decides_where_the_link_is_slowest() -> None:
    rates = Rates(1e9, 4e9, copy_bytes_per_s=0.5e9)
    timing = plan(layers(), Budgets(80 * MIB, 0), rates, depth=2).timing
    assert timing.bound == "copy"
    assert timing.token_s == pytest.approx(80 * MIB / 0.5e9)


def test_timing_is_the_slowest_part_and_what_is_exposed() -> None:
    timing = Timing(read_s=1.0, copy_s=2.0, work_s=1.5, exposed_s=0.5)
    assert (timing.token_s, timing.tokens_per_s, timing.bound) == (2.5, 0.4, "copy")

"""Seconds of a token on a device, against sums made by hand: by link, by disk, by work; in a row without a
ring."""

from __future__ import annotations

from dataclasses import replace

import pytest

from endor.loaders.plan import PAGE_BYTES, round_up
from endor.runtime.planner import (
    USUAL_DEVICE,
    BlockSize,
    Budgets,
    ExpertSize,
    ModelSizes,
    Overheads,
    Piece,
    Rates,
    TableSize,
    Timing,
    plan,
)

MB = 10**6
GPU = Rates(disk_bytes_per_s=4e9, work_bytes_per_s=400e9, copy_bytes_per_s=20e9)


def piece(nbytes: int) -> Piece:
    return Piece(nbytes, round_up(nbytes, PAGE_BYTES))


LAYERS = ModelSizes(tuple(BlockSize(f"layer.{i}", piece(100 * MB)) for i in range(40)))


def timing(device: int, host: int, rates: Rates = GPU, *, depth: int = 2) -> Timing:
    """With so many blocks of 100 MB on the device and in host memory."""
    return plan(LAYERS, Budgets(host * 100 * MB, device * 100 * MB), rates, depth=depth).timing


def test_everything_on_the_device_is_only_work() -> None:
    found = timing(40, 0)
    assert (found.read_s, found.copy_s, found.bound) == (0.0, 0.0, "work")
    assert found.token_s == pytest.approx(4e9 / 400e9)


@pytest.mark.parametrize("device", [0, 10, 20, 30])
def test_nothing_on_disk_is_what_crosses_the_link(device: int) -> None:
    found = timing(device, 40)
    assert found.bound == "copy"
    assert found.token_s == pytest.approx((40 - device) * 100e6 / 20e9, rel=0.01)


def test_everything_on_disk_is_what_is_read() -> None:
    found = timing(0, 0)
    assert found.bound == "disk"
    assert found.token_s == pytest.approx(4e9 / 4e9)


def test_slow_work_hides_what_crosses_the_link() -> None:
    found = timing(0, 40, replace(GPU, work_bytes_per_s=10e9))
    assert found.bound == "work"
    assert found.token_s == pytest.approx(4e9 / 10e9)


def test_three_tiers_add_up_by_link_and_by_disk() -> None:
    found = timing(10, 20)
    assert found.read_s == pytest.approx(10 * 100e6 / 4e9)
    assert found.copy_s == pytest.approx(30 * 100e6 / 20e9)
    assert found.work_s == pytest.approx(4e9 / 400e9)
    assert found.token_s == pytest.approx(found.read_s + found.exposed_s)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_disk_reads_ahead_while_many_blocks_of_the_host_are_in_turn(depth: int) -> None:
    """A block of 25 ms comes from disk after nine of 5 ms from the host: it is read during these."""
    found = timing(0, 36, depth=depth)
    assert found.bound == "copy"
    assert found.exposed_s == pytest.approx(0.0, abs=1e-9)
    assert found.token_s == pytest.approx(40 * 100e6 / 20e9)


def test_without_a_ring_reading_copying_and_work_follow_one_another() -> None:
    found = timing(10, 20, depth=0)
    assert found.token_s == pytest.approx(found.read_s + found.copy_s + found.work_s)


def test_launching_hides_behind_the_link_and_shows_where_nothing_is_streamed() -> None:
    launched = replace(GPU, overheads=Overheads(block_s=0.0003, token_s=0.001))
    assert timing(0, 40, launched).token_s == pytest.approx(timing(0, 40).token_s, rel=0.02)
    assert timing(40, 0, launched).token_s == pytest.approx(0.01 + 40 * 0.0003 + 0.001)


def test_a_device_is_not_slowed_down_by_what_is_copied() -> None:
    rates = replace(GPU, overheads=USUAL_DEVICE)
    assert timing(0, 40, rates).work_s == pytest.approx(
        timing(40, 0, rates).work_s + 40 * USUAL_DEVICE.streamed_s
    )


def test_tiles_of_a_tied_head_are_read_and_copied() -> None:
    tied = TableSize("embed", 100 * MB, 100 * MB, 4096, tuple(piece(25 * MB) for _ in range(4)))
    found = plan(replace(LAYERS, tables=(tied,)), Budgets(4_000 * MB, 0), GPU, depth=2).timing
    assert found.read_s == pytest.approx(100e6 / 4e9)
    assert found.copy_s == pytest.approx(4.1e9 / 20e9)


def test_missing_experts_are_read_and_copied_and_the_first_waits_for_both() -> None:
    layer = ExpertSize(64, 8, piece(10 * MB))
    sizes = ModelSizes(LAYERS.blocks[:4], experts=(layer,) * 4)
    found = plan(sizes, Budgets(0, 400 * MB), GPU, depth=2).timing
    read_s, copy_s, product_s = 10e6 / 4e9, 10e6 / 20e9, 10e6 / 400e9
    assert found.read_s == pytest.approx(4 * 8 * read_s)
    assert found.copy_s == pytest.approx(4 * 8 * copy_s)
    in_a_row_s = 0.4e9 / 400e9 + 4 * (8 * read_s + copy_s + product_s)  # products hide, but for the last one
    assert found.token_s == pytest.approx(in_a_row_s, rel=1e-6)
    alone = plan(sizes, Budgets(0, 400 * MB), GPU, depth=0).timing
    assert alone.token_s == pytest.approx(0.4e9 / 400e9 + 4 * 8 * (read_s + copy_s + product_s))


@pytest.mark.parametrize("depth", [0, 2])
def test_missing_experts_in_host_memory_are_only_copied(depth: int) -> None:
    layer = ExpertSize(64, 8, piece(10 * MB))
    sizes = ModelSizes(LAYERS.blocks[:4], experts=(layer,) * 4)
    every = 4 * 64 * layer.expert.span_bytes
    found = plan(sizes, Budgets(every, 400 * MB), GPU, depth=depth)
    copy_s, product_s = 10e6 / 20e9, 10e6 / 400e9
    assert (found.traffic.host, found.traffic.disk) == (4 * 8 * 10 * MB, 0)
    assert found.timing.read_s == 0.0
    assert found.timing.copy_s == pytest.approx(4 * 8 * copy_s)
    products_s = product_s if depth else 8 * product_s  # all but the last one hide behind copies
    assert found.timing.token_s == pytest.approx(0.4e9 / 400e9 + 4 * (8 * copy_s + products_s))


def test_of_missing_experts_those_that_are_not_in_host_memory_are_read() -> None:
    layer = ExpertSize(64, 8, piece(10 * MB))
    sizes = ModelSizes(LAYERS.blocks[:4], experts=(layer,) * 4)
    every = 4 * 64 * layer.expert.span_bytes
    none, half, all_of_them = (
        plan(sizes, Budgets(n, 400 * MB), GPU, depth=2) for n in (0, every // 2, every)
    )
    assert half.decision.host_experts == (32,) * 4
    assert (half.traffic.host, half.traffic.disk) == (4 * 4 * 10 * MB, 4 * 4 * 10 * MB)
    assert half.timing.read_s == pytest.approx(none.timing.read_s / 2)
    assert half.timing.copy_s == pytest.approx(none.timing.copy_s)
    mean_s = (none.timing.token_s + all_of_them.timing.token_s) / 2
    assert half.timing.token_s == pytest.approx(mean_s)


def test_experts_that_are_hit_on_the_device_are_not_copied_from_the_host() -> None:
    layer = ExpertSize(64, 8, piece(10 * MB))
    sizes = ModelSizes(LAYERS.blocks[:4], experts=(layer,) * 4)
    span = layer.expert.span_bytes
    found = plan(sizes, Budgets(4 * 64 * span, 400 * MB + 128 * span), GPU, depth=2).traffic
    assert found.host == pytest.approx(4 * 8 * 10 * MB / 2, rel=1e-3)
    assert found.device == pytest.approx(400 * MB + 4 * 8 * 10 * MB / 2, rel=1e-3)
    assert found.disk == 0


def test_a_cpu_copies_nothing_however_slow_a_link_is_named() -> None:
    sizes = ModelSizes(LAYERS.blocks[:4], experts=(ExpertSize(64, 8, piece(10 * MB)),) * 4)
    found = plan(sizes, Budgets(0), replace(GPU, copy_bytes_per_s=1.0), depth=2).timing
    assert found.copy_s == 0.0
    assert found.token_s < 1.0

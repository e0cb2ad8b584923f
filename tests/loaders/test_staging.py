"""Staging memory is aligned, faulted in once, lent without overlap, and unusable after its release."""

from __future__ import annotations

import ctypes
import mmap
import resource
from pathlib import Path

import pytest
import torch

from endor.errors import PlanError
from endor.loaders import PAGE_BYTES, StagingPool
from endor.loaders.staging import HUGE_PAGE_BYTES


def address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_arena_starts_on_a_huge_page_and_buffers_on_pages() -> None:
    with StagingPool(3 * PAGE_BYTES) as pool:
        first, second = pool.allocate(1), pool.allocate(PAGE_BYTES + 1)
        assert pool.capacity_bytes == HUGE_PAGE_BYTES
        assert address(first.memory) % HUGE_PAGE_BYTES == 0
        assert address(second.memory) - address(first.memory) == PAGE_BYTES
        assert (first.length_bytes, second.length_bytes) == (PAGE_BYTES, 2 * PAGE_BYTES)


def test_memory_and_tensor_are_the_same_bytes() -> None:
    with StagingPool(PAGE_BYTES) as pool, pool.allocate(PAGE_BYTES) as buffer:
        buffer.memory[:3] = b"abc"
        assert buffer.tensor(1, 2).tolist() == list(b"bc")
        buffer.tensor()[2] = 120
        assert bytes(buffer.memory[:3]) == b"abx"
        assert buffer.tensor().dtype == torch.uint8
        assert buffer.tensor().numel() == PAGE_BYTES


def test_using_the_arena_faults_nothing_in() -> None:
    with StagingPool(8 * HUGE_PAGE_BYTES) as pool, pool.allocate(pool.capacity_bytes) as buffer:
        tensor = buffer.tensor()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensor.fill_(1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 64


def test_released_ranges_are_lent_again_and_live_ones_are_not() -> None:
    with StagingPool(HUGE_PAGE_BYTES) as pool:
        buffers = [pool.allocate(HUGE_PAGE_BYTES // 4) for _ in range(4)]
        assert pool.try_allocate(1) is None
        buffers[1].release()
        buffers[2].release()
        again = pool.allocate(HUGE_PAGE_BYTES // 2)
        assert again.offset_bytes == HUGE_PAGE_BYTES // 4
        assert pool.lent_bytes == HUGE_PAGE_BYTES


def test_buffer_that_does_not_fit_says_what_is_needed() -> None:
    with StagingPool(HUGE_PAGE_BYTES) as pool:
        pool.allocate(PAGE_BYTES)
        with pytest.raises(
            PlanError, match=rf"{HUGE_PAGE_BYTES} bytes .* needed .* of which {PAGE_BYTES} are lent"
        ):
            pool.allocate(HUGE_PAGE_BYTES)


def test_released_buffer_is_not_usable() -> None:
    with StagingPool(PAGE_BYTES) as pool:
        with pool.allocate(PAGE_BYTES) as buffer:
            pass
        with pytest.raises(ValueError, match="after it was released"):
            _ = buffer.memory
        with pytest.raises(ValueError, match="after it was released"):
            buffer.tensor()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, PAGE_BYTES + 1), (PAGE_BYTES, 1), (5, -1)])
def test_tensor_outside_the_buffer_is_refused(offset: int, length: int) -> None:
    with (
        StagingPool(PAGE_BYTES) as pool,
        pool.allocate(PAGE_BYTES) as buffer,
        pytest.raises(ValueError, match="outside a staging buffer"),
    ):
        buffer.tensor(offset, length)


@pytest.mark.parametrize("size_bytes", [0, -4096])
def test_empty_pool_or_buffer_is_refused(size_bytes: int) -> None:
    with pytest.raises(PlanError, match=f"found {size_bytes}"):
        StagingPool(size_bytes)
    with StagingPool(1) as pool, pytest.raises(PlanError, match=f"found {size_bytes}"):
        pool.allocate(size_bytes)


def test_more_memory_than_there_is_says_what_is_needed() -> None:
    with pytest.raises(PlanError, match=rf"{1 << 50} bytes of staging memory are needed, \d+ are available"):
        StagingPool(1 << 50)


def test_mapping_that_the_system_refuses_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("endor.loaders.staging.available_bytes", lambda: None)
    with pytest.raises(PlanError, match="needed and could not be mapped"):
        StagingPool(1 << 60)


def test_close_gives_the_memory_back_even_while_a_view_lives() -> None:
    pool = StagingPool(64 * HUGE_PAGE_BYTES)
    view = pool.allocate(pool.capacity_bytes).tensor()
    view.fill_(7)
    before = _anonymous_bytes()
    pool.close()
    pool.close()
    assert before - _anonymous_bytes() >= 60 * HUGE_PAGE_BYTES
    assert int(view[0]) == 0
    with pytest.raises(ValueError, match="closed"):
        pool.try_allocate(1)


def test_memory_is_private_and_not_shared_with_children() -> None:
    with StagingPool(HUGE_PAGE_BYTES) as pool:
        start = f"{address(pool.allocate(1).memory):x}"
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if _holds(line, start)]
        assert [line.split()[1] for line in maps] == ["rw-p"]


def _holds(line: str, address_hex: str) -> bool:
    low, high = (int(bound, 16) for bound in line.split(maxsplit=1)[0].split("-"))
    return low <= int(address_hex, 16) < high


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_page_size_is_what_the_system_uses() -> None:
    assert PAGE_BYTES % mmap.PAGESIZE == 0 or mmap.PAGESIZE % PAGE_BYTES == 0

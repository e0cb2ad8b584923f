"""Slots of a device: units arrive in them in order, and nothing is overwritten that is still used."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from endor.errors import LoadError, PlanError
from endor.loaders import (
    Accelerator,
    BlockingAccelerator,
    CudaAccelerator,
    DiskFeed,
    HeldUnits,
    LoadPlan,
    PosixReader,
    Prefetcher,
    Reader,
    ReadOp,
    SlotPool,
    Source,
    StagingPool,
    Unit,
    accelerator_for,
)
from endor.loaders.slots import SlotBuffer
from tests.support.accelerators import CheckedAccelerator, watch_slots

SIZES = (40_000, 8192, 20_000, 4096, 60_000)
ACCELERATORS = ("late", "early", "blocking", pytest.param("cuda", marks=pytest.mark.gpu))


def make_accelerator(kind: str) -> Accelerator:
    if kind == "cuda":
        return CudaAccelerator(torch.device("cuda"))
    if kind == "blocking":
        return BlockingAccelerator(torch.device("cpu"))
    return CheckedAccelerator(late=kind == "late")


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with watch_slots(monkeypatch):
        yield


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    made = make_accelerator(request.param)
    yield made
    if isinstance(made, CheckedAccelerator):
        assert made.races == []
        assert made.pinned == 0, "pinned memory was left"


@pytest.fixture
def units(tmp_path: Path) -> tuple[Unit, ...]:
    """Units of different sizes in one file; every byte of unit `n` is `n + 1`."""
    file = tmp_path / "units"
    file.write_bytes(b"".join(bytes([n + 1]) * size for n, size in enumerate(SIZES)))
    starts = [sum(SIZES[:n]) for n in range(len(SIZES))]
    return tuple(
        Unit(f"unit {n}", (ReadOp(file, start, size),))
        for n, (start, size) in enumerate(zip(starts, SIZES, strict=True))
    )


def has_its_bytes(prefetcher: Prefetcher, number: int) -> bool:
    with prefetcher.acquire(number) as lease:
        found = lease.op_tensor(0)
        return found.numel() == SIZES[number] and bool((found == number + 1).all())


@contextmanager
def streaming(
    units: tuple[Unit, ...],
    accelerator: Accelerator,
    *,
    depth: int = 2,
    held: Sequence[int] = (),
    ring_bytes: int | None = None,
    reader: Reader | None = None,
    **options: Any,
) -> Iterator[Prefetcher]:
    """A prefetcher of slots, some units in host memory and the others read from disk."""
    plan = LoadPlan(units, depth)
    on_disk = [unit for number, unit in enumerate(units) if number not in held]
    with PosixReader() if reader is None else reader as opened:
        stays = HeldUnits([units[n] for n in held], opened, pin=accelerator.pin) if held else None
        feed = DiskFeed(on_disk, opened, depth=depth, accelerator=accelerator, **options) if on_disk else None

        def source_of(unit: Unit) -> Source | None:
            return stays if stays is not None and stays.find(unit) is not None else feed

        pool = SlotPool(ring_bytes or plan.ring_bytes, accelerator)
        try:
            with Prefetcher(plan, opened, pool, source_of=source_of) as prefetcher:
                yield prefetcher
        finally:
            for part in (feed, stays):
                if part is not None:
                    part.close()


def use(prefetcher: Prefetcher, *numbers: int) -> None:
    for number in numbers:
        prefetcher.acquire(number).release()


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("held", [(), (1, 3), range(len(SIZES))], ids=["disk", "mixed", "host"])
def test_every_unit_arrives_whole_pass_after_pass(
    accelerator: Accelerator, units: tuple[Unit, ...], held: tuple[int, ...], depth: int
) -> None:
    with streaming(units, accelerator, depth=depth, held=held) as prefetcher:
        for _ in range(4):
            assert all(has_its_bytes(prefetcher, number) for number in range(len(units)))
        stats = prefetcher.stats()
    assert stats.bytes_memory == 4 * sum(SIZES[n] for n in held)
    assert stats.bytes_read == 4 * sum(SIZES)


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    depth=st.integers(0, 3),
    late=st.booleans(),
    order=st.lists(st.integers(0, 5), max_size=8),
)
def test_a_feed_has_room_for_units_of_any_sizes_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], depth: int, late: bool, order: list[int]
) -> None:
    file = tmp_path_factory.mktemp("feed") / "units"
    file.write_bytes(b"".join(bytes([n + 1]) * (4096 * size) for n, size in enumerate(sizes)))
    starts = [4096 * sum(sizes[:n]) for n in range(len(sizes))]
    units = tuple(
        Unit(f"unit {n}", (ReadOp(file, start, 4096 * size),))
        for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )
    numbers = [*range(len(sizes)), *range(len(sizes)), *(n % len(sizes) for n in order), *range(len(sizes))]
    with streaming(units, CheckedAccelerator(late=late), depth=depth) as prefetcher:
        for number in numbers:
            with prefetcher.acquire(number) as lease:
                assert bool((lease.op_tensor(0) == number + 1).all())


def test_parts_of_a_unit_are_aligned_in_a_slot_wherever_they_are_in_the_file(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    ranges = [(3, 1000), (2001, 7), (4097, 5000), (10_000, 1)]
    unit = Unit("parts", tuple(ReadOp(tmp_path / "file", start, length) for start, length in ranges))
    with (
        streaming((unit,), accelerator) as prefetcher,
        prefetcher.acquire(0) as lease,
    ):
        for number, (start, length) in enumerate(ranges):
            found = lease.op_tensor(number)
            assert found.data_ptr() % 256 == 0
            assert found.cpu().tolist() == [(start + i) % 256 for i in range(length)]


def test_units_may_be_asked_for_in_any_order(accelerator: Accelerator, units: tuple[Unit, ...]) -> None:
    with streaming(units, accelerator, depth=2) as prefetcher:
        for number in (0, 3, 1, 1, 4, 0, 2, 4, 3, 2, 0, 0, 1):
            assert has_its_bytes(prefetcher, number)


def test_two_leases_are_two_places(accelerator: Accelerator, units: tuple[Unit, ...]) -> None:
    ring_bytes = 2 * LoadPlan(units, 2).ring_bytes
    with (
        streaming(units, accelerator, ring_bytes=ring_bytes) as prefetcher,
        prefetcher.acquire(0) as first,
        prefetcher.acquire(2) as second,
    ):
        assert bool((first.op_tensor(0) == 1).all())
        assert bool((second.op_tensor(0) == 3).all())


@pytest.mark.parametrize(
    ("left_out", "seen"),
    [
        ("the work before", "work reads, and a copy writes before that is over"),
        ("the end of the copy", "a copy reads, and a reader writes before that is over"),
    ],
)
def test_the_checking_accelerator_sees_a_wait_that_is_left_out(
    units: tuple[Unit, ...], monkeypatch: pytest.MonkeyPatch, left_out: str, seen: str
) -> None:
    if left_out == "the work before":
        land = SlotBuffer.land

        def land_at_once(slot: SlotBuffer, unit: Unit, source: torch.Tensor) -> None:
            slot._before = ()
            land(slot, unit, source)

        monkeypatch.setattr(SlotBuffer, "land", land_at_once)
    else:
        monkeypatch.setattr(DiskFeed, "_end_oldest", lambda feed: feed._copying.popleft()[1].release())
    accelerator = CheckedAccelerator(late=True)
    with streaming(units, accelerator, depth=1) as prefetcher:
        use(prefetcher, *range(len(units)), *range(len(units)))
    assert seen in accelerator.races


def test_who_does_not_wait_for_the_copy_reads_old_bytes(
    units: tuple[Unit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotBuffer, "arrive", lambda _: None)
    accelerator = CheckedAccelerator(late=True)
    with streaming(units, accelerator, depth=1) as prefetcher:
        assert not has_its_bytes(prefetcher, 0)


def test_a_failed_read_is_an_error_where_the_unit_is_asked_for_and_can_be_tried_again(
    accelerator: Accelerator, units: tuple[Unit, ...]
) -> None:
    file = units[0].ops[0].file
    whole = file.read_bytes()
    with streaming(units, accelerator, depth=2) as prefetcher:
        assert has_its_bytes(prefetcher, 0)
        file.write_bytes(whole[:100])
        with pytest.raises(LoadError, match="unit"):
            use(prefetcher, 1, 2, 3, 4, 0, 1, 2)


def test_a_failed_check_of_the_bytes_is_an_error_and_nothing_is_copied(units: tuple[Unit, ...]) -> None:
    accelerator = CheckedAccelerator()

    def refuse(index: int, memory: memoryview) -> None:
        raise LoadError(f"unit {index} of {len(memory)} bytes is refused")

    with (
        streaming(units, accelerator, depth=0, on_read=refuse) as prefetcher,
        pytest.raises(LoadError, match="refused"),
    ):
        prefetcher.acquire(0)
    assert accelerator.copied_bytes == 0


def test_a_device_that_fails_is_an_error_of_the_unit_and_no_hang(
    units: tuple[Unit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = CheckedAccelerator()
    with streaming(units, accelerator, depth=2) as prefetcher:
        assert has_its_bytes(prefetcher, 0)

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(accelerator, "copy", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            use(prefetcher, 1, 2, 3, 4, 0)


def test_a_device_that_fails_when_it_is_closed_leaves_no_thread_and_no_memory(
    units: tuple[Unit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = CheckedAccelerator()
    threads = set(threading.enumerate())

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    def run() -> None:
        with streaming(units, accelerator) as prefetcher:
            assert has_its_bytes(prefetcher, 0)
            monkeypatch.setattr(accelerator, "settle", fail)

    with pytest.raises(RuntimeError, match="launch failure"):
        run()
    assert set(threading.enumerate()) == threads
    assert accelerator.pinned == 0


def test_closing_waits_for_the_device_before_memory_goes(units: tuple[Unit, ...]) -> None:
    accelerator = CheckedAccelerator(late=True)
    with streaming(units, accelerator) as prefetcher:
        prefetcher.acquire(0).release()
    assert accelerator.settled == 1
    assert accelerator.pinned == 0


def test_the_token_loop_never_waits_for_the_whole_device(units: tuple[Unit, ...]) -> None:
    accelerator = CheckedAccelerator(late=True)
    with streaming(units, accelerator, depth=2) as prefetcher:
        for number in (*range(len(units)), *range(len(units))):
            assert has_its_bytes(prefetcher, number)
        assert accelerator.settled == 0


def test_after_an_interrupt_the_device_is_waited_for_and_reading_goes_on(
    units: tuple[Unit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = CheckedAccelerator(late=True)
    with streaming(units, accelerator, depth=2) as prefetcher:
        assert has_its_bytes(prefetcher, 0)
        collect = prefetcher._collect

        def interrupted() -> None:
            monkeypatch.setattr(prefetcher, "_collect", collect)
            raise KeyboardInterrupt

        monkeypatch.setattr(prefetcher, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefetcher.acquire(1)
        for number in (1, 2, 3, 4, 0):
            assert has_its_bytes(prefetcher, number)
    assert accelerator.settled == 2
    assert accelerator.races == []


def test_a_slot_that_is_used_again_waits_for_its_last_use(accelerator: Accelerator) -> None:
    with (
        StagingPool(3 * 8192, pin=accelerator.pin) as host,
        SlotPool(8192, accelerator) as pool,
        pool.allocate(8192) as slot,
    ):
        for value in (1, 2, 3):
            source = host.allocate(8192).tensor().fill_(value)
            slot.land(Unit("unit", (ReadOp(Path("file"), 0, 8192),)), source)
            slot.arrive()
            assert bool((slot.tensor() == value).all())
            slot.reuse()


def test_slots_begin_on_pages_of_the_device(accelerator: Accelerator) -> None:
    with SlotPool(3 * 4096, accelerator) as pool:
        assert [pool.allocate(100).tensor().data_ptr() % 4096 for _ in range(3)] == [0, 0, 0]


def test_a_slot_is_not_used_after_its_release(accelerator: Accelerator) -> None:
    with SlotPool(4096, accelerator) as pool:
        slot = pool.allocate(10)
        slot.release()
        with pytest.raises(ValueError, match="released"):
            slot.tensor()


def test_readers_of_host_memory_do_not_write_to_slots(accelerator: Accelerator) -> None:
    with (
        SlotPool(4096, accelerator) as pool,
        pool.allocate(10) as slot,
        pytest.raises(ValueError, match="device memory"),
    ):
        len(slot.memory)


def test_the_disk_is_read_ahead_whether_or_not_a_slot_is_free(
    units: tuple[Unit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units 0 to 2 are in host memory. With one slot ahead, unit 0 is next behind unit 4; unit 3 is read."""
    submitted: list[ReadOp] = []
    submit = PosixReader.submit

    def note(reader: PosixReader, op: ReadOp, destination: Any) -> Any:
        submitted.append(op)
        return submit(reader, op, destination)

    monkeypatch.setattr(PosixReader, "submit", note)
    with streaming(units, CheckedAccelerator(), depth=1, held=(0, 1, 2)) as prefetcher:
        use(prefetcher, 3, 4)
        ends_s = time.monotonic() + 10
        while submitted.count(units[3].ops[0]) < 2 and time.monotonic() < ends_s:
            time.sleep(0.001)
        assert submitted.count(units[3].ops[0]) == 2


def test_memory_the_device_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="free"):
        SlotPool(1 << 30, CheckedAccelerator(total_bytes=1 << 20))


@pytest.mark.gpu
def test_memory_a_gpu_does_not_have_is_refused_in_words() -> None:
    accelerator = CudaAccelerator(torch.device("cuda"))
    with pytest.raises(PlanError, match="device_memory"):
        accelerator.empty(1 << 50)


@pytest.mark.gpu
def test_a_pinned_arena_is_copied_from_without_waiting() -> None:
    accelerator = CudaAccelerator(torch.device("cuda"))
    with StagingPool(64 << 20, pin=accelerator.pin) as pool, pool.allocate(64 << 20) as buffer:
        assert buffer.tensor().is_pinned()
        target = accelerator.empty(64 << 20)
        torch.cuda.set_sync_debug_mode("error")
        try:
            copied = accelerator.copy([(target, buffer.tensor())], after=())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        copied.ended.wait()
        assert copied.ended.seconds_since(copied.began) > 0


@pytest.mark.gpu
def test_copies_wait_for_the_work_they_are_put_behind() -> None:
    accelerator = CudaAccelerator(torch.device("cuda"))
    with StagingPool(4096, pin=accelerator.pin) as pool, pool.allocate(4096) as buffer:
        buffer.tensor().fill_(7)
        slot = accelerator.empty(4096)
        slot.fill_(1)
        torch.cuda._sleep(100_000_000)
        seen = slot.clone()  # of the work, behind the sleep
        accelerator.copy([(slot, buffer.tensor())], after=[accelerator.mark()]).ended.wait()
        assert bool((seen == 1).all())
        assert bool((slot == 7).all())


def test_the_cpu_has_no_accelerator() -> None:
    assert accelerator_for(torch.device("cpu")) is None


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_a_device_that_nothing_drives_is_refused(device: str) -> None:
    with pytest.raises(PlanError, match="not supported"):
        accelerator_for(torch.device(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlanError, match="no CUDA device"):
        accelerator_for(torch.device("cuda:3"))


class FakeDeviceReader(PosixReader):
    """Reads into device memory, as by GPUDirect Storage; the device's memory is the host's."""

    serves_device = True
    takes_device_memory = True

    def __init__(self) -> None:
        super().__init__()
        self.registered = 0
        self.into_device = 0

    def register(self, memory: object) -> object:
        self.registered += 1

        def undo() -> None:
            self.registered -= 1

        return undo

    def submit(self, op: ReadOp, destination: object) -> object:  # type: ignore[override]
        if isinstance(destination, torch.Tensor):
            self.into_device += 1
            destination = destination.numpy().data
        assert isinstance(destination, memoryview)
        return super().submit(op, destination)


@pytest.mark.parametrize("late", [True, False])
def test_a_reader_that_reaches_the_device_reads_into_slots_that_nobody_uses(
    units: tuple[Unit, ...], late: bool
) -> None:
    accelerator = CheckedAccelerator(late=late)
    plan = LoadPlan(units, 2)
    checked: list[int] = []
    with FakeDeviceReader() as reader:
        pool = SlotPool(plan.ring_bytes, accelerator, reader=reader)  # type: ignore[arg-type]
        assert pool.into_slots is not None
        assert reader.registered == 1

        def check(index: int, memory: memoryview) -> None:
            start = units[index].op_offsets[0]
            assert set(memory[start : start + SIZES[index]]) == {index + 1}
            checked.append(index)

        with Prefetcher(plan, reader, pool, on_read=check) as prefetcher:  # type: ignore[arg-type]
            for number in (*range(len(units)), *range(len(units))):
                assert has_its_bytes(prefetcher, number)
        assert reader.registered == 0
        assert reader.into_device >= 2 * len(units)
    assert accelerator.copied_bytes == 0
    assert accelerator.races == []
    assert set(checked) == set(range(len(units)))


def test_threads_share_a_ring_of_slots(accelerator: Accelerator, units: tuple[Unit, ...]) -> None:
    wrong: list[int] = []
    ring_bytes = 3 * LoadPlan(units, 2).ring_bytes
    with streaming(units, accelerator, ring_bytes=ring_bytes) as prefetcher:

        def run() -> None:
            wrong.extend(n for n in (0, 1, 2, 3, 4, 0, 2) if not has_its_bytes(prefetcher, n))

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []

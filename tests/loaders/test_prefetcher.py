"""The prefetcher lends the right bytes in any order, ahead of use where it can, and ends without a trace."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from endor.errors import ChecksumError, LoadError, PlanError
from endor.loaders import (
    PAGE_BYTES,
    LoadPlan,
    PosixReader,
    Prefetcher,
    Reader,
    ReadOp,
    ReadReport,
    StagingPool,
    Ticket,
    Unit,
)

pytestmark = pytest.mark.timeout(60)

MakePlan = Callable[..., LoadPlan]


class RecordingReader:
    """A real reader that writes down what it is asked, and can be told to hold reads back or to fail them."""

    name = "recording"

    def __init__(self) -> None:
        self.inner = PosixReader(chunk_bytes=2 * PAGE_BYTES)
        self.submitted: list[int] = []
        self.fail_at: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, op: ReadOp, destination: memoryview) -> Ticket:
        self.submitted.append(op.offset_bytes)
        if op.offset_bytes in self.fail_at:
            raise LoadError(f"{op.file}: no luck at offset {op.offset_bytes}", errno=5)
        return self.inner.submit(op, destination)

    def wait(self, ticket: Ticket) -> ReadReport:
        self.gate.wait()
        return self.inner.wait(ticket)

    def cancel(self, ticket: Ticket) -> None:
        self.inner.cancel(ticket)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@pytest.fixture
def reader() -> Iterator[RecordingReader]:
    with RecordingReader() as reader:
        yield reader


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    def make(pages: Sequence[int], depth: int) -> LoadPlan:
        path = tmp_path / "model.safetensors"
        path.write_bytes(os.urandom(sum(pages) * PAGE_BYTES))
        units, offset = [], 0
        for index, count in enumerate(pages):
            units.append(Unit(f"layer {index}", (ReadOp(path, offset, count * PAGE_BYTES),)))
            offset += count * PAGE_BYTES
        return LoadPlan(tuple(units), depth)

    return make


def expected(plan: LoadPlan, index: int) -> bytes:
    op = plan.units[index].ops[0]
    with op.file.open("rb") as file:
        file.seek(op.offset_bytes)
        return file.read(op.length_bytes)


def take(prefetcher: Prefetcher, index: int) -> bytes:
    with prefetcher.acquire(index) as lease:
        return lease.tensor().numpy().tobytes()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("pages", [(3,), (2, 2), (1, 5, 2), (4, 4, 4, 4, 4, 4, 4), (1, 1, 9, 1, 1)], ids=str)
def test_every_depth_lends_the_bytes_of_the_file(
    make_plan: MakePlan, reader: RecordingReader, pages: tuple[int, ...], depth: int
) -> None:
    plan = make_plan(pages, depth)
    with Prefetcher(plan, reader) as prefetcher:
        for index in list(range(len(pages))) * 4:
            assert take(prefetcher, index) == expected(plan, index)
        stats = prefetcher.stats()
    assert stats.acquires == 4 * len(pages)
    assert stats.bytes_read == 4 * plan.total_bytes
    assert stats.discarded_units == 0


def test_units_ahead_are_read_while_one_is_held(make_plan: MakePlan, reader: RecordingReader) -> None:
    plan = make_plan((1,) * 5, 2)
    with Prefetcher(plan, reader) as prefetcher:
        with prefetcher.acquire(0):
            eventually(lambda: len(reader.submitted) == 3)
        eventually(lambda: len(reader.submitted) == 4)
        assert reader.submitted == [page * PAGE_BYTES for page in (0, 1, 2, 3)]


def test_reads_run_around_the_end_of_the_list(make_plan: MakePlan, reader: RecordingReader) -> None:
    plan = make_plan((1,) * 3, 2)
    with Prefetcher(plan, reader) as prefetcher, prefetcher.acquire(2):
        eventually(lambda: reader.submitted == [2 * PAGE_BYTES, 0, PAGE_BYTES])


def test_depth_zero_reads_only_when_asked(make_plan: MakePlan, reader: RecordingReader) -> None:
    plan = make_plan((1, 2), 0)
    with Prefetcher(plan, reader) as prefetcher:
        assert prefetcher.ring_bytes >= 2 * PAGE_BYTES
        take(prefetcher, 0)
        time.sleep(0.02)
        assert reader.submitted == [0]


def test_waiting_for_bytes_is_counted_as_stall(make_plan: MakePlan, reader: RecordingReader) -> None:
    with Prefetcher(make_plan((1, 1), 0), reader) as prefetcher:
        take(prefetcher, 0)
        before = prefetcher.stats()
        reader.gate.clear()
        threading.Timer(0.1, reader.gate.set).start()
        with prefetcher.acquire(1) as lease:
            assert lease.stall_s >= 0.09
            assert lease.report.bytes_read == PAGE_BYTES
        between = prefetcher.stats() - before
    assert between.acquires == 1
    assert between.stall_s == lease.stall_s
    assert between.bytes_read == PAGE_BYTES


def test_unit_read_ahead_does_not_stall(make_plan: MakePlan, reader: RecordingReader) -> None:
    done = threading.Event()

    def note(index: int, memory: memoryview) -> None:
        if index == 1:
            done.set()

    with Prefetcher(make_plan((1, 1), 1), reader, on_read=note) as prefetcher:
        take(prefetcher, 0)
        assert done.wait(20)
        reader.gate.clear()  # whatever is not there yet will not come
        with prefetcher.acquire(1) as lease:
            assert lease.stall_s < 1
        reader.gate.set()


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "order",
    [(0, 2, 1, 0, 3), (3, 2, 1, 0), (1, 1, 1), (0, 2, 4, 1, 3), (4, 0, 1, 4)],
    ids=["mixed", "backward", "same", "skipping", "wrapping"],
)
def test_any_order_works(
    make_plan: MakePlan, reader: RecordingReader, order: tuple[int, ...], depth: int
) -> None:
    plan = make_plan((2, 1, 3, 1, 2), depth)
    with Prefetcher(plan, reader) as prefetcher:
        for index in order * 3:
            assert take(prefetcher, index) == expected(plan, index)


def test_skipping_keeps_what_is_already_on_its_way(make_plan: MakePlan, reader: RecordingReader) -> None:
    plan = make_plan((1,) * 6, 3)
    with Prefetcher(plan, reader) as prefetcher:
        take(prefetcher, 0)  # 1, 2, 3 and then 4 are ahead
        assert take(prefetcher, 2) == expected(plan, 2)
        assert prefetcher.stats().discarded_units == 1
        assert reader.submitted.count(2 * PAGE_BYTES) == 1


def test_leases_may_overlap_as_far_as_the_ring_goes(make_plan: MakePlan, reader: RecordingReader) -> None:
    plan = make_plan((1,) * 5, 2)
    with StagingPool(1) as pool:  # 2 MiB: room for all
        pages = pool.capacity_bytes // PAGE_BYTES
    plan = make_plan((pages // 2,) * 5, 1)
    with Prefetcher(plan, reader) as prefetcher:
        with prefetcher.acquire(0) as first, prefetcher.acquire(1) as second:
            assert first.tensor().numpy().tobytes() == expected(plan, 0)
            assert second.tensor().numpy().tobytes() == expected(plan, 1)
            with pytest.raises(PlanError, match=r"'layer 2' needs .* are leased: 'layer 0' .* 'layer 1'"):
                prefetcher.acquire(2)
            assert second.tensor().numpy().tobytes() == expected(plan, 1)
        assert take(prefetcher, 2) == expected(plan, 2)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_next_unit_may_be_taken_before_the_last_is_returned(
    make_plan: MakePlan, reader: RecordingReader, depth: int
) -> None:
    plan = make_plan((3, 1, 2, 5, 1, 1), depth)
    with Prefetcher(plan, reader) as prefetcher:
        held = prefetcher.acquire(0)
        for index in [1, 2, 3, 4, 5, 0] * 3:
            following = prefetcher.acquire(index)
            held.release()
            held = following
            assert held.tensor().numpy().tobytes() == expected(plan, index)
        held.release()


def test_unit_that_is_held_is_lent_twice_without_a_second_read(
    make_plan: MakePlan, reader: RecordingReader
) -> None:
    plan = make_plan((1, 1), 0)
    with Prefetcher(plan, reader) as prefetcher:
        with prefetcher.acquire(0) as first:
            with prefetcher.acquire(0) as second:
                assert second.tensor().data_ptr() == first.tensor().data_ptr()
                assert second.report.bytes_read == 0
            assert first.tensor().numpy().tobytes() == expected(plan, 0)
        assert reader.submitted == [0]
        assert prefetcher.stats().bytes_read == PAGE_BYTES


def test_lease_gives_the_place_of_each_read(tmp_path: Path, reader: RecordingReader) -> None:
    path = tmp_path / "model.safetensors"
    content = os.urandom(3 * PAGE_BYTES)
    path.write_bytes(content)
    unit = Unit("ragged", (ReadOp(path, 10, 100), ReadOp(path, PAGE_BYTES, PAGE_BYTES + 1)))
    with Prefetcher(LoadPlan((unit,), 1), reader) as prefetcher, prefetcher.acquire(0) as lease:
        assert lease.op_tensor(0).numpy().tobytes() == content[10:110]
        assert lease.op_tensor(1).numpy().tobytes() == content[PAGE_BYTES : 2 * PAGE_BYTES + 1]
        assert bytes(lease.memory[10:110]) == content[10:110]
        assert lease.tensor(10, 4).numpy().tobytes() == content[10:14]
        assert (lease.index, lease.unit) == (0, unit)


def test_released_lease_is_not_usable(make_plan: MakePlan, reader: RecordingReader) -> None:
    plan = make_plan((1, 1), 1)
    with Prefetcher(plan, reader) as prefetcher:
        with prefetcher.acquire(0) as lease:
            memory = lease.memory
        lease.release()
        assert lease.released
        with pytest.raises(ValueError, match="'layer 0' was used after it was released"):
            lease.tensor()
        with pytest.raises(ValueError, match="'layer 0' was used after it was released"):
            _ = lease.memory
        with pytest.raises(ValueError, match="'layer 0' was used after it was released"), lease:
            pass
        with pytest.raises(ValueError, match="released memoryview"):
            memory[0]


def test_lease_that_is_dropped_is_reported_and_its_memory_comes_back(
    make_plan: MakePlan, reader: RecordingReader
) -> None:
    plan = make_plan((1, 1), 0)
    with Prefetcher(plan, reader) as prefetcher:
        leases = [prefetcher.acquire(0)]
        with pytest.warns(ResourceWarning, match="'layer 0' was never released"):
            leases.clear()
        assert take(prefetcher, 1) == expected(plan, 1)


def test_closing_ends_leases_with_a_warning(make_plan: MakePlan, reader: RecordingReader) -> None:
    prefetcher = Prefetcher(make_plan((1, 1), 1), reader)
    lease = prefetcher.acquire(1)
    with pytest.warns(ResourceWarning, match="closed while units were leased: layer 1"):
        prefetcher.close()
    prefetcher.close()
    with pytest.raises(ValueError, match="after it was released"):
        lease.tensor()
    lease.release()
    with pytest.raises(LoadError, match="the prefetcher is closed"):
        prefetcher.acquire(0)


def test_close_gives_up_reads_in_flight(make_plan: MakePlan) -> None:
    plan = make_plan((512,) * 6, 5)
    with PosixReader(threads=1, chunk_bytes=PAGE_BYTES, direct=True) as reader:
        prefetcher = Prefetcher(plan, reader)
        prefetcher.acquire(0).release()
        prefetcher.close()


def test_close_while_another_thread_waits_ends_the_wait(make_plan: MakePlan, reader: RecordingReader) -> None:
    prefetcher = Prefetcher(make_plan((1, 1), 0), reader)
    reader.gate.clear()

    def wait() -> None:
        with contextlib.suppress(LoadError):
            prefetcher.acquire(0).release()

    waiter = threading.Thread(target=wait)
    waiter.start()
    eventually(lambda: bool(reader.submitted))
    threading.Timer(0.05, reader.gate.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # its lease is cut off, which is what is tested
        prefetcher.close()
    waiter.join(20)
    assert not waiter.is_alive()


def test_forgotten_prefetcher_leaves_nothing(make_plan: MakePlan, reader: RecordingReader) -> None:
    prefetcher = Prefetcher(make_plan((1, 1), 1), reader)
    prefetcher.acquire(0).release()
    del prefetcher  # the fixture that watches threads and descriptors is the assertion


def test_pool_smaller_than_a_unit_says_what_is_needed(make_plan: MakePlan, reader: RecordingReader) -> None:
    with StagingPool(1) as pool:
        pages = pool.capacity_bytes // PAGE_BYTES + 1
        with pytest.raises(PlanError, match=rf"'layer 1' needs {pages * PAGE_BYTES} bytes .* the pool has"):
            Prefetcher(make_plan((1, pages), 2), reader, pool)


def test_pool_smaller_than_the_ring_still_works(make_plan: MakePlan, reader: RecordingReader) -> None:
    pool = StagingPool(1)
    pages = pool.capacity_bytes // PAGE_BYTES
    plan = make_plan((pages // 2, pages, pages // 3, pages // 3), 3)
    with Prefetcher(plan, reader, pool) as prefetcher:
        for index in [0, 1, 2, 3] * 3:
            assert take(prefetcher, index) == expected(plan, index)


@pytest.mark.parametrize("index", [-1, 2])
def test_unit_that_does_not_exist_is_refused(
    make_plan: MakePlan, reader: RecordingReader, index: int
) -> None:
    with (
        Prefetcher(make_plan((1, 1), 1), reader) as prefetcher,
        pytest.raises(PlanError, match=f"no unit {index}: the plan has 2"),
    ):
        prefetcher.acquire(index)


class TestErrors:
    @pytest.mark.parametrize("depth", [0, 1, 3])
    def test_failed_read_surfaces_where_its_unit_is_acquired(
        self, make_plan: MakePlan, reader: RecordingReader, depth: int
    ) -> None:
        plan = make_plan((1,) * 4, depth)
        reader.fail_at = {2 * PAGE_BYTES}
        with Prefetcher(plan, reader) as prefetcher:
            for index in (0, 1):
                assert take(prefetcher, index) == expected(plan, index)
            with pytest.raises(LoadError, match=r"unit 'layer 2': .*model\.safetensors: no luck") as caught:
                prefetcher.acquire(2)
            assert caught.value.errno == 5
            with pytest.raises(LoadError, match="unit 'layer 2'"):
                prefetcher.acquire(2)
            reader.fail_at = set()
            for index in (2, 3, 0):
                assert take(prefetcher, index) == expected(plan, index)

    def test_unit_that_failed_ahead_may_be_passed_over(
        self, make_plan: MakePlan, reader: RecordingReader
    ) -> None:
        plan = make_plan((1,) * 4, 2)
        reader.fail_at = {PAGE_BYTES}
        with Prefetcher(plan, reader) as prefetcher:
            for index in (0, 2, 3):
                assert take(prefetcher, index) == expected(plan, index)

    def test_file_cut_short_while_running_is_named_with_the_unit(self, make_plan: MakePlan) -> None:
        plan = make_plan((4,) * 3, 0)
        with PosixReader() as reader, Prefetcher(plan, reader) as prefetcher:
            take(prefetcher, 0)
            os.truncate(plan.units[0].ops[0].file, 5 * PAGE_BYTES)
            with pytest.raises(LoadError, match=r"'layer 1': .*safetensors: the file ends at byte 20480"):
                prefetcher.acquire(1)

    def test_reader_closed_first_is_an_error_and_not_a_hang(self, make_plan: MakePlan) -> None:
        reader = PosixReader()
        with Prefetcher(make_plan((1, 1, 1), 1), reader) as prefetcher:
            take(prefetcher, 0)
            reader.close()
            with pytest.raises(LoadError, match="the reader is closed"):
                prefetcher.acquire(2)


class TestOnRead:
    def test_hook_sees_each_unit_once_per_read_before_its_lease(
        self, make_plan: MakePlan, reader: RecordingReader
    ) -> None:
        plan = make_plan((1, 2, 1), 1)
        seen: list[tuple[int, bytes]] = []
        threads: set[str] = set()

        def look(index: int, memory: memoryview) -> None:
            seen.append((index, bytes(memory)))
            threads.add(threading.current_thread().name)

        with Prefetcher(plan, reader, on_read=look) as prefetcher:
            for index in (0, 1, 2, 0):
                take(prefetcher, index)
                assert (index, expected(plan, index)) in seen
        assert [index for index, _ in seen][:4] == [0, 1, 2, 0]
        assert threads == {"endor-prefetch"}

    def test_what_the_hook_raises_surfaces_at_acquire(
        self, make_plan: MakePlan, reader: RecordingReader
    ) -> None:
        plan = make_plan((1, 1, 1), 2)
        broken = [1]

        def verify(index: int, memory: memoryview) -> None:
            if index in broken:
                raise ChecksumError("model.safetensors: bitmap of layer 1 is not what was written")

        with Prefetcher(plan, reader, on_read=verify) as prefetcher:
            take(prefetcher, 0)
            with pytest.raises(ChecksumError, match="bitmap of layer 1") as caught:
                prefetcher.acquire(1)
            assert caught.value.__notes__ == ["while unit 'layer 1' was read"]
            broken.clear()
            assert take(prefetcher, 1) == expected(plan, 1)

    def test_bug_in_the_hook_is_not_swallowed(self, make_plan: MakePlan, reader: RecordingReader) -> None:
        def bug(index: int, memory: memoryview) -> None:
            raise ZeroDivisionError

        with (
            Prefetcher(make_plan((1,), 0), reader, on_read=bug) as prefetcher,
            pytest.raises(ZeroDivisionError),
        ):
            prefetcher.acquire(0)


def test_threads_may_share_a_prefetcher(make_plan: MakePlan, reader: Reader) -> None:
    plan = make_plan((2, 1, 3, 1), 3)
    wrong: list[str] = []

    def use(start: int) -> None:
        for step in range(40):
            index = (start + step * (1 + start)) % 4
            if take(prefetcher, index) != expected(plan, index):
                wrong.append(f"unit {index}")

    with Prefetcher(plan, reader) as prefetcher:
        threads = [threading.Thread(target=use, args=(start,)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive()
    assert not wrong


def test_child_process_is_told_to_load_again(make_plan: MakePlan, reader: RecordingReader) -> None:
    with Prefetcher(make_plan((1, 1), 1), reader) as prefetcher:
        take(prefetcher, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
            child = os.fork()
        if child == 0:
            code = 1
            try:
                prefetcher.acquire(1)
            except LoadError as error:
                code = 0 if "belongs to the process that made it" in str(error) else 2
            prefetcher.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        take(prefetcher, 1)

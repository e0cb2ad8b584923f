"""What every reader must do. A reader's tests subclass `ReaderContract` and say how it is opened."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from endor.errors import LoadError, PlanError
from endor.loaders import PAGE_BYTES, Reader, ReadOp, StagingPool, Ticket, Unit, read_unit

FILE_BYTES = 40 * PAGE_BYTES + 123


def end_of(reader: Reader, ticket: Ticket) -> str:
    try:
        report = reader.wait(ticket)
    except LoadError as error:
        return "cancelled" if "cancelled" in str(error) else str(error)
    return "read" if report.bytes_read == ticket.op.length_bytes else f"short: {report}"


class ReaderContract:
    def open(self) -> Reader:
        raise NotImplementedError

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(os.urandom(FILE_BYTES))
        return path

    # The file is only read, and examples are the same in every subclass: sharing either is safe.
    @settings(
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
        max_examples=60,
    )
    @given(
        offset_bytes=st.integers(0, FILE_BYTES - 1) | st.sampled_from([0, PAGE_BYTES, 4 * PAGE_BYTES]),
        length_bytes=st.integers(1, FILE_BYTES) | st.sampled_from([1, PAGE_BYTES, 8 * PAGE_BYTES]),
        shift_bytes=st.sampled_from([0, 0, 1, 512, PAGE_BYTES - 1]),
    )
    def test_any_range_arrives_whole_and_touches_nothing_else(
        self, file: Path, offset_bytes: int, length_bytes: int, shift_bytes: int
    ) -> None:
        length_bytes = min(length_bytes, FILE_BYTES - offset_bytes)
        start = PAGE_BYTES + offset_bytes % PAGE_BYTES + shift_bytes
        with StagingPool(FILE_BYTES + 4 * PAGE_BYTES) as pool, self.open() as reader:
            memory = pool.allocate(FILE_BYTES + 4 * PAGE_BYTES).memory
            memory[:] = b"\xa5" * len(memory)
            op = ReadOp(file, offset_bytes, length_bytes)
            report = reader.wait(reader.submit(op, memory[start : start + length_bytes]))
            found = bytes(memory)
        assert found[start : start + length_bytes] == file.read_bytes()[offset_bytes:][:length_bytes]
        assert set(found[:start] + found[start + length_bytes :]) == {0xA5}
        assert report.bytes_read == length_bytes
        assert report.read_s >= 0

    def test_many_reads_may_be_in_flight_and_waited_for_in_any_order(self, file: Path) -> None:
        content = file.read_bytes()
        with StagingPool(40 * PAGE_BYTES) as pool, self.open() as reader:
            memory = pool.allocate(40 * PAGE_BYTES).memory
            parts = [memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] for page in range(40)]
            tickets = [
                reader.submit(ReadOp(file, page * PAGE_BYTES, PAGE_BYTES), part)
                for page, part in enumerate(parts)
            ]
            for ticket in reversed(tickets):
                reader.wait(ticket)
            reader.wait(tickets[0])  # again
            assert bytes(memory) == content[: 40 * PAGE_BYTES]

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        missing = tmp_path / "gone.safetensors"
        with self.open() as reader, pytest.raises(LoadError, match=r"gone\.safetensors") as caught:
            reader.wait(reader.submit(ReadOp(missing, 0, 1), memoryview(bytearray(1))))
        assert caught.value.errno == 2

    def test_directory_is_named(self, tmp_path: Path) -> None:
        with self.open() as reader, pytest.raises(LoadError, match=str(tmp_path)):
            reader.wait(reader.submit(ReadOp(tmp_path, 0, 1), memoryview(bytearray(1))))

    def test_range_past_the_end_says_what_was_expected_and_found(self, file: Path) -> None:
        memory = memoryview(bytearray(PAGE_BYTES))
        with (
            self.open() as reader,
            pytest.raises(LoadError, match=rf"model\.safetensors.*{FILE_BYTES}.*{FILE_BYTES + 1}"),
        ):
            reader.wait(reader.submit(ReadOp(file, FILE_BYTES + 1 - PAGE_BYTES, PAGE_BYTES), memory))

    @pytest.mark.parametrize(
        "memory",
        [memoryview(bytearray(9)), memoryview(bytearray(11)), memoryview(bytes(10))],
        ids=["short", "long", "read-only"],
    )
    def test_destination_that_does_not_fit_is_refused(self, file: Path, memory: memoryview) -> None:
        with self.open() as reader, pytest.raises(PlanError, match="10 bytes needs as many writable bytes"):
            reader.submit(ReadOp(file, 0, 10), memory)

    def test_reader_works_on_after_an_error(self, file: Path, tmp_path: Path) -> None:
        memory = memoryview(bytearray(10))
        with self.open() as reader:
            with pytest.raises(LoadError):
                reader.wait(reader.submit(ReadOp(tmp_path / "gone", 0, 10), memory))
            reader.wait(reader.submit(ReadOp(file, 5, 10), memory))
        assert bytes(memory) == file.read_bytes()[5:15]

    def test_close_may_be_repeated_and_ends_reads_in_flight(self, file: Path) -> None:
        reader = self.open()
        memory = memoryview(bytearray(FILE_BYTES))
        tickets = [reader.submit(ReadOp(file, 0, FILE_BYTES), memory) for _ in range(20)]
        reader.close()
        reader.close()
        before = bytes(memory)
        for ticket in tickets:  # done or given up, but never hanging
            assert end_of(reader, ticket) in ("read", "cancelled")
        assert bytes(memory) == before

    def test_closed_reader_refuses_work(self, file: Path) -> None:
        reader = self.open()
        reader.close()
        with pytest.raises(LoadError, match=r"model\.safetensors: the reader is closed"):
            reader.submit(ReadOp(file, 0, 1), memoryview(bytearray(1)))

    def test_cancelled_read_ends(self, file: Path) -> None:
        memory = memoryview(bytearray(FILE_BYTES))
        with self.open() as reader:
            tickets = [reader.submit(ReadOp(file, 0, FILE_BYTES), memory) for _ in range(10)]
            for ticket in tickets:
                reader.cancel(ticket)
            for ticket in tickets:
                assert end_of(reader, ticket) in ("read", "cancelled")

    def test_read_unit_puts_each_read_at_its_place(self, file: Path) -> None:
        unit = Unit("block", (ReadOp(file, 10, 5000), ReadOp(file, PAGE_BYTES, PAGE_BYTES)))
        memory = memoryview(bytearray(unit.span_bytes))
        with self.open() as reader:
            report = read_unit(reader, unit, memory)
        content = file.read_bytes()
        for op, start in zip(unit.ops, unit.op_offsets, strict=True):
            assert bytes(memory[start : start + op.length_bytes]) == content[op.offset_bytes : op.end_bytes]
        assert report.bytes_read == unit.total_bytes

    def test_read_unit_that_fails_leaves_nothing_in_flight(self, file: Path, tmp_path: Path) -> None:
        unit = Unit("block", (ReadOp(file, 0, FILE_BYTES), ReadOp(tmp_path / "gone", 0, 1)))
        memory = memoryview(bytearray(unit.span_bytes))
        with self.open() as reader:
            with pytest.raises(LoadError, match="gone"):
                read_unit(reader, unit, memory)
            memory[:] = bytes(len(memory))
            assert not any(memory)

    def test_forked_process_is_told_to_open_its_own(self, file: Path) -> None:
        with self.open() as reader:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
                child = os.fork()
            if child == 0:
                try:
                    reader.submit(ReadOp(file, 0, 10), memoryview(bytearray(10)))
                except LoadError as error:
                    os._exit(7 if "belongs to the process that made it" in str(error) else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            reader.wait(reader.submit(ReadOp(file, 0, 10), memoryview(bytearray(10))))

    def test_forgotten_reader_leaves_nothing(self, file: Path) -> None:
        reader = self.open()
        reader.wait(reader.submit(ReadOp(file, 0, 10), memoryview(bytearray(10))))
        del reader  # the fixture that watches threads and descriptors is the assertion

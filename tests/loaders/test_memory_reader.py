"""The host tier: the contract for what is held and what is not, and views without a copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from endor.errors import LoadError, PlanError
from endor.loaders import PAGE_BYTES, LoadPlan, MemoryReader, Prefetcher, Reader, ReadOp, Unit
from tests.loaders.reader_contract import FILE_BYTES, ReaderContract

SIZE = 64 * PAGE_BYTES


class TestNothingHeldContract(ReaderContract):
    def open(self) -> Reader:
        return MemoryReader(chunk_bytes=2 * PAGE_BYTES)


class TestAllHeldContract(ReaderContract):
    """Of the contract's file; a file that is not there is asked for as well."""

    held: Path

    @pytest.fixture(autouse=True)
    def know_the_file(self, file: Path) -> None:
        type(self).held = file

    def open(self) -> Reader:
        reader = MemoryReader(chunk_bytes=2 * PAGE_BYTES)
        reader.hold([Unit("all", (ReadOp(self.held, 0, FILE_BYTES),))])
        return reader


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


def halves(file: Path) -> list[Unit]:
    return [Unit(f"half {i}", (ReadOp(file, i * SIZE // 2, SIZE // 2),)) for i in range(2)]


def test_held_bytes_are_lent_in_place(file: Path) -> None:
    first, second = halves(file)
    with MemoryReader() as reader:
        reader.hold([first])
        tensor = reader.tensor(first.ops[0])
        again = reader.tensor(ReadOp(file, 5, 10))
        assert bytes(tensor.numpy()) == file.read_bytes()[: SIZE // 2]
        assert again.data_ptr() == tensor.data_ptr() + 5
        assert tensor.data_ptr() % PAGE_BYTES == 0
        with pytest.raises(LoadError, match=rf"{file}: {SIZE // 2} bytes at offset {SIZE // 2} are not held"):
            reader.tensor(second.ops[0])


def test_held_units_reach_no_file_and_others_do(file: Path) -> None:
    first, second = halves(file)
    content = file.read_bytes()
    memory = memoryview(bytearray(SIZE // 2))
    with MemoryReader() as reader:
        reader.hold([first])
        report = reader.wait(reader.submit(first.ops[0], memory))
        assert (report.bytes_memory, report.bytes_read) == (SIZE // 2, SIZE // 2)
        assert memory == content[: SIZE // 2]
        report = reader.wait(reader.submit(second.ops[0], memory))
        assert (report.bytes_memory, report.bytes_read) == (0, SIZE // 2)
        assert memory == content[SIZE // 2 :]


def test_held_units_outlive_their_file_and_others_do_not(file: Path) -> None:
    first, second = halves(file)
    memory = memoryview(bytearray(SIZE // 2))
    with MemoryReader() as reader:
        reader.hold([first])
        before = bytes(reader.tensor(first.ops[0]).numpy())
        os.truncate(file, PAGE_BYTES)
        assert reader.wait(reader.submit(first.ops[0], memory)).bytes_memory == SIZE // 2
        assert memory == before
        with pytest.raises(LoadError, match="the file ends at byte"):
            reader.wait(reader.submit(second.ops[0], memory))


def test_failed_hold_holds_nothing_and_may_be_repeated(file: Path, tmp_path: Path) -> None:
    first, second = halves(file)
    gone = Unit("gone", (ReadOp(tmp_path / "gone", 0, 1),))
    with MemoryReader() as reader:
        with pytest.raises(LoadError, match="gone"):
            reader.hold([first, gone])
        assert reader.held_bytes == 0
        with pytest.raises(LoadError, match="not held"):
            reader.tensor(first.ops[0])
        reader.hold([first])
        reader.hold([second])
        assert bytes(reader.tensor(second.ops[0]).numpy()) == file.read_bytes()[SIZE // 2 :]


def test_more_than_there_is_memory_for_is_refused_before_it_is_read(file: Path) -> None:
    huge = [Unit(f"{i}", (ReadOp(file, 0, 1 << 60),)) for i in range(2)]
    with MemoryReader() as reader:
        with pytest.raises(PlanError, match="bytes of staging memory are needed"):
            reader.hold(huge)
        assert reader.held_bytes == 0


def test_closed_reader_lends_nothing(file: Path) -> None:
    reader = MemoryReader()
    reader.hold(halves(file))
    reader.close()
    assert reader.held_bytes == 0
    with pytest.raises(LoadError, match="not held"):
        reader.tensor(ReadOp(file, 0, 1))


def test_ring_over_held_units_says_which_bytes_came_from_memory(file: Path) -> None:
    units = halves(file)
    with MemoryReader() as reader:
        reader.hold(units[:1])
        with Prefetcher(LoadPlan(tuple(units), depth=1), reader) as prefetcher:
            for index in range(2):
                with prefetcher.acquire(index) as lease:
                    assert lease.memory[:100] == file.read_bytes()[index * SIZE // 2 :][:100]
            stats = prefetcher.stats()
    assert (stats.bytes_memory, stats.bytes_read) == (SIZE // 2, SIZE)

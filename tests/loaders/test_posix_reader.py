"""The posix reader: the contract under each policy, the path really taken, and files that change under it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from endor.errors import LoadError, PlanError
from endor.loaders import (
    PAGE_BYTES,
    DirectMode,
    PosixReader,
    Reader,
    ReadOp,
    ReadReport,
    StagingPool,
    cached_fraction,
    drop_from_page_cache,
)
from tests.loaders.reader_contract import ReaderContract

PAGES = 64
SIZE = PAGES * PAGE_BYTES


class TestDirectContract(ReaderContract):
    def open(self) -> Reader:
        return PosixReader(direct=True, threads=2, chunk_bytes=2 * PAGE_BYTES)


class TestBufferedContract(ReaderContract):
    def open(self) -> Reader:
        return PosixReader(direct=False, threads=3, chunk_bytes=PAGE_BYTES)


class TestAutoContract(ReaderContract):
    def open(self) -> Reader:
        return PosixReader()


class TestOneThreadContract(ReaderContract):
    def open(self) -> Reader:
        return PosixReader(direct=True, threads=1, chunk_bytes=1 << 30)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def disk_file(file: Path) -> Path:
    """A file on a file system that really has direct reads and a page cache that can be emptied."""
    drop_from_page_cache(file)
    if resident(file) > 0:
        pytest.skip("the temporary folder is on a file system that lives in memory")
    return file


def resident(path: Path) -> float:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return cached_fraction(descriptor, 0, SIZE)
    finally:
        os.close(descriptor)


def read(
    path: Path,
    *,
    direct: DirectMode,
    offset_bytes: int = 0,
    length_bytes: int = SIZE,
    shift_bytes: int = 0,
) -> ReadReport:
    with (
        StagingPool(SIZE + PAGE_BYTES) as pool,
        PosixReader(direct=direct, chunk_bytes=PAGE_BYTES * 8) as reader,
    ):
        memory = pool.allocate(SIZE + PAGE_BYTES).memory[shift_bytes:][:length_bytes]
        report = reader.wait(reader.submit(ReadOp(path, offset_bytes, length_bytes), memory))
        assert bytes(memory) == path.read_bytes()[offset_bytes : offset_bytes + length_bytes]
        return report


def test_auto_reads_directly_what_is_not_cached_and_keeps_it_so(disk_file: Path) -> None:
    with StagingPool(SIZE) as pool, PosixReader() as reader:
        memory = pool.allocate(SIZE).memory
        report = reader.wait(reader.submit(ReadOp(disk_file, 0, SIZE), memory))
        assert (report.bytes_direct, report.bytes_buffered) == (SIZE, 0)
        assert resident(disk_file) == 0


def test_auto_reads_cached_bytes_from_the_page_cache(disk_file: Path) -> None:
    disk_file.read_bytes()
    report = read(disk_file, direct="auto")
    assert (report.bytes_direct, report.bytes_buffered) == (0, SIZE)


def test_direct_goes_around_the_page_cache_whatever_it_holds(disk_file: Path) -> None:
    disk_file.read_bytes()
    assert read(disk_file, direct=True).bytes_direct == SIZE


def test_buffered_never_goes_around_the_page_cache(disk_file: Path) -> None:
    assert read(disk_file, direct=False).bytes_buffered == SIZE


def test_ragged_ends_are_buffered_and_whole_pages_direct(disk_file: Path) -> None:
    start, end = PAGE_BYTES - 100, 20 * PAGE_BYTES + 7
    report = read(disk_file, direct=True, offset_bytes=start, length_bytes=end - start, shift_bytes=start)
    assert (report.bytes_direct, report.bytes_buffered) == (19 * PAGE_BYTES, 107)


def test_memory_off_the_grid_of_pages_is_read_buffered(disk_file: Path) -> None:
    assert read(disk_file, direct=True, length_bytes=SIZE - 1, shift_bytes=1).bytes_direct == 0


def test_file_system_in_memory_is_read_whatever_the_policy(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        pytest.skip("no file system in memory at /dev/shm")
    path = shared / f"endor-test-{os.getpid()}.safetensors"
    try:
        path.write_bytes(os.urandom(SIZE))
        for direct in (True, False, "auto"):
            assert read(path, direct=direct, offset_bytes=1, length_bytes=SIZE - 2).bytes_read == SIZE - 2
    finally:
        path.unlink()


@pytest.mark.parametrize("refusal", ["EINVAL", "EOPNOTSUPP"])
def test_file_system_that_refuses_to_open_directly_is_read_buffered(
    file: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    really_open = os.open

    def refuse(path: str, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(getattr(errno, refusal), "no direct reads here", path)
        return really_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with StagingPool(SIZE) as pool, PosixReader(direct=True) as reader:
        memory = pool.allocate(SIZE).memory
        assert reader.wait(reader.submit(ReadOp(file, 0, SIZE), memory)).bytes_buffered == SIZE


@pytest.mark.parametrize("known", [True, False], ids=["cachestat", "sampled"])
def test_page_cache_is_seen_with_and_without_help_from_the_kernel(
    disk_file: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:
        monkeypatch.setattr("endor.loaders.pagecache._SYS_CACHESTAT", 100_000)
    assert resident(disk_file) == 0
    disk_file.read_bytes()
    assert resident(disk_file) == 1


@pytest.mark.parametrize(("threads", "chunk_bytes"), [(0, PAGE_BYTES), (1, PAGE_BYTES - 1)])
def test_reader_that_cannot_work_is_refused(threads: int, chunk_bytes: int) -> None:
    with pytest.raises(PlanError, match=r"at least .* found"):
        PosixReader(threads=threads, chunk_bytes=chunk_bytes)


class TestFileThatChanges:
    """The first read opens the file and passes; then something happens to it."""

    @pytest.fixture(params=[True, False], ids=["direct", "buffered"])
    def reader(self, request: pytest.FixtureRequest, file: Path) -> Iterator[Reader]:
        with PosixReader(direct=request.param, chunk_bytes=8 * PAGE_BYTES) as reader:
            self.read(reader, file)
            yield reader

    @staticmethod
    def read(reader: Reader, file: Path) -> bytes:
        with StagingPool(SIZE) as pool:
            memory = pool.allocate(SIZE).memory
            reader.wait(reader.submit(ReadOp(file, 0, SIZE), memory))
            return bytes(memory)

    def test_truncated_file_is_refused(self, reader: Reader, file: Path) -> None:
        os.truncate(file, SIZE - 3 * PAGE_BYTES)
        with pytest.raises(
            LoadError, match=rf"{file}: the file ends at byte {SIZE - 3 * PAGE_BYTES}, expected"
        ):
            self.read(reader, file)

    def test_file_cut_within_a_page_is_refused(self, reader: Reader, file: Path) -> None:
        os.truncate(file, SIZE - 5)
        with pytest.raises(LoadError, match=rf"{file}: the file ends at byte {SIZE - 5}, expected"):
            self.read(reader, file)

    def test_replaced_file_is_refused(self, reader: Reader, file: Path) -> None:
        other = file.with_suffix(".new")
        other.write_bytes(os.urandom(SIZE))
        other.rename(file)
        with pytest.raises(LoadError, match=rf"{file}: the file was replaced .* load the model again"):
            self.read(reader, file)

    def test_modified_file_is_refused(self, reader: Reader, file: Path) -> None:
        with file.open("r+b") as writer:
            writer.seek(SIZE // 2)
            writer.write(b"other bytes")
        os.utime(file, ns=(1, 1))  # whatever the resolution of the clock
        with pytest.raises(LoadError, match=rf"{file}: the file was modified"):
            self.read(reader, file)

    def test_deleted_file_is_still_served(self, reader: Reader, file: Path) -> None:
        content = file.read_bytes()
        file.unlink()
        assert self.read(reader, file) == content

    def test_linked_file_is_still_served(self, reader: Reader, file: Path) -> None:
        file.with_suffix(".link").hardlink_to(file)
        assert self.read(reader, file) == file.read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_file_that_may_not_be_read_is_named(file: Path) -> None:
    file.chmod(0)
    for folder in file.parents[:3]:
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with PosixReader() as reader, pytest.raises(LoadError, match=r"model\.safetensors.*denied") as caught:
            reader.submit(ReadOp(file, 0, 1), memoryview(bytearray(1)))
    finally:
        os.seteuid(0)
    assert caught.value.errno == 13

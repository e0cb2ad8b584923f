"""The mmap reader: the contract, and what kills a process that touches its mapping is an error here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from endor.errors import LoadError
from endor.loaders import PAGE_BYTES, MmapReader, Reader, ReadOp
from tests.loaders.reader_contract import ReaderContract

SIZE = 64 * PAGE_BYTES


class TestMmapContract(ReaderContract):
    def open(self) -> Reader:
        return MmapReader(chunk_bytes=2 * PAGE_BYTES)


class TestContractWhereTheKernelDoesNotCopy(ReaderContract):
    @pytest.fixture(autouse=True)
    def forbidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("endor.loaders.mapped._copy_from_process", None)

    def open(self) -> Reader:
        return MmapReader()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


def read(reader: Reader, file: Path) -> bytes:
    memory = bytearray(SIZE)
    reader.wait(reader.submit(ReadOp(file, 0, SIZE), memoryview(memory)))
    return bytes(memory)


@pytest.mark.parametrize("left", [0, 3 * PAGE_BYTES, SIZE - 5])
def test_file_cut_short_while_mapped_is_an_error_and_no_signal(file: Path, left: int) -> None:
    with MmapReader(chunk_bytes=8 * PAGE_BYTES) as reader:
        read(reader, file)
        os.truncate(file, left)
        with pytest.raises(LoadError, match=rf"{file}: the file (ends at byte|was modified)"):
            read(reader, file)


def test_replaced_file_is_refused(file: Path) -> None:
    with MmapReader() as reader:
        read(reader, file)
        other = file.with_suffix(".new")
        other.write_bytes(os.urandom(SIZE))
        other.rename(file)
        with pytest.raises(LoadError, match=rf"{file}: the file was replaced .* load the model again"):
            read(reader, file)


def test_empty_file_is_too_short_for_any_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with MmapReader() as reader, pytest.raises(LoadError, match=r"has 0 bytes, expected at least 1 "):
        reader.submit(ReadOp(empty, 0, 1), memoryview(bytearray(1)))

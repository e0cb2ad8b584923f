"""What the kvikio reader does with a driver: run by test_kvikio_reader.py in processes that have one.

Not collected with the rest: with the driver of the tests loaded, kvikio serves and CUDA does not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import LoadError, PlanError
from endor.loaders import (
    PAGE_BYTES,
    KvikioReader,
    LoadPlan,
    Prefetcher,
    Reader,
    ReadOp,
    StagingPool,
    Unit,
    choose_reader,
    drop_from_page_cache,
    probe_kvikio,
)
from endor.runtime import runtime_of
from tests.loaders.reader_contract import ReaderContract
from tests.support.models import tiny_llama, write_endor_checkpoint

SIZE = 64 * PAGE_BYTES
RAGGED = SIZE + 123


class TestDirectContract(ReaderContract):
    def open(self) -> Reader:
        return KvikioReader(direct=True, chunk_bytes=2 * PAGE_BYTES)


class TestBufferedContract(ReaderContract):
    def open(self) -> Reader:
        return KvikioReader(direct=False, threads=3, chunk_bytes=PAGE_BYTES)


class TestAutoContract(ReaderContract):
    def open(self) -> Reader:
        return KvikioReader()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(RAGGED))
    return path


def read(reader: Reader, file: Path, length_bytes: int = SIZE) -> bytes:
    with StagingPool(SIZE) as pool:
        memory = pool.allocate(SIZE).memory[:length_bytes]
        reader.wait(reader.submit(ReadOp(file, 0, length_bytes), memory))
        return bytes(memory)


class TestHost:
    """The driver has no device."""

    def test_probe_says_what_serves(self) -> None:
        found = probe_kvikio()
        assert (found.serves_host, found.serves_device, found.serves_gds) == (True, False, False)
        assert found.path == "none"
        assert found.version is not None
        assert "no GPU was found" in found.reason

    def test_asked_for_by_name_it_is_taken(self, file: Path) -> None:
        choice = choose_reader("kvikio")
        with choice.reader as reader:
            assert read(reader, file) == file.read_bytes()[:SIZE]
        assert (reader.name, choice.reason) == ("kvikio", f"asked for; {probe_kvikio().reason}")

    def test_without_a_gpu_it_is_not_taken_for_gpu_memory(self) -> None:
        with pytest.raises(PlanError, match=r"kvikio cannot serve here: .* no GPU was found"):
            choose_reader("kvikio", device_memory=True)
        choice = choose_reader("auto", device_memory=True)
        choice.reader.close()
        assert choice.reader.name == "posix"
        assert "no GPU was found" in choice.reason

    @pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
    def test_path_really_taken_is_reported(self, file: Path, direct: bool) -> None:
        drop_from_page_cache(file)
        with StagingPool(SIZE) as pool, KvikioReader(direct=direct) as reader:
            memory = pool.allocate(SIZE).memory
            report = reader.wait(reader.submit(ReadOp(file, 0, SIZE), memory))
        assert (report.bytes_direct, report.bytes_buffered) == ((SIZE, 0) if direct else (0, SIZE))
        assert report.bytes_gds == 0
        with file.open("rb") as opened:
            cached = os.preadv(opened.fileno(), [bytearray(1)], SIZE // 2, os.RWF_NOWAIT) if not direct else 0
        assert cached == (0 if direct else 1)

    @pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
    def test_file_cut_short_is_an_error(self, file: Path, direct: bool) -> None:
        with KvikioReader(direct=direct, chunk_bytes=8 * PAGE_BYTES) as reader:
            read(reader, file)
            os.truncate(file, SIZE - 3 * PAGE_BYTES)
            with pytest.raises(
                LoadError, match=rf"{file}: the file ends at byte {SIZE - 3 * PAGE_BYTES}, exp"
            ):
                read(reader, file)

    def test_replaced_file_is_refused(self, file: Path) -> None:
        with KvikioReader() as reader:
            read(reader, file)
            other = file.with_suffix(".new")
            other.write_bytes(os.urandom(SIZE))
            other.rename(file)
            with pytest.raises(LoadError, match=rf"{file}: the file was replaced .* load the model again"):
                read(reader, file)

    def test_streams_through_the_ring(self, file: Path) -> None:
        content = file.read_bytes()
        units = tuple(Unit(f"{i}", (ReadOp(file, i * SIZE // 4, SIZE // 4),)) for i in range(4))
        with KvikioReader() as reader, Prefetcher(LoadPlan(units, depth=2), reader) as prefetcher:
            for index in [0, 1, 2, 3, 0, 1]:
                with prefetcher.acquire(index) as lease:
                    assert bytes(lease.op_tensor(0).numpy()) == content[index * SIZE // 4 :][: SIZE // 4]

    def test_model_that_streams_with_it_computes_the_same(self, tmp_path: Path) -> None:
        checkpoint = write_endor_checkpoint(tiny_llama(), tmp_path / "model")
        ids = torch.tensor([[5, 17, 200]])
        found = {}
        for name in ("posix", "kvikio"):
            model = endor.load(checkpoint, host_memory=0, reader=name)
            assert runtime_of(model).reader.name == name
            with torch.inference_mode():
                found[name] = model(ids).logits
            runtime_of(model).close()
        assert torch.equal(found["kvikio"], found["posix"])

    def test_several_readers_at_once_do_not_disturb_each_other(self, file: Path) -> None:
        content = file.read_bytes()[:SIZE]
        found: list[bytes] = []

        def work(direct: bool) -> None:
            with KvikioReader(direct=direct) as reader:
                found.extend(read(reader, file) for _ in range(10))

        threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [content] * 40


class TestFaults:
    """With the shim of faults/preload.c in front of the C library."""

    def test_bad_sector_has_its_errno_and_offset(self, tmp_path: Path) -> None:
        path = tmp_path / f"eio@{33 * PAGE_BYTES}.faulty"
        path.write_bytes(os.urandom(SIZE))
        with (
            KvikioReader(direct=True, chunk_bytes=16 * PAGE_BYTES) as reader,
            pytest.raises(LoadError, match=rf"{path}: reading {16 * PAGE_BYTES} bytes at offset") as caught,
        ):
            read(reader, path)
        assert caught.value.errno == errno.EIO

    def test_short_reads_are_continued(self, tmp_path: Path) -> None:
        path = tmp_path / "short.faulty"
        path.write_bytes(os.urandom(SIZE))
        with KvikioReader(direct=True, chunk_bytes=16 * PAGE_BYTES) as reader:
            assert read(reader, path) == path.read_bytes()

    def test_direct_reads_refused_after_opening_are_done_buffered(self, tmp_path: Path) -> None:
        path = tmp_path / "einval.faulty"
        path.write_bytes(os.urandom(SIZE))
        with StagingPool(SIZE) as pool, KvikioReader(direct=True) as reader:
            memory = pool.allocate(SIZE).memory
            report = reader.wait(reader.submit(ReadOp(path, 0, SIZE), memory))
            assert (report.bytes_direct, report.bytes_buffered) == (0, SIZE)
            assert bytes(memory) == path.read_bytes()


class _DeviceBytes:
    """Bytes of the driver's device, or a part of them, as a CUDA tensor presents itself."""

    def __init__(self, driver: ctypes.CDLL, address: int, length_bytes: int) -> None:
        self._driver = driver
        self.address = address
        self.length_bytes = length_bytes

    @classmethod
    def allocate(cls, length_bytes: int) -> _DeviceBytes:
        driver = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_uint64()
        assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(length_bytes)) == 0
        return cls(driver, address.value, length_bytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.length_bytes,), "typestr": "|u1", "version": 3}

    def __getitem__(self, part: slice) -> _DeviceBytes:
        start, stop, _ = part.indices(self.length_bytes)
        return _DeviceBytes(self._driver, self.address + start, stop - start)

    def content(self) -> bytes:
        copy = ctypes.create_string_buffer(self.length_bytes)
        self._driver.cuMemcpyDtoH_v2(copy, ctypes.c_uint64(self.address), ctypes.c_size_t(self.length_bytes))
        return copy.raw


class TestDevice:
    """The driver has a device."""

    def test_probe_calls_it_compatibility_mode(self) -> None:
        found = probe_kvikio()
        assert (found.serves_host, found.serves_device, found.serves_gds) == (True, True, False)
        assert found.path == "compatibility mode"
        choice = choose_reader("auto", device_memory=True)
        choice.reader.close()
        assert choice.reader.name == "posix"
        assert "compatibility mode" in choice.reason
        choice = choose_reader("kvikio", device_memory=True)
        assert isinstance(choice.reader, KvikioReader)
        assert choice.reader.device_path == "compatibility mode"
        choice.reader.close()

    @pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
    @pytest.mark.parametrize(
        ("offset_bytes", "length_bytes"), [(0, SIZE), (100, SIZE), (5, 20), (7, RAGGED - 7)]
    )
    def test_any_range_arrives_in_device_memory(
        self, file: Path, direct: bool, offset_bytes: int, length_bytes: int
    ) -> None:
        memory = _DeviceBytes.allocate(RAGGED + PAGE_BYTES)
        start = offset_bytes % PAGE_BYTES
        with KvikioReader(direct=direct, chunk_bytes=8 * PAGE_BYTES) as reader:
            part = memory[start : start + length_bytes]
            report = reader.wait(reader.submit(ReadOp(file, offset_bytes, length_bytes), part))
        assert part.content() == file.read_bytes()[offset_bytes:][:length_bytes]
        assert report.bytes_read == length_bytes
        assert report.bytes_gds == 0
        assert (report.bytes_direct > 0) == (direct and length_bytes > PAGE_BYTES)

    def test_file_cut_short_is_an_error(self, file: Path) -> None:
        memory = _DeviceBytes.allocate(SIZE)
        op = ReadOp(file, 0, SIZE)
        with KvikioReader(direct=True) as reader:
            reader.wait(reader.submit(op, memory))
            os.truncate(file, SIZE - PAGE_BYTES)
            with pytest.raises(LoadError, match=rf"{file}: the file ends at byte {SIZE - PAGE_BYTES}"):
                reader.wait(reader.submit(op, memory))

    def test_memory_is_registered_once_and_given_back(self) -> None:
        memory = _DeviceBytes.allocate(SIZE)
        with KvikioReader() as reader:
            reader.register(memory)()

    def test_memory_that_cufile_refuses_is_read_into_all_the_same(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import kvikio

        def refuse(_: object) -> None:
            raise RuntimeError("cuFile error: memory already registered")

        monkeypatch.setattr(kvikio, "memory_register", refuse)
        memory = _DeviceBytes.allocate(SIZE)
        with KvikioReader() as reader:
            with pytest.warns(RuntimeWarning, match="already registered"):
                reader.register(memory)()
            reader.wait(reader.submit(ReadOp(file, 0, SIZE), memory))
        assert memory.content() == file.read_bytes()[:SIZE]

    def test_memory_that_does_not_fit_is_refused(self, file: Path) -> None:
        memory = _DeviceBytes.allocate(SIZE)
        with KvikioReader() as reader:
            with pytest.raises(PlanError, match=rf"needs as many contiguous writable uint8 .* \({SIZE},\)"):
                reader.submit(ReadOp(file, 0, SIZE - 1), memory)
            with pytest.raises(PlanError, match="a read goes into a memoryview or GPU memory, found list"):
                reader.submit(ReadOp(file, 0, 1), [0])  # type: ignore[arg-type]

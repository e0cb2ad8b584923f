"""Weights of any module, streamed: what is read, when, how often, and how much memory that takes."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from endor.errors import FormatError, LoadError
from endor.loaders import DirectMode, PosixReader, ReadOp, ReadReport, Ticket
from endor.runtime import offload
from endor.runtime.filemap import MappedFile
from endor.runtime.offload import WeightGroup, WeightStream
from endor.runtime.stored import MappedFiles, StoredTensor, locate_safetensors
from tests.support.accelerators import CheckedAccelerator

MIB = 1 << 20


class RecordingReader(PosixReader):
    """Keeps what it was asked to read; may take its time."""

    log: list[ReadOp]
    pause_s = 0.0

    def submit(self, op: ReadOp, destination: Any) -> Ticket:
        self.log.append(op)
        return super().submit(op, destination)

    def wait(self, ticket: Ticket) -> ReadReport:
        time.sleep(self.pause_s)
        return super().wait(ticket)


class Recorder:
    """Opens readers that write to one log."""

    def __init__(self, *, pause_s: float = 0.0) -> None:
        self.ops: list[ReadOp] = []
        self.modes: list[DirectMode] = []
        self.pause_s = pause_s

    def __call__(self, direct: DirectMode) -> RecordingReader:
        self.modes.append(direct)
        reader = RecordingReader(direct=direct)
        reader.log, reader.pause_s = self.ops, self.pause_s
        return reader


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the page cache is said to have; nothing unless a test says so."""
    said = {"share": 0.0}
    monkeypatch.setattr(MappedFile, "cached_fraction", lambda *_: said["share"])
    return said


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer{number}": torch.randn(256, 1024) for number in range(8)}  # 1 MiB each


@pytest.fixture
def places(weights: Mapping[str, torch.Tensor], tmp_path: Path) -> dict[str, StoredTensor]:
    path = tmp_path / "weights.safetensors"
    save_file(dict(weights), path)
    return locate_safetensors(path)


def groups_of(places: Mapping[str, StoredTensor], **options: bool) -> list[WeightGroup]:
    return [WeightGroup(name, {"weight": stored}, **options) for name, stored in places.items()]


def forward(stream: WeightStream, order: list[int] | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """One forward of the model: each group's weight, in order."""
    stream.begin_forward()
    for index in range(len(stream.groups)) if order is None else order:
        yield index, stream.load(index)["weight"]
        stream.done(index)
    stream.end_forward()


def check(stream: WeightStream, weights: Mapping[str, torch.Tensor], order: list[int] | None = None) -> None:
    for index, tensor in forward(stream, order):
        assert torch.equal(tensor, weights[stream.groups[index].name])


def test_every_byte_is_read_once_per_forward(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=2 * MIB)
    for number in range(1, 4):
        check(stream, weights)
        stats = stream.stats()
        assert stats.read_bytes == number * 8 * MIB
        assert stats.discarded_bytes == 0
        assert stats.forwards == number
    stream.close()


def test_groups_that_lie_together_are_one_read(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    recorder = Recorder()
    stream = WeightStream(groups_of(places), block_bytes=4 * MIB, depth=0, open_reader=recorder)
    check(stream, weights)
    assert [op.length_bytes for op in recorder.ops] == [4 * MIB, 4 * MIB]
    stream.close()


def test_the_next_block_is_read_while_one_is_in_use(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    recorder = Recorder()
    stream = WeightStream(groups_of(places), block_bytes=MIB, depth=2, open_reader=recorder)
    stream.begin_forward()
    stream.load(0)
    deadline = time.monotonic() + 10
    while len(recorder.ops) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(recorder.ops) == 3  # the one in use and two ahead, and no more
    stream.close()


def test_reading_hides_behind_computing(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    took: dict[int, float] = {}
    for depth in (0, 2):
        stream = WeightStream(
            groups_of(places), block_bytes=MIB, depth=depth, open_reader=Recorder(pause_s=0.02)
        )
        check(stream, weights)
        began = time.perf_counter()
        for _ in forward(stream):
            time.sleep(0.02)
        took[depth] = time.perf_counter() - began
        stream.close()
    assert took[0] > 0.31  # 8 x (20 ms reading + 20 ms computing)
    assert took[2] < 0.85 * took[0]


def test_staging_memory_is_the_blocks_in_flight_not_the_model(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=MIB, depth=1)
    check(stream, weights)
    assert 2 * MIB <= stream.stats().ring_bytes <= 4 * MIB
    stream.close()
    assert stream.stats().ring_bytes == 0


def test_the_order_is_learnt_from_the_first_forward(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=2 * MIB)
    order = [6, 0, 5, 1, 4, 2, 7, 3]
    check(stream, weights, order)
    before = stream.stats()
    for _ in range(3):
        check(stream, weights, order)
    stats = stream.stats()
    assert stats.read_bytes - before.read_bytes == 3 * 8 * MIB
    assert stats.discarded_bytes == before.discarded_bytes
    stream.close()


def test_a_change_of_order_is_learnt_when_it_lasts(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=2 * MIB)
    usual, other = list(range(8)), [0, 2, 4, 6, 1, 3, 5, 7]
    for order in (usual, other, usual, other, other):
        check(stream, weights, order)
    before = stream.stats()
    check(stream, weights, other)
    assert stream.stats().read_bytes - before.read_bytes == 8 * MIB
    stream.close()


@pytest.mark.parametrize(
    "order",
    [[0, 1, 0, 1, 0, 1], [3, 3, 3], [7, 6, 5, 4, 3, 2, 1, 0], [0, 7], [2, 0, 2, 1, 2]],
    ids=["in turns", "repeated", "backwards", "few", "shared"],
)
def test_any_order_gives_the_right_weights(
    order: list[int], cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    for depth in (0, 1, 3):
        stream = WeightStream(groups_of(places), block_bytes=2 * MIB, depth=depth)
        for _ in range(4):
            check(stream, weights, order)
        check(stream, weights)
        stream.close()


def test_a_layer_used_in_a_row_is_read_once(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=2 * MIB)
    order = [0, 1] * 6
    check(stream, weights, order)
    before = stream.stats()
    check(stream, weights, order)
    assert stream.stats().read_bytes - before.read_bytes == 2 * MIB
    stream.close()


def test_tied_weights_are_read_once(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    groups = [*groups_of(places), WeightGroup("tied", {"weight": places["layer0"]})]
    stream = WeightStream(groups, block_bytes=2 * MIB)
    both = {**weights, "tied": weights["layer0"]}
    check(stream, both)
    before = stream.stats()
    check(stream, both)
    # Through the ring comes what has one user; the tied one is mapped, so that its pages serve both.
    assert stream.stats().read_bytes - before.read_bytes == 7 * MIB
    stream.close()


def test_many_blocks_in_use_at_once_are_all_right(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=MIB, depth=1)
    stream.begin_forward()
    held = {index: stream.load(index)["weight"] for index in range(8)}
    assert all(torch.equal(held[index], weights[f"layer{index}"]) for index in held)
    for index in held:
        stream.done(index)
    stream.end_forward()
    stream.close()


def test_a_cached_model_is_used_in_place(
    cached: dict[str, float], places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    cached["share"] = 1.0
    recorder = Recorder()
    stream = WeightStream(groups_of(places), open_reader=recorder)
    addresses = [tensor.data_ptr() for _, tensor in forward(stream)]
    assert addresses == [tensor.data_ptr() for _, tensor in forward(stream)]
    check(stream, weights)
    assert recorder.ops == []
    assert stream.stats().ring_bytes == 0
    assert stream.mode == "mapped"
    stream.close()


def test_for_a_device_staging_memory_is_pinned_and_used_even_where_all_is_cached(
    cached: dict[str, float],
    places: dict[str, StoredTensor],
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = CheckedAccelerator()
    monkeypatch.setattr(offload, "accelerator_for", lambda _: accelerator)
    cached["share"] = 1.0
    stream = WeightStream(groups_of(places), device=torch.device("cuda"))
    check(stream, weights)
    assert stream.mode == "ring"
    assert accelerator.pinned == stream.stats().ring_bytes > 0
    again = copy.deepcopy(stream)
    stream.close()
    assert accelerator.pinned == 0
    check(again, weights)
    assert accelerator.pinned > 0
    again.close()
    assert accelerator.pinned == 0


def test_what_does_not_stay_cached_is_read_around_the_cache(
    cached: dict[str, float], places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    recorder = Recorder()
    stream = WeightStream(groups_of(places), open_reader=recorder)
    check(stream, weights)
    assert recorder.modes == [False]  # through the page cache: there is memory enough for it to stay
    check(stream, weights)
    assert recorder.modes == [False, "auto"]  # and it did not
    cached["share"] = 1.0
    check(stream, weights)
    assert stream.mode == "mapped"
    stream.close()


def test_a_model_larger_than_memory_is_never_read_through_the_cache(
    cached: object,
    places: dict[str, StoredTensor],
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("endor.runtime.offload.available_bytes", lambda: 9 * MIB)
    recorder = Recorder()
    stream = WeightStream(groups_of(places), block_bytes=MIB, open_reader=recorder)
    check(stream, weights)
    assert recorder.modes == ["auto"]
    stream.close()


def test_small_groups_are_read_once_and_stay(cached: object, tmp_path: Path) -> None:
    small = {"norm": torch.randn(512), "bias": torch.randn(100)}
    save_file(small, tmp_path / "small.safetensors")
    recorder = Recorder()
    stream = WeightStream(groups_of(locate_safetensors(tmp_path / "small.safetensors")), open_reader=recorder)
    check(stream, small)
    check(stream, small)
    assert recorder.ops == []
    stream.close()


def test_rows_of_a_table_are_all_that_is_read(tmp_path: Path, cached: object) -> None:
    from endor.loaders import cached_fraction, drop_from_page_cache

    path = tmp_path / "table.safetensors"
    table = torch.randn(64 * 1024, 64)  # 16 MiB
    save_file({"table": table}, path)
    stream = WeightStream(groups_of(locate_safetensors(path), by_rows=True))
    drop_from_page_cache(path)
    with path.open("rb") as file:
        if cached_fraction(file.fileno(), 0, path.stat().st_size) > 0.5:
            pytest.skip("this file system is memory: nothing of it can be dropped")
        stream.begin_forward()
        stream.expect_rows(0, 3)
        rows = torch.nn.functional.embedding(torch.tensor([5, 40_000, 65_000]), stream.load(0)["weight"])
        assert torch.equal(rows, table[[5, 40_000, 65_000]])
        assert cached_fraction(file.fileno(), 0, path.stat().st_size) < 0.1
    stream.close()


def test_weights_to_keep_are_copies(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=MIB, depth=0)
    stream.begin_forward()
    kept = {}
    for index in range(8):
        kept[index] = stream.load(index, keep=True)["weight"]
        assert not stream.is_volatile(kept[index])
        stream.done(index)
        assert stream.is_volatile(stream.load(index)["weight"])
        stream.done(index)
    assert all(torch.equal(kept[index], weights[f"layer{index}"]) for index in kept)
    stream.close()


def test_after_an_error_the_next_forward_works(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    path = next(iter(places.values())).file
    stream = WeightStream(groups_of(places), block_bytes=MIB)
    stream.begin_forward()
    stream.load(0)
    stream.abort_forward()
    check(stream, weights)
    away = path.with_suffix(".away")
    path.rename(away)
    stream.close()
    with pytest.raises(LoadError, match=r"weights\.safetensors"):
        check(stream, weights)
    stream.abort_forward()
    away.rename(path)
    check(stream, weights)
    stream.close()


def test_a_truncated_file_is_an_error_that_names_it(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    path = next(iter(places.values())).file
    stream = WeightStream(groups_of(places), block_bytes=MIB)
    check(stream, weights)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(LoadError, match=r"weights\.safetensors"):
        check(stream, weights)
    stream.close()


def test_closing_leaves_no_thread_and_no_descriptor(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    threads, descriptors = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    stream = WeightStream(groups_of(places), block_bytes=MIB)
    check(stream, weights)
    stream.close()
    del stream
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_a_forgotten_stream_ends_its_threads(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    threads = threading.active_count()
    stream = WeightStream(groups_of(places), block_bytes=MIB)
    check(stream, weights)
    assert threading.active_count() > threads
    del stream
    assert threading.active_count() == threads


def test_copies_work_on_their_own(
    cached: object, places: dict[str, StoredTensor], weights: dict[str, torch.Tensor]
) -> None:
    stream = WeightStream(groups_of(places), block_bytes=MIB)
    check(stream, weights)
    twin = copy.deepcopy(stream)
    stream.close()
    check(twin, weights)
    twin.close()


# Where tensors are.


def test_tensors_mapped_from_a_file_are_found_there(places: dict[str, StoredTensor]) -> None:
    from safetensors import safe_open

    path = next(iter(places.values())).file
    with safe_open(path, framework="pt") as opened:
        mapped = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a dict
    files = MappedFiles()
    assert {name: files.locate(tensor) for name, tensor in mapped.items()} == places
    assert files.locate(mapped["layer0"].clone()) is None
    assert files.locate(mapped["layer0"][1:]) is None
    assert files.locate(mapped["layer0"].view(torch.int32)) is None


def test_a_mapping_that_was_written_to_is_not_the_file(places: dict[str, StoredTensor]) -> None:
    from safetensors import safe_open

    with safe_open(next(iter(places.values())).file, framework="pt") as opened:
        mapped = opened.get_tensor("layer3")
    mapped[0, 0] += 1
    assert MappedFiles().locate(mapped) is None


def test_a_mapping_of_a_replaced_file_is_not_the_file(places: dict[str, StoredTensor]) -> None:
    from safetensors import safe_open

    path = next(iter(places.values())).file
    with safe_open(path, framework="pt") as opened:
        mapped = opened.get_tensor("layer3")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert MappedFiles().locate(mapped) is None


def test_a_header_that_points_behind_the_file_is_refused(places: dict[str, StoredTensor]) -> None:
    path = next(iter(places.values())).file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut short"):
        locate_safetensors(path)


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match=r"no\.safetensors"):
        locate_safetensors(path)
    with pytest.raises(LoadError, match="cannot read"):
        locate_safetensors(tmp_path / "absent.safetensors")

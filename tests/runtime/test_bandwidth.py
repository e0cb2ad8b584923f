"""Bandwidths are measured once per machine, disk and GPU, remembered, and measured again where memory
fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from endor.errors import LoadError, PlanError
from endor.loaders import BlockingAccelerator, Copied, Event, PosixReader, ReadOp, Ticket
from endor.runtime import bandwidth
from endor.runtime.bandwidth import (
    Bandwidth,
    Bandwidths,
    cached_bandwidths,
    machine_bandwidths,
    measure_bandwidths,
    measure_device,
)

MIB = 1 << 20


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(MIB) * 40 + b"ragged")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "endor" / "bandwidth.json"


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where something was measured, with a result that costs nothing."""
    asked: list[Path] = []

    def fake(where: Path) -> Bandwidths:
        asked.append(where)
        return Bandwidths(
            disk=Bandwidth(2e9 + len(asked), "direct", "2026-01-01T00:00:00+00:00"),
            memory=Bandwidth(9e9, "copy", "2026-01-01T00:00:00+00:00"),
        )

    monkeypatch.setattr(bandwidth, "measure_bandwidths", fake)
    return asked


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_large_file_is_read_where_it_is(large_file: Path, folder: bool) -> None:
    before = sorted(large_file.parent.iterdir())
    found = measure_bandwidths(large_file.parent if folder else large_file)
    assert 1e6 < found.disk.bytes_per_s < 1e12
    assert 1e8 < found.memory.bytes_per_s < 1e12
    assert (found.disk.path in ("direct", "buffered"), found.memory.path) == (True, "copy")
    assert sorted(large_file.parent.iterdir()) == before


def test_folder_without_a_large_file_gets_one_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "_OWN_FILE_BYTES", 8 * MIB)
    (tmp_path / "small").write_bytes(b"small")
    assert measure_bandwidths(tmp_path / "small").disk.bytes_per_s > 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_time_is_limited_however_large_the_file(large_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_PIECE_BYTES", MIB)
    monkeypatch.setattr(bandwidth, "_DISK_S", 0.0)
    sizes: list[int] = []
    really_read = PosixReader.submit

    def counted(self: PosixReader, op: ReadOp, destination: memoryview) -> Ticket:
        sizes.append(op.length_bytes)
        return really_read(self, op, destination)

    monkeypatch.setattr(PosixReader, "submit", counted)
    assert measure_bandwidths(large_file).disk.bytes_per_s > 0
    assert sizes == [MIB]


def test_result_is_remembered_until_a_new_one_is_asked_for(
    tmp_path: Path, cache: Path, measurements: list[Path]
) -> None:
    assert cached_bandwidths(tmp_path, cache=cache) is None
    first = machine_bandwidths(tmp_path, cache=cache)
    assert machine_bandwidths(tmp_path, cache=cache) == first == cached_bandwidths(tmp_path, cache=cache)
    assert len(measurements) == 1
    second = machine_bandwidths(tmp_path, measure=True, cache=cache)
    assert second != first
    assert cached_bandwidths(tmp_path, cache=cache) == second
    assert [path.name for path in cache.parent.iterdir()] == ["bandwidth.json"]


def test_other_disk_and_other_machine_are_measured_themselves(
    tmp_path: Path, cache: Path, measurements: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_bandwidths(tmp_path, cache=cache)
    machine_bandwidths(Path("/proc"), cache=cache)
    assert len(measurements) == 2
    monkeypatch.setattr("platform.node", lambda: "another machine")
    machine_bandwidths(tmp_path, cache=cache)
    assert len(measurements) == 3
    monkeypatch.undo()
    assert cached_bandwidths(tmp_path, cache=cache) is not None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 2}', '{"version": 1, "machines": 3}'])
def test_cache_that_is_not_ours_is_measured_over(
    tmp_path: Path, cache: Path, measurements: list[Path], content: str
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    found = machine_bandwidths(tmp_path, cache=cache)
    assert machine_bandwidths(tmp_path, cache=cache) == found
    assert len(measurements) == 1


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "fast", None])
def test_remembered_nonsense_is_measured_over(
    tmp_path: Path, cache: Path, measurements: list[Path], rate: object
) -> None:
    machine_bandwidths(tmp_path, cache=cache)
    found = json.loads(cache.read_text())
    for machine in found["machines"].values():
        machine["memory"]["bytes_per_s"] = rate
    cache.write_text(json.dumps(found))
    assert cached_bandwidths(tmp_path, cache=cache) is None
    machine_bandwidths(tmp_path, cache=cache)
    assert len(measurements) == 2


def test_without_a_place_for_the_cache_it_is_measured_each_time(
    tmp_path: Path, measurements: list[Path]
) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        machine_bandwidths(tmp_path, cache=tmp_path / "file" / "bandwidth.json")
    assert len(measurements) == 2


@pytest.mark.parametrize(("variable", "used"), [("absolute", True), ("relative/folder", False), ("", False)])
def test_cache_is_where_xdg_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: list[Path], variable: str, used: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / variable) if used else variable)
    machine_bandwidths(tmp_path)
    base = tmp_path / variable if used else tmp_path / "home" / ".cache"
    assert (base / "endor" / "bandwidth.json").is_file()


def test_folder_that_is_not_there_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(LoadError, match="gone: cannot be measured: No such file") as caught:
        machine_bandwidths(tmp_path / "gone", cache=cache)
    assert caught.value.errno == 2
    with pytest.raises(LoadError, match="gone: cannot be measured: No such file"):
        measure_bandwidths(tmp_path / "gone")


def test_folder_that_may_not_be_written_says_what_to_name_instead() -> None:
    with pytest.raises(LoadError, match=r"/proc/self/fdinfo: no file .* name a large file"):
        measure_bandwidths(Path("/proc/self/fdinfo"))


# A device with its own memory.


class Device(BlockingAccelerator):
    """Host memory that is called a device's, with copies that take as long as somebody says."""

    def __init__(self, name: str = "a card", *, link: float = 20e9, within: float = 400e9) -> None:
        super().__init__(torch.device("cpu"))
        self._name = name
        self.rates = (link, within)
        self.pinned: list[int] = []
        self.copies: list[tuple[int, bool]] = []

    @property
    def name(self) -> str:
        return self._name

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        self.pinned.append(memory.data_ptr())
        return lambda: self.pinned.remove(memory.data_ptr())

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: Sequence[Event]) -> Copied:
        ((target, source),) = pairs
        from_host = source.data_ptr() in self.pinned
        self.copies.append((target.numel(), from_host))
        began = self.mark()
        return Copied(began, Later(began, target.numel() / self.rates[0 if from_host else 1]))


@dataclass(frozen=True)
class Later:
    """An event some time after another one."""

    began: Event
    seconds: float
    is_done = True

    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Any) -> float:
        assert earlier is self.began
        return self.seconds


def test_link_is_measured_from_pinned_memory_and_the_device_within_itself() -> None:
    device = Device()
    link, within = measure_device(device)
    assert link.bytes_per_s == pytest.approx(20e9)
    assert within.bytes_per_s == pytest.approx(400e9)
    assert (link.path, within.path) == ("pinned copy", "copy")
    assert {from_host for _, from_host in device.copies} == {True, False}
    assert device.pinned == []  # and not pinned for ever


def test_memory_is_given_back_where_nothing_can_be_copied() -> None:
    class Broken(Device):
        def empty(self, nbytes: int) -> torch.Tensor:
            raise PlanError(f"{nbytes} bytes are too many")

    device = Broken()
    with pytest.raises(PlanError, match="are too many"):
        measure_device(device)
    assert device.pinned == []


def test_copies_of_a_real_device_of_torch_have_a_rate() -> None:
    link, within = measure_device(BlockingAccelerator(torch.device("cpu")))
    assert 1e8 < link.bytes_per_s < 1e12
    assert 1e8 < within.bytes_per_s < 1e12


def test_link_is_remembered_by_device(tmp_path: Path, cache: Path, measurements: list[Path]) -> None:
    device, faster = Device(), Device("a faster card", link=50e9)
    first = machine_bandwidths(tmp_path, cache=cache, accelerator=device)
    assert first.link is not None
    measured = len(device.copies)
    assert machine_bandwidths(tmp_path, cache=cache, accelerator=device) == first
    assert len(device.copies) == measured
    other = machine_bandwidths(tmp_path, cache=cache, accelerator=faster).link
    assert other is not None
    assert other.bytes_per_s == pytest.approx(50e9)
    assert cached_bandwidths(tmp_path, cache=cache, accelerator=device) == first
    assert len(measurements) == 1  # the disk is the same for both
    machine_bandwidths(tmp_path, cache=cache, accelerator=device, measure=True)
    assert (len(device.copies) > measured, len(measurements)) == (True, 2)


def test_without_a_device_no_link_is_looked_at(tmp_path: Path, cache: Path, measurements: list[Path]) -> None:
    machine_bandwidths(tmp_path, cache=cache, accelerator=Device())
    found = machine_bandwidths(tmp_path, cache=cache)
    assert (found.link, found.device, len(measurements)) == (None, None, 1)


def test_cache_from_before_there_was_a_link_is_read_and_added_to(
    tmp_path: Path, cache: Path, measurements: list[Path]
) -> None:
    old = machine_bandwidths(tmp_path, cache=cache)
    assert "gpus" not in cache.read_text()
    assert cached_bandwidths(tmp_path, cache=cache, accelerator=Device()) == old
    found = machine_bandwidths(tmp_path, cache=cache, accelerator=Device())
    assert (found.disk, found.memory, found.link is not None) == (old.disk, old.memory, True)
    assert len(measurements) == 1
    assert cached_bandwidths(tmp_path, cache=cache) == old


def test_remembered_nonsense_of_a_link_is_measured_over(
    tmp_path: Path, cache: Path, measurements: list[Path]
) -> None:
    device = Device()
    machine_bandwidths(tmp_path, cache=cache, accelerator=device)
    found = json.loads(cache.read_text())
    for machine in found["machines"].values():
        machine["gpus"] = {name: {"link": 3} for name in machine["gpus"]}
    cache.write_text(json.dumps(found))
    again = machine_bandwidths(tmp_path, cache=cache, accelerator=device).link
    assert again is not None
    assert len(measurements) == 1


def test_disk_is_remembered_though_the_link_cannot_be_measured(
    tmp_path: Path, cache: Path, measurements: list[Path]
) -> None:
    class Unpinnable(Device):
        def pin(self, memory: torch.Tensor) -> Callable[[], None]:
            raise PlanError(f"{memory.numel()} bytes cannot be pinned")

    for _ in range(2):
        with pytest.raises(PlanError, match="cannot be pinned"):
            machine_bandwidths(tmp_path, cache=cache, accelerator=Unpinnable())
    assert len(measurements) == 1

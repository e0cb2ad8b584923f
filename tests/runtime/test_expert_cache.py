"""The cache of experts reads what is announced once, keeps what was used last, and survives failed reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from endor.errors import LoadError
from endor.formats.packed import PackedTensor, TensorLayout
from endor.loaders import PosixReader, ReadOp, SlotPool, StagingPool, Ticket, Unit
from endor.runtime.experts import Expert, ExpertCache, ExpertKey
from endor.runtime.stats import StatsRecorder
from tests.support.accelerators import CheckedAccelerator, watch_slots

EXPERTS = 12
BYTES = 5000


class Shop:
    """A file of experts, each `BYTES` bytes of its number, and a cache of some; notes what is read."""

    def __init__(self, path: Path, *, slots: int, ahead: bool = True) -> None:
        path.write_bytes(b"".join(bytes([n]) * BYTES for n in range(EXPERTS)))
        self.path = path
        self.read: list[int] = []
        self.stats = StatsRecorder()
        self.reader = PosixReader()
        self.cache = ExpertCache(
            self.reader, self.expert, slot_bytes=12288, slots=slots, ahead=ahead, stats=self.stats
        )

    def expert(self, key: ExpertKey) -> Expert:
        number = key[1]
        self.read.append(number)
        layout = TensorLayout((BYTES,), torch.uint8, "dense", "raw", BYTES)

        def unpack(parts: Sequence[torch.Tensor]) -> Mapping[str, PackedTensor]:
            return {"w": PackedTensor(layout, {"dense": parts[0]})}

        return Expert(Unit(f"expert {number}", (ReadOp(self.path, number * BYTES, BYTES),)), unpack)

    def use(self, *numbers: int) -> None:
        """Announce and use experts, checking that each has its own bytes."""
        self.cache.want([(0, n) for n in numbers])
        for n in numbers:
            assert bool((self.cache.get((0, n))["w"].sections["dense"] == n).all())

    def close(self) -> None:
        self.cache.close()
        self.reader.close()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path / "experts", slots=4)
    yield shop
    shop.close()


def test_what_fits_is_read_once(shop: Shop) -> None:
    for _ in range(3):
        shop.use(1, 5, 7)
    assert shop.read == [1, 5, 7]
    assert shop.stats.disk_bytes == 3 * BYTES
    assert shop.stats.host_bytes == 6 * BYTES


def test_more_experts_than_slots_pass_through(shop: Shop) -> None:
    shop.use(*range(EXPERTS))
    assert shop.read == list(range(EXPERTS))


def test_the_least_recently_used_gives_way(shop: Shop) -> None:
    shop.use(0, 1, 2, 3)
    shop.use(0)
    shop.use(9)
    shop.use(0, 2, 3, 9)
    assert shop.read == [0, 1, 2, 3, 9]


def test_announced_experts_that_are_there_are_not_thrown_out_for_earlier_ones(shop: Shop) -> None:
    shop.use(4, 5, 6)
    shop.use(1, 2, 4, 5, 6)
    assert shop.read[:4] == [4, 5, 6, 1]
    assert shop.read.count(4) + shop.read.count(5) + shop.read.count(6) <= 4


def test_full_of_announced_experts_it_still_serves_one_it_lacks(shop: Shop) -> None:
    shop.use(4, 5, 6, 7)
    shop.use(0, 4, 5, 6, 7)
    assert shop.read[:5] == [4, 5, 6, 7, 0]


def test_an_expert_nobody_announced_is_read_too(shop: Shop) -> None:
    shop.cache.want([(0, 1), (0, 2), (0, 3), (0, 4)])
    assert int(shop.cache.get((0, 8))["w"].sections["dense"][0]) == 8
    shop.use(1, 2)


def test_without_reading_ahead_nothing_is_read_before_it_is_used(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "experts", slots=4, ahead=False)
    shop.cache.want([(0, 1), (0, 2)])
    assert shop.read == []
    shop.use(1, 2)
    shop.close()


def test_a_failed_read_is_an_error_and_can_be_repeated(shop: Shop) -> None:
    whole = shop.path.read_bytes()
    shop.path.write_bytes(whole[: 2 * BYTES])
    with pytest.raises(LoadError, match=str(shop.path)):
        shop.use(0, 1, 2)
    shop.close()
    again = Shop(shop.path, slots=4)
    again.use(0, 1, 2)
    again.close()


# On a device, with some experts in host memory.

SPAN = 12288


class DeviceShop(Shop):
    """The same on a device, whose cache finds the experts `held` in host memory."""

    def __init__(self, path: Path, *, slots: int, held: Sequence[int], staged: int) -> None:
        super().__init__(path, slots=2)
        self.cache.close()
        self.accelerator = CheckedAccelerator()
        self.memory = StagingPool(max(1, len(held)) * SPAN, pin=self.accelerator.pin)
        self.staging = StagingPool(staged * SPAN, pin=self.accelerator.pin) if staged else None
        if self.staging is not None:
            self.staging.capacity_bytes = staged * SPAN  # of its huge pages no more
        self.submitted: list[int] = []
        submit = self.reader.submit

        def note(op: ReadOp, destination: memoryview) -> Ticket:
            self.submitted.append(op.offset_bytes // BYTES)
            return submit(op, destination)

        vars(self.reader)["submit"] = note
        self.cache = ExpertCache(
            self.reader,
            self.expert,
            SlotPool(slots * SPAN, self.accelerator),
            slot_bytes=SPAN,
            slots=slots,
            staging=self.staging,
            held={(0, n): self._hold(n) for n in held},
            stats=self.stats,
        )

    def _hold(self, number: int) -> torch.Tensor:
        unit = self.expert((0, number)).unit
        buffer = self.memory.allocate(unit.span_bytes)
        buffer.tensor(unit.op_offsets[0], BYTES).fill_(number)
        return buffer.tensor(0, unit.span_bytes)

    def close(self) -> None:
        super().close()
        self.memory.close()
        if self.staging is not None:
            self.staging.close()
        assert self.accelerator.races == []
        assert self.accelerator.pinned == 0


@pytest.fixture
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with watch_slots(monkeypatch):
        yield


@pytest.mark.usefixtures("_watched")
def test_held_experts_are_copied_and_others_are_read(tmp_path: Path) -> None:
    shop = DeviceShop(tmp_path / "experts", slots=4, held=range(6), staged=3)
    shop.use(1, 7, 2, 8)
    assert shop.submitted == [7, 8]
    assert (shop.stats.host_bytes, shop.stats.disk_bytes) == (2 * BYTES, 2 * BYTES)
    shop.use(1, 8)
    assert (shop.stats.host_bytes, shop.stats.device_bytes) == (2 * BYTES, 2 * BYTES)
    shop.close()


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_held_experts_pass_through_few_slots_in_any_order(tmp_path: Path, slots: int) -> None:
    shop = DeviceShop(tmp_path / "experts", slots=slots, held=range(0, EXPERTS, 2), staged=2)
    for _ in range(2):
        shop.use(*range(EXPERTS))
        shop.use(*reversed(range(EXPERTS)))
        shop.use(0, 2, 4, 1, 3, 5)
    assert set(shop.submitted) == set(range(1, EXPERTS, 2))
    shop.close()


@pytest.mark.usefixtures("_watched")
def test_all_experts_held_need_no_memory_to_read_them_to(tmp_path: Path) -> None:
    shop = DeviceShop(tmp_path / "experts", slots=3, held=range(EXPERTS), staged=0)
    shop.use(*range(EXPERTS))
    shop.use(*range(EXPERTS))
    assert (shop.submitted, shop.stats.disk_bytes) == ([], 0)
    assert shop.cache.held == EXPERTS
    shop.close()
    assert shop.cache.held == 0


@pytest.mark.usefixtures("_watched")
def test_held_expert_that_nobody_announced_takes_no_slot_that_is_read_for(tmp_path: Path) -> None:
    shop = DeviceShop(tmp_path / "experts", slots=3, held=[0, 1], staged=2)
    shop.cache.want([(0, 5), (0, 6), (0, 1)])
    assert int(shop.cache.get((0, 0))["w"].sections["dense"][0]) == 0
    shop.use(5, 6, 1)
    assert shop.submitted == [5, 6]
    shop.close()


@pytest.mark.usefixtures("_watched")
def test_read_that_fails_among_held_experts_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "experts"
    shop = DeviceShop(path, slots=3, held=[0, 1], staged=2)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * BYTES])
    with pytest.raises(LoadError, match=str(path)):
        shop.use(0, 1, 2)
    shop.use(0, 1)
    shop.close()

"""Products on the GPU take the fastest way, find it out once per kind of weight, and launch cheaply."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from endor.errors import KernelError
from endor.formats.packed import PackedTensor
from endor.kernels import encode
from tests.support.triton import DEVICE, MARKS, on_device, sparse_normal

pytestmark = MARKS


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is known yet; where results are kept."""
    from endor.kernels import triton_matmul

    file = tmp_path / "cache" / "tiles.json"
    new_process(monkeypatch, file)
    yield file
    triton_matmul.set_tuning(allowed=True)


def new_process(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Forget what this process knows."""
    from endor.kernels import triton_matmul, triton_tuning

    monkeypatch.setattr(triton_matmul, "_choices", triton_tuning.Choices(file))


@dataclass
class FakeClock:
    """Says that the run number `fastest` took least; counts runs."""

    fastest: int
    runs: list[object] = field(default_factory=list)

    def __call__(self, run: Callable[[], object]) -> float:
        self.runs.append(run())
        return float(len(self.runs) - 1 != self.fastest)


DECODE = 3
"""The last way that is timed with one row of x, behind three tiles."""


def packed_of(shape: tuple[int, int] = (3, 300), codec: str = "raw", seed: int = 0) -> PackedTensor:
    return on_device(encode(sparse_normal(shape, seed=seed), values=codec, backend="reference"))


def ones(rows: int = 1, cols: int = 300) -> torch.Tensor:
    return torch.ones(rows, cols, dtype=torch.bfloat16, device=DEVICE)


def tile_used(monkeypatch: pytest.MonkeyPatch, packed: PackedTensor, rows: int = 1) -> Any:
    """The tile that `linear` launches; None if it leaves the product to its caller."""
    from endor.kernels import triton_matmul

    used: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(triton_matmul, "_launch", lambda *_, tile, **__: used.append(tile))
        triton_matmul.linear(ones(rows, packed.layout.shape[1]), packed)
    return used[0] if used else None


@pytest.mark.parametrize("number", [0, 2])
def test_the_fastest_tile_is_used_in_this_process_and_in_later_ones(
    number: int, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from endor.kernels import triton_matmul

    packed = packed_of()
    assert triton_matmul.decide(packed, 1, FakeClock(number)) == triton_matmul.tiles(1)[number]
    assert tile_used(monkeypatch, packed) == triton_matmul.tiles(1)[number]
    new_process(monkeypatch, file)
    unused = FakeClock(0)
    assert triton_matmul.decide(packed, 1, unused) == triton_matmul.tiles(1)[number]
    assert not unused.runs


def test_linear_leaves_the_product_to_its_caller_where_decoding_first_is_faster(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from endor.kernels import triton_matmul

    packed = packed_of()
    triton_matmul.decide(packed, 1, FakeClock(DECODE))
    assert triton_matmul.linear(ones(), packed) is None
    new_process(monkeypatch, file)
    triton_matmul.decide(packed, 1, FakeClock(0))
    assert triton_matmul.linear(ones(), packed) is None
    forced = triton_matmul.linear(ones(), packed, tile=triton_matmul.tiles(1)[0])
    assert forced is not None


def test_what_is_timed_are_products_and_all_ways_give_the_same() -> None:
    from endor.kernels import triton_matmul

    weight = torch.randint(-7, 8, (5, 300), generator=torch.Generator().manual_seed(0)).bfloat16()
    clock = FakeClock(0)
    triton_matmul.decide(on_device(encode(weight, values="exponent", backend="reference")), 1, clock)
    assert len(clock.runs) == len(triton_matmul.tiles(1)) + 1
    expected = weight.float().sum(dim=1).bfloat16()
    for y in clock.runs:
        assert isinstance(y, torch.Tensor)
        assert torch.equal(y.cpu()[0], expected)


def test_one_and_several_rows_are_decided_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from endor.kernels import triton_matmul

    packed = packed_of()
    triton_matmul.set_tuning(allowed=False)
    triton_matmul.decide(packed, 1, FakeClock(DECODE))
    triton_matmul.decide(packed, 3, FakeClock(1))
    assert tile_used(monkeypatch, packed, 1) is None
    for rows in (2, 16):
        assert tile_used(monkeypatch, packed, rows) == triton_matmul.tiles(rows)[1]


def test_weights_that_are_alike_are_timed_once_and_others_on_their_own() -> None:
    from endor.kernels import triton_matmul

    triton_matmul.decide(packed_of(), 1, FakeClock(0))
    alike = FakeClock(0)
    triton_matmul.decide(packed_of(seed=1), 1, alike)
    assert not alike.runs
    for other in (packed_of((4, 300)), packed_of(codec="exponent"), packed_of(codec="int8")):
        clock = FakeClock(0)
        triton_matmul.decide(other, 1, clock)
        assert clock.runs


@pytest.mark.parametrize("stored", [[4, 32, 3], [1, 2], "fast", [4.0, 32, 4], None, {"blocks": 4}], ids=str)
def test_a_stored_way_that_there_is_not_is_timed_again(
    stored: object, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from endor.kernels import triton_matmul

    packed = packed_of()
    triton_matmul.decide(packed, 1, FakeClock(0))
    content = json.loads(file.read_text())
    content["content"] = dict.fromkeys(content["content"], stored)
    file.write_text(json.dumps(content))
    new_process(monkeypatch, file)
    assert triton_matmul.decide(packed, 1, FakeClock(1)) == triton_matmul.tiles(1)[1]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "content": {}}', '{"version": 1}'])
def test_a_file_that_is_none_of_ours_is_replaced(text: str, file: Path) -> None:
    from endor.kernels import triton_matmul

    file.parent.mkdir()
    file.write_text(text)
    triton_matmul.decide(packed_of(), 1, FakeClock(1))
    triton_matmul.decide(packed_of((4, 300)), 1, FakeClock(DECODE))
    found = json.loads(file.read_text())
    assert sorted(map(str, found["content"].values())) == ["[4, 32, 4]", "decode first"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_place_that_cannot_be_written_costs_only_the_memory_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from endor.kernels import triton_matmul

    (tmp_path / "occupied").write_text("")
    new_process(monkeypatch, tmp_path / "occupied" / "tiles.json")
    packed = packed_of()
    assert triton_matmul.decide(packed, 1, FakeClock(2)) == triton_matmul.tiles(1)[2]
    assert tile_used(monkeypatch, packed) == triton_matmul.tiles(1)[2]


def test_without_memory_for_the_dense_weight_only_tiles_are_compared_and_only_for_now(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from endor.kernels import triton_matmul, triton_tuning

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    packed, clock = packed_of(), FakeClock(2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        assert triton_tuning.scratch_of(packed) is None
    monkeypatch.setattr(triton_matmul, "scratch_of", lambda _: None)
    assert triton_matmul.decide(packed, 1, clock) == triton_matmul.tiles(1)[2]
    assert len(clock.runs) == len(triton_matmul.tiles(1))
    assert not file.exists()


def test_where_nothing_may_be_timed_the_first_tile_is_taken(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from endor.kernels import triton_matmul

    monkeypatch.setattr(triton_matmul, "EventClock", None)
    triton_matmul.set_tuning(allowed=False)
    assert tile_used(monkeypatch, packed_of()) == triton_matmul.tiles(1)[0]
    assert tile_used(monkeypatch, packed_of(), 7) == triton_matmul.tiles(7)[0]
    assert not file.exists()


def test_what_cannot_be_multiplied_cannot_be_decided() -> None:
    from endor.kernels import triton_matmul

    with pytest.raises(KernelError, match="no tile multiplies 1 rows"):
        triton_matmul.decide(on_device(encode(torch.ones(8, 256), backend="reference")), 1, FakeClock(0))


def test_arguments_are_put_together_once_for_a_weight() -> None:
    from endor.kernels.triton_operand import operand_of

    packed = packed_of()
    assert operand_of(packed) is operand_of(packed)
    assert operand_of(packed_of()) is not operand_of(packed)


def test_sections_in_other_memory_are_another_operand() -> None:
    from endor.kernels.triton_operand import operand_of

    packed = packed_of()
    before = operand_of(packed)
    sections: dict[str, torch.Tensor] = packed.sections  # type: ignore[assignment]
    sections["values"] = sections["values"].clone()
    after = operand_of(packed)
    assert after is not before
    assert {s.data_ptr() for s in after.sections if s is not None} >= {sections["values"].data_ptr()}


def test_the_operand_of_a_weight_that_is_gone_is_forgotten() -> None:
    from endor.kernels import triton_operand

    packed = packed_of()
    triton_operand.operand_of(packed)
    key = id(packed)
    assert key in triton_operand._operands
    del packed
    gc.collect()
    assert key not in triton_operand._operands


def test_contents_that_change_behind_an_operand_are_seen() -> None:
    """Slots of a ring get other contents; where a section had to be copied, nothing old may be remembered."""
    from endor.kernels.triton_operand import operand_of

    packed = packed_of()
    memory = torch.zeros(packed.sections["bitmap"].numel() + 1, dtype=torch.uint8, device=DEVICE)
    memory[1:] = packed.sections["bitmap"].flatten()
    shifted = PackedTensor(
        packed.layout, {**packed.sections, "bitmap": memory[1:].view(packed.sections["bitmap"].shape)}
    )
    bitmap = operand_of(shifted).sections[0]
    assert bitmap is not None
    memory.zero_()
    changed = operand_of(shifted).sections[0]
    assert changed is not None
    assert bitmap.any()
    assert not changed.any()

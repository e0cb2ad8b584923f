"""Experts of a device that are in host memory: the same logits, copied and not read, within the memory that
was planned, in the order that events enforce."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import ChecksumError
from endor.formats.header import TensorEntry
from endor.loaders import Accelerator, BlockingAccelerator, CudaAccelerator
from endor.runtime import Runtime, runtime_of
from endor.runtime.planner import Budgets, Decision, ModelSizes, decide
from endor.runtime.survey import survey
from tests.runtime.test_sliced_weights import converted, deepseek, mixtral, olmoe, qwen3_moe
from tests.support.accelerators import CheckedAccelerator, watch_slots

IDS = torch.tensor([[5, 17, 20, 3, 99, 42, 7]])
ACCELERATORS = ("late", "early", pytest.param("cuda", marks=pytest.mark.gpu))
EXPERTS = 8
PLENTY = 1 << 30
ROWS = IDS.numel() * 64 * 2
"""Of the embedding, for which a device of 0 bytes has no room."""


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with watch_slots(monkeypatch):
        yield


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    if request.param == "cuda":
        yield CudaAccelerator(torch.device("cuda"))
        return
    made = CheckedAccelerator(late=request.param == "late")
    yield made
    assert made.races == []
    gc.collect()
    assert made.pinned == 0, "pinned memory was left"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    return converted(mixtral(), tmp_path_factory.mktemp("moe"))


@pytest.fixture
def directory(moe: tuple[Path, Any]) -> Path:
    return moe[0]


def sizes_of(directory: Path) -> ModelSizes:
    return survey(directory, dtype=None, matmul="decode", own_memory=True).sizes


def budget(directory: Path, held: int) -> int:
    """Of the host, beside a device that has none: all blocks, and so many experts of each layer."""
    sizes = sizes_of(directory)
    blocks = sum(block.whole.nbytes for block in sizes.blocks)
    return blocks + sum(layer.span_bytes(n) for layer in sizes.experts for n in range(held))


def load(directory: Path, accelerator: Accelerator, host_memory: int, **options: Any) -> Any:
    wanted = {"device_memory": 0, "matmul": "decode", "context_length": 64, **options}
    return endor.load(directory, device=accelerator, host_memory=host_memory, **wanted)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found = model(ids.to(model.device)).logits
    assert isinstance(found, torch.Tensor)
    return found.cpu()


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, accelerator: Accelerator) -> None:
    """Bit for bit, but for a GPU, which adds in another order than the CPU."""
    if accelerator.device.type == "cpu":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


def copy_checkpoint(source: Path, target: Path) -> None:
    """For a test that breaks it."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def experts_of(checkpoint: endor.Checkpoint) -> list[TensorEntry]:
    """Entries that are stacks of experts."""
    return [entry for entry in checkpoint.entries.values() if len(entry.layout.shape) == 3]


def routed_by_layer(model: Any, ids: torch.Tensor) -> list[set[int]]:
    """The experts that a forward takes, by layer."""
    found: list[set[int]] = []
    runtime = runtime_of(model)
    enter = runtime.enter_experts

    def note(layer: int, chosen: torch.Tensor | None) -> None:
        assert chosen is not None
        found.append(set(chosen.flatten().tolist()))
        enter(layer, chosen)

    vars(runtime)["enter_experts"] = note
    logits(model, ids)
    del vars(runtime)["enter_experts"]
    return found


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, olmoe, deepseek])
@pytest.mark.parametrize(("depth", "held"), [(0, 3), (0, EXPERTS), (1, 3), (2, 3), (2, EXPERTS)])
def test_logits_are_the_dense_models_with_some_and_with_all_experts_in_host_memory(
    accelerator: Accelerator, family: Any, depth: int, held: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directory, dense = converted(family(), tmp_path)
    model = load(directory, accelerator, budget(directory, held), depth=depth)
    assert f", {held * len(sizes_of(directory).experts)} in host memory" in runtime_of(model).in_parts
    for _ in range(2):
        assert_same_logits(logits(model), logits(dense), accelerator)
    runtime_of(model).close()


def test_nothing_is_read_for_experts_that_are_all_in_host_memory(
    accelerator: Accelerator, directory: Path
) -> None:
    model = load(directory, accelerator, PLENTY)
    runtime = runtime_of(model)
    assert "room for 3 of 16 experts, 16 in host memory" in runtime.in_parts
    before = runtime.stats()
    logits(model)
    moved = runtime.stats() - before
    assert moved.disk_bytes == ROWS
    assert moved.host_bytes > sum(block.whole.nbytes for block in sizes_of(directory).blocks)
    runtime.close()


@pytest.mark.parametrize("held", [1, 3, 7])
def test_each_expert_comes_from_the_tier_it_is_in(
    accelerator: Accelerator, directory: Path, held: int
) -> None:
    model = load(directory, accelerator, budget(directory, held))
    runtime = runtime_of(model)
    before = runtime.stats()
    chosen = routed_by_layer(model, IDS)  # with nothing in the slots
    moved = (runtime.stats() - before).bytes_by_tier()
    units = [[stacks.expert(n).unit.total_bytes for n in range(EXPERTS)] for stacks in runtime._experts]
    by_tier = {"host": 0, "disk": 0}
    for used, of_layer in zip(chosen, units, strict=True):
        for number in used:
            by_tier["host" if number < held else "disk"] += of_layer[number]
    blocks = sum(block.whole.nbytes for block in sizes_of(directory).blocks)
    assert min(by_tier.values()) > 0
    assert moved == {"device": 0, "host": blocks + by_tier["host"], "disk": ROWS + by_tier["disk"]}
    runtime.close()


@pytest.mark.parametrize("device_memory", [0, 60_000, PLENTY])
@pytest.mark.parametrize("held", [0, 1, 3, EXPERTS])
@pytest.mark.parametrize("depth", [0, 2])
def test_memory_is_what_was_planned(
    accelerator: Accelerator, directory: Path, held: int, device_memory: int, depth: int
) -> None:
    host_memory = budget(directory, held)
    decision = decide(
        sizes_of(directory), Budgets(host_memory, device_memory), depth=depth, context_tokens=64
    )
    model = load(directory, accelerator, host_memory, device_memory=device_memory, depth=depth)
    assert_as_planned(runtime_of(model), decision)
    if device_memory == 0:
        assert decision.host_experts == (held, held)
    if device_memory == PLENTY:  # slots for all of them: each is read once
        assert decision.host_experts == (0, 0)
    runtime_of(model).close()


def assert_as_planned(runtime: Runtime, decision: Decision) -> None:
    assert decision.host_memory is not None
    assert runtime.placement == decision.placement
    assert runtime.pinned_bytes == decision.host_memory.total
    assert runtime.ring_bytes == decision.memory.ring + decision.memory.experts
    assert (f"{sum(decision.host_experts)} in host memory" in runtime.in_parts) == any(decision.host_experts)


def test_pinned_memory_is_taken_once_and_given_back(directory: Path) -> None:
    accelerator = CheckedAccelerator()
    model = load(directory, accelerator, PLENTY)
    runtime, taken = runtime_of(model), accelerator.pinned
    assert taken == runtime.pinned_bytes > 0
    logits(model)
    assert accelerator.pinned == taken
    runtime.close()
    assert accelerator.pinned == 0
    cache = runtime._tiers.experts
    assert cache is not None
    assert (cache.held, cache.slots) == (0, 0)


def test_a_model_that_is_dropped_gives_its_pinned_experts_back(directory: Path) -> None:
    accelerator = CheckedAccelerator()
    model = load(directory, accelerator, PLENTY)
    logits(model)
    del model
    gc.collect()
    assert accelerator.pinned == 0


def test_nothing_waits_for_the_whole_device_while_experts_are_copied(directory: Path) -> None:
    accelerator = CheckedAccelerator()
    model = load(directory, accelerator, budget(directory, 4))
    settled = accelerator.settled
    for _ in range(3):
        logits(model)
    assert accelerator.settled == settled
    runtime_of(model).close()


def test_an_exception_among_experts_leaves_a_model_that_works(
    accelerator: Accelerator, directory: Path
) -> None:
    model = load(directory, accelerator, budget(directory, 4))
    expected = logits(model)
    cache = runtime_of(model)._tiers.experts
    assert cache is not None
    calls = 0
    get = cache.get

    def fail(key: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return get(key)

    vars(cache)["get"] = fail
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    del vars(cache)["get"]
    assert torch.equal(logits(model), expected)
    runtime_of(model).close()


@pytest.mark.parametrize("held", [0, 4, EXPERTS])
def test_a_flipped_bit_of_an_expert_is_found_when_the_model_is_loaded(
    moe: tuple[Path, Any], accelerator: Accelerator, held: int, tmp_path: Path
) -> None:
    host_memory = budget(moe[0], held)
    copy_checkpoint(moe[0], tmp_path)
    with endor.open(tmp_path) as opened:
        entry = experts_of(opened)[0]
        home, section = opened.home(entry.name), entry.sections[-1]
        at = home.offset + section.begin - home.block.begin
    content = bytearray(home.file.read_bytes())
    content[at + 5] ^= 1
    home.file.write_bytes(content)
    with pytest.raises(ChecksumError, match=entry.name.replace(".", r"\.")):
        load(tmp_path, accelerator, host_memory)


def test_what_is_in_host_memory_is_not_read_again(
    moe: tuple[Path, Any], accelerator: Accelerator, tmp_path: Path
) -> None:
    copy_checkpoint(moe[0], tmp_path)
    model = load(tmp_path, accelerator, PLENTY)
    expected = logits(model)
    with endor.open(tmp_path) as opened:
        for entry in experts_of(opened):
            home = opened.home(entry.name)
            before = home.file.stat()
            with home.file.open("r+b") as file:
                file.seek(home.offset + entry.sections[0].begin - home.block.begin)
                file.write(bytes(entry.sections[-1].end - entry.sections[0].begin))
            os.utime(home.file, ns=(before.st_atime_ns, before.st_mtime_ns))  # rows are read on
    assert torch.equal(logits(model), expected)
    runtime_of(model).close()


def test_a_device_that_copies_at_once_does_the_same(moe: tuple[Path, Any]) -> None:
    directory, dense = moe
    model = load(directory, BlockingAccelerator(torch.device("cpu")), budget(directory, 4))
    assert torch.equal(logits(model), logits(dense))
    runtime_of(model).close()


def test_a_cpu_holds_no_experts_apart_from_its_slots(directory: Path) -> None:
    sizes = survey(directory, dtype=None, matmul="decode").sizes
    assert decide(sizes, Budgets(PLENTY), depth=2).host_experts == ()
    model = endor.load(directory, device="cpu", host_memory=PLENTY)
    assert "in host memory" not in runtime_of(model).in_parts
    assert runtime_of(model).pinned_bytes == 0
    runtime_of(model).close()

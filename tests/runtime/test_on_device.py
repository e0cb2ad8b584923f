"""A model on a device with memory of its own: the same tokens from every tier, in the order that events
enforce, within the memory that was planned.

The device is one that does everything as late as it may, here and there one that does it at once or has no
streams, and a GPU where there is one.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import ChecksumError, LoadError, PlanError
from endor.loaders import Accelerator, BlockingAccelerator, CudaAccelerator
from endor.runtime import Trace, runtime_of
from endor.runtime.planner import Budgets, decide
from endor.runtime.survey import survey
from endor.runtime.tiers import close_anywhere, close_parts
from tests.runtime.test_sliced_weights import converted, mixtral, qwen3_moe
from tests.support.accelerators import CheckedAccelerator, watch_slots
from tests.support.models import dense_reference, tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])
ACCELERATORS = ("late", pytest.param("cuda", marks=pytest.mark.gpu))
TIERS = {
    "disk": (0, 0),
    "host": (0, 1 << 30),
    "device": (1 << 30, 0),
    "device and disk": (90_000, 0),
    "host and disk": (0, 90_000),
    "device and host": (90_000, 1 << 30),
    "all three": (45_000, 90_000),
}
LAYERS = 5


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with watch_slots(monkeypatch):
        yield


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    made: Accelerator
    if request.param == "cuda":
        made = CudaAccelerator(torch.device("cuda"))
    elif request.param == "blocking":
        made = BlockingAccelerator(torch.device("cpu"))
    else:
        made = CheckedAccelerator(late=request.param == "late")
    yield made
    if isinstance(made, CheckedAccelerator):
        assert made.races == []
        gc.collect()
        assert made.pinned == 0, "pinned memory was left"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    base = tmp_path_factory.mktemp("device")
    model = tiny_llama(layers=LAYERS)
    return write_endor_checkpoint(model, base / "endor"), dense_reference(model, base / "dense")


@pytest.fixture
def checkpoint(models: tuple[Path, Any]) -> Path:
    return models[0]


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(directory: Path, accelerator: Accelerator, tiers: str = "disk", **options: Any) -> Any:
    device_memory, host_memory = TIERS[tiers]
    wanted = {"device_memory": device_memory, "host_memory": host_memory, "matmul": "decode", **options}
    return endor.load(directory, device=accelerator, **wanted)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found = model(ids.to(model.device)).logits
    assert isinstance(found, torch.Tensor)
    return found.cpu()


def generate(model: Any, tokens: int = 6) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            IDS.to(model.device), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    return [int(token) for token in out[0]]


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, accelerator: Accelerator) -> None:
    """Bit for bit, but for a GPU, which adds in another order than the CPU."""
    if accelerator.device.type == "cpu":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("accelerator", ["late", "early", "blocking", ACCELERATORS[1]], indirect=True)
@pytest.mark.parametrize(
    ("tiers", "depth"), [*((tiers, 2) for tiers in TIERS), ("all three", 0), ("all three", 1), ("disk", 9)]
)
def test_tokens_and_logits_are_the_dense_models(
    models: tuple[Path, Any], accelerator: Accelerator, tiers: str, depth: int
) -> None:
    directory, dense = models
    model = load(directory, accelerator, tiers, depth=depth)
    assert_same_logits(logits(model), logits(dense), accelerator)
    if accelerator.device.type == "cpu":
        assert generate(model) == generate(dense)
    runtime_of(model).close()


@pytest.mark.parametrize("tiers", ["disk", "all three"])
def test_every_depth_gives_the_same_tokens(checkpoint: Path, accelerator: Accelerator, tiers: str) -> None:
    oracle = load(checkpoint, accelerator, tiers, depth=0)
    expected = generate(oracle)
    runtime_of(oracle).close()
    for depth in (1, 2, 3):
        model = load(checkpoint, accelerator, tiers, depth=depth)
        assert generate(model) == expected
        runtime_of(model).close()


@pytest.mark.parametrize("tiers", TIERS)
def test_a_token_uses_every_block_once_from_the_tier_it_is_in(
    checkpoint: Path, accelerator: Accelerator, tiers: str
) -> None:
    model = load(checkpoint, accelerator, tiers)
    runtime = runtime_of(model)
    sizes = [block.whole.nbytes for block in survey(checkpoint, dtype=None, matmul="decode").sizes.blocks]
    logits(model)
    before = runtime.stats()
    logits(model, IDS[:, :1])
    moved = (runtime.stats() - before).bytes_by_tier()
    rows = 64 * 2 if "embed" in runtime.in_parts else 0
    for tier, kept in (("device", runtime.placement.device), ("host", runtime.placement.host)):
        assert moved[tier] == sum(sizes[i] for i in kept), tier
    assert moved["disk"] - rows == pytest.approx(sum(sizes[i] for i in runtime.placement.disk), abs=8192)
    runtime.close()


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_memory_is_what_was_planned(accelerator: Accelerator, tiers: str, tied: bool, tmp_path: Path) -> None:
    directory = write_endor_checkpoint(tiny_llama(tied=tied), tmp_path)
    device_memory, host_memory = TIERS[tiers]
    model = load(directory, accelerator, tiers, context_length=100)
    runtime = runtime_of(model)
    sizes = survey(directory, dtype=None, matmul="decode", own_memory=True).sizes
    decision = decide(sizes, Budgets(host_memory, device_memory), depth=2, context_tokens=100)
    assert runtime.placement == decision.placement
    assert runtime.ring_bytes == decision.memory.ring
    assert runtime.resident_bytes == decision.memory.resident
    assert runtime.scratch_bytes == decision.memory.scratch
    assert runtime.dense_bytes == decision.memory.dense
    assert decision.host_memory is not None
    assert runtime.pinned_bytes == decision.host_memory.total
    runtime.close()


@pytest.mark.parametrize("family", [mixtral, qwen3_moe])
@pytest.mark.parametrize("tiers", ["disk", "device and disk", "device"])
def test_experts_are_copied_one_by_one(
    accelerator: Accelerator, family: Any, tiers: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directory, dense = converted(family(), tmp_path)
    model = load(directory, accelerator, tiers)
    ids = IDS % 120
    for _ in range(2):
        assert_same_logits(logits(model, ids), logits(dense, ids), accelerator)
    runtime_of(model).close()


def test_a_head_larger_than_a_layer_goes_through_the_ring_in_tiles(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = tiny_llama(layers=2)
    source.resize_token_embeddings(6000)
    directory, dense = converted(source, tmp_path)
    model = load(directory, accelerator, "disk")
    assert "tiles" in runtime_of(model).in_parts
    assert_same_logits(logits(model), logits(dense), accelerator)
    runtime_of(model).close()


def test_time_of_the_device_adds_up(checkpoint: Path, accelerator: Accelerator) -> None:
    model = load(checkpoint, accelerator, "disk")
    generate(model)
    runtime = runtime_of(model)
    stats, each = runtime.stats(), runtime.per_forward()
    assert stats.forwards == len(each) == 6
    assert stats.wall_s == pytest.approx(stats.stall_s + stats.decode_s + stats.compute_s)
    assert stats.copy_s > 0
    assert stats.stall_s > 0
    assert sum(one.wall_s for one in each) == pytest.approx(stats.wall_s)
    assert sum(one.disk_bytes for one in each) == stats.disk_bytes
    runtime.close()


def test_a_trace_has_the_copies(checkpoint: Path, accelerator: Accelerator, tmp_path: Path) -> None:
    trace = Trace()
    model = load(checkpoint, accelerator, "disk", trace=trace)
    logits(model)
    runtime_of(model).close()
    trace.save(tmp_path / "trace.json")
    assert '"copy"' in (tmp_path / "trace.json").read_text()


def test_nothing_waits_for_the_whole_device_while_tokens_are_made(checkpoint: Path) -> None:
    accelerator = CheckedAccelerator(late=True)
    model = load(checkpoint, accelerator, "all three")
    settled = accelerator.settled
    generate(model)
    assert accelerator.settled == settled
    runtime_of(model).close()


@pytest.mark.parametrize("matmul", ["auto", "decode"])
@pytest.mark.parametrize("tiers", ["host", "device", "device and host"])
def test_the_thread_of_the_model_waits_for_no_event(checkpoint: Path, tiers: str, matmul: str) -> None:
    accelerator = CheckedAccelerator(late=True)
    model = load(checkpoint, accelerator, tiers, matmul=matmul)
    logits(model)
    me = threading.get_ident()
    before = accelerator.waits[me]
    logits(model)
    logits(model, IDS[:, :1])
    assert accelerator.waits[me] == before
    runtime_of(model).close()


def test_the_layers_alone_fill_no_memory_with_times(checkpoint: Path) -> None:
    model = load(checkpoint, CheckedAccelerator(late=False), "disk")
    times = runtime_of(model)._stats._device
    assert times is not None
    with torch.inference_mode():
        for _ in range(150):
            model.model(IDS)
    assert len(times._open) < 4096 + 100
    runtime_of(model).close()


def test_closing_gives_everything_back(checkpoint: Path, accelerator: Accelerator) -> None:
    threads = set(threading.enumerate())
    model = load(checkpoint, accelerator, "all three")
    logits(model)
    runtime_of(model).close()
    assert set(threading.enumerate()) == threads
    assert not any(name.startswith("endor") for name in vars(model))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_what_the_collector_closes_in_a_thread_of_ours_waits_for_no_other(checkpoint: Path) -> None:
    closed = threading.Event()

    class Part:
        def close(self) -> None:
            assert threading.current_thread().name == "closing"
            closed.set()

    thread = threading.Thread(target=close_anywhere, args=([Part()],), name="endor-prefetch")
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert closed.wait(10)


def test_all_parts_are_closed_even_if_one_fails() -> None:
    closed: list[int] = []

    class Part:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self) -> None:
            closed.append(self.number)
            if self.number < 2:
                raise RuntimeError(f"part {self.number}")

    with pytest.raises(RuntimeError, match="part 0"):
        close_parts([Part(number) for number in range(3)])
    assert closed == [0, 1, 2]


def test_a_model_that_is_dropped_closes_itself(checkpoint: Path) -> None:
    accelerator = CheckedAccelerator()
    threads = set(threading.enumerate())
    model = load(checkpoint, accelerator, "all three")
    logits(model)
    del model
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert accelerator.pinned == 0


@pytest.mark.parametrize("tiers", ["disk", "host", "device"])
def test_a_flipped_bit_is_a_checksum_error(damaged: Path, accelerator: Accelerator, tiers: str) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    with endor.open(damaged) as opened:
        home = opened.home(name)
        section = opened.entry(name).sections[-1]
        file, at = home.file, home.offset + section.begin - home.block.begin
    content = bytearray(file.read_bytes())
    content[at + 5] ^= 1
    file.write_bytes(content)

    def run() -> None:
        model = load(damaged, accelerator, tiers)
        try:
            logits(model)
        finally:
            runtime_of(model).close()

    with pytest.raises(ChecksumError, match=name):
        run()


def test_a_file_that_is_cut_short_is_an_error_and_the_next_load_works(
    damaged: Path, checkpoint: Path, accelerator: Accelerator
) -> None:
    model = load(damaged, accelerator, "disk")
    logits(model)
    for file in damaged.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
    with pytest.raises(LoadError, match=r"model-0000\d-of-00002.safetensors"):
        logits(model)
    runtime_of(model).close()
    again = load(checkpoint, accelerator, "disk")
    logits(again)
    runtime_of(again).close()


def test_an_exception_in_a_layer_releases_its_slot(checkpoint: Path, accelerator: Accelerator) -> None:
    model = load(checkpoint, accelerator, "disk")
    expected = logits(model)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of layer 2")

    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="layer 2"):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected)
    runtime_of(model).close()


def test_ctrl_c_in_a_forward_leaves_a_model_that_works(checkpoint: Path, accelerator: Accelerator) -> None:
    model = load(checkpoint, accelerator, "disk")
    expected = logits(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[3].self_attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected)
    runtime_of(model).close()


def test_threads_take_turns(checkpoint: Path, accelerator: Accelerator) -> None:
    model = load(checkpoint, accelerator, "device and disk")
    expected = logits(model)
    scratch_bytes = runtime_of(model).scratch_bytes
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, expected) for one in found)
    assert runtime_of(model).scratch_bytes == scratch_bytes
    runtime_of(model).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_dtype_is_cast_on_the_device(
    models: tuple[Path, Any], accelerator: Accelerator, dtype: torch.dtype
) -> None:
    directory, dense = models
    model = load(directory, accelerator, "all three", dtype=dtype)
    expected = logits(type(dense).from_pretrained(dense.name_or_path, dtype=dtype))
    assert_same_logits(logits(model), expected, accelerator)
    runtime_of(model).close()


def test_without_a_budget_the_device_gets_what_fits(checkpoint: Path) -> None:
    sizes = survey(checkpoint, dtype=None, matmul="decode", own_memory=True).sizes
    all_of_it = load(checkpoint, CheckedAccelerator(), device_memory=None, context_length=8)
    assert runtime_of(all_of_it).placement.counts()["device"] == len(sizes.blocks)
    runtime_of(all_of_it).close()
    small = CheckedAccelerator(total_bytes=264 << 20)
    some = load(checkpoint, small, device_memory=None, context_length=8)
    runtime = runtime_of(some)
    assert runtime.ring_bytes + runtime.resident_bytes + runtime.scratch_bytes <= small.total_bytes
    runtime.close()


def test_a_device_that_is_too_small_is_refused_with_what_would_do(checkpoint: Path) -> None:
    accelerator = CheckedAccelerator(total_bytes=1 << 20)
    with pytest.raises(PlanError, match="bytes of device memory are needed") as refused:
        load(checkpoint, accelerator, device_memory=None)
    assert "at least" in str(refused.value)


def test_a_budget_beyond_the_device_is_refused_with_one_that_fits(checkpoint: Path) -> None:
    accelerator = CheckedAccelerator(total_bytes=257 << 20)
    with pytest.raises(PlanError, match="are free: ring") as refused:
        load(checkpoint, accelerator, device_memory=1 << 30)
    assert "would fit" in str(refused.value) or "at least" in str(refused.value)


def test_parameters_that_are_not_packed_and_do_not_fit_are_refused_before_they_are_moved(
    checkpoint: Path,
) -> None:
    with pytest.raises(PlanError, match="bytes of parameters are not packed"):
        load(checkpoint, CheckedAccelerator(total_bytes=100))


def test_device_memory_on_the_cpu_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="host_memory"):
        endor.load(checkpoint, device="cpu", device_memory=1)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", 3])
def test_what_is_no_device_is_refused(checkpoint: Path, device: Any) -> None:
    with pytest.raises(PlanError, match="cuda:N"):
        endor.load(checkpoint, device=device)


@pytest.mark.parametrize("wrong", [{"device_memory": 1.5}, {"context_length": 0}, {"context_length": "4k"}])
def test_wrong_sizes_are_refused(checkpoint: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        endor.load(checkpoint, device=CheckedAccelerator(), **wrong)

"""The planner predicts what loading then does: placement, bytes per token, memory; and refuses in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import endor
from endor.errors import PlanError
from endor.runtime import runtime_of
from endor.runtime.placement import Placement
from endor.runtime.planner import Demand, demand_of, predict
from tests.support.models import tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 200]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endor_checkpoint(
        tiny_llama(tied=request.param), tmp_path_factory.mktemp("planner") / "endor"
    )


@pytest.mark.parametrize("host_memory", [0, 90_000, 1 << 30, None])
@pytest.mark.parametrize("depth", [0, 2])
def test_what_is_planned_is_what_happens(checkpoint: Path, host_memory: int | None, depth: int) -> None:
    demand = demand_of(checkpoint, host_memory=host_memory, depth=depth)
    model = endor.load(checkpoint, host_memory=host_memory, depth=depth)
    runtime = runtime_of(model)
    assert demand.placement == runtime.placement
    assert demand.dense_bytes == runtime.dense_bytes
    assert 0 <= runtime.ring_bytes - demand.ring_bytes < 2 << 20  # the arena is in huge pages
    assert 0 <= runtime.resident_bytes - demand.resident_bytes < 2 << 20
    with torch.inference_mode():
        model(IDS[:, :1])
        before = runtime.stats()
        model(IDS[:, :1])
        moved = runtime.stats() - before
    rows = model.config.hidden_size * 2 if host_memory in (0, 90_000) else 0  # of the embedding
    assert moved.disk_bytes - demand.disk_bytes in (0, rows)
    runtime.close()


def demand(*, disk_bytes: int, host_bytes: int) -> Demand:
    return Demand(
        Placement((), (0,)),
        disk_bytes=disk_bytes,
        host_bytes=host_bytes,
        resident_bytes=7,
        ring_bytes=20,
        dense_bytes=100,
    )


@pytest.mark.parametrize(
    ("disk_bytes", "host_bytes", "bound", "tokens_per_s"),
    [
        pytest.param(1000, 0, "disk", 1.0, id="all from disk"),
        pytest.param(500, 500, "disk", 2.0, id="half the bytes, twice the speed"),
        pytest.param(0, 1000, "memory", 10.0, id="all from memory"),
        pytest.param(10, 9990, "memory", 1.0, id="memory decides where the disk has little to do"),
    ],
)
def test_slower_link_decides(disk_bytes: int, host_bytes: int, bound: str, tokens_per_s: float) -> None:
    found = predict(
        demand(disk_bytes=disk_bytes, host_bytes=host_bytes), disk_bytes_per_s=1000, memory_bytes_per_s=10_000
    )
    assert found.bound == bound
    assert found.tokens_per_s == pytest.approx(tokens_per_s)


def test_memory_is_what_stays_the_ring_and_what_is_dense() -> None:
    assert demand(disk_bytes=1, host_bytes=1).memory_bytes == 127


@pytest.mark.parametrize(("disk", "memory"), [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_link_that_moves_nothing_is_refused(disk: float, memory: float) -> None:
    with pytest.raises(PlanError, match="bandwidths are more than 0 bytes/s, found disk"):
        predict(demand(disk_bytes=1, host_bytes=1), disk_bytes_per_s=disk, memory_bytes_per_s=memory)


def test_model_without_weights_has_no_bound() -> None:
    with pytest.raises(PlanError, match="has no weights"):
        predict(demand(disk_bytes=0, host_bytes=0), disk_bytes_per_s=1, memory_bytes_per_s=1)


def test_budget_too_small_says_what_is_needed(checkpoint: Path) -> None:
    with pytest.raises(
        PlanError, match=r"a host memory budget of 100 bytes holds no block: .* needs \d+ bytes"
    ):
        demand_of(checkpoint, host_memory=100)

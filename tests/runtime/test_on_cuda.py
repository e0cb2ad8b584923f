"""What only a GPU can show: nothing waits where nothing may, torch's own race detector agrees, the link is
reached, and a real checkpoint runs from the command line. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import PlanError
from endor.loaders import CudaAccelerator, probe_kvikio
from endor.runtime import runtime_of
from tests.support.models import tiny_llama, write_endor_checkpoint

pytestmark = pytest.mark.gpu
IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endor_checkpoint(tiny_llama(), tmp_path_factory.mktemp("cuda"))


def generate(model: Any, tokens: int = 8) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            IDS.to(model.device), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    return [int(token) for token in out[0]]


@pytest.mark.parametrize("matmul", ["auto", "decode"])
@pytest.mark.parametrize("host_memory", [0, 1 << 30], ids=["disk", "host"])
@pytest.mark.parametrize("rows", [1, 40])
def test_layers_are_queued_without_waiting_for_the_device(
    checkpoint: Path, matmul: str, host_memory: int, rows: int
) -> None:
    model = endor.load(checkpoint, device="cuda", device_memory=0, host_memory=host_memory, matmul=matmul)
    layers = model.model.layers
    x = torch.randn(1, rows, 64, dtype=torch.bfloat16, device="cuda")
    places = torch.arange(rows, device="cuda")[None]
    with torch.inference_mode():
        rotary = model.model.rotary_emb(x, position_ids=places)

        def run() -> torch.Tensor:
            hidden = x
            for layer in layers:
                hidden = layer(hidden, position_embeddings=rotary, position_ids=places)
            assert isinstance(hidden, torch.Tensor)
            return hidden

        expected = run().clone()  # also compiles kernels, and chooses among them
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
    runtime_of(model).close()


def test_all_tiers_and_depths_give_the_same_tokens(checkpoint: Path) -> None:
    found = set()
    for device_memory, host_memory in ((0, 0), (0, 1 << 30), (1 << 30, 0), (45_000, 90_000)):
        for depth in (0, 1, 2):
            model = endor.load(
                checkpoint,
                device="cuda",
                device_memory=device_memory,
                host_memory=host_memory,
                depth=depth,
                matmul="decode",
            )
            found.add(tuple(generate(model)))
            runtime_of(model).close()
    assert len(found) == 1


def test_a_model_called_in_another_stream_is_right(checkpoint: Path) -> None:
    model = endor.load(checkpoint, device="cuda", device_memory=0, host_memory=0, matmul="decode")
    ids = IDS.to("cuda")
    with torch.inference_mode():
        expected = model(ids).logits
        streams = [torch.cuda.Stream() for _ in range(3)]
        found = []
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(model(ids).logits)
        torch.cuda.synchronize()
    assert all(torch.equal(one, expected) for one in found)
    runtime_of(model).close()


SANITIZED = """
import sys, torch, endor
from pathlib import Path
from torch.cuda import _sanitizer
from endor.loaders import flight
from endor.runtime import runtime_of
work = flight._work
def watched(*arguments):
    with _sanitizer.cuda_sanitizer.dispatch:  # it watches the thread that it is entered in
        work(*arguments)
flight._work = watched
tiers = {"device_memory": 45_000, "host_memory": 90_000}
model = endor.load(Path(sys.argv[1]), device="cuda", matmul="decode", **tiers)
with torch.inference_mode():
    model.generate(torch.tensor([[5, 17, 200]], device="cuda"), max_new_tokens=4, do_sample=False)
runtime_of(model).close()
print("done")
"""


def test_torchs_race_detector_finds_nothing(checkpoint: Path, repository: Path) -> None:
    """It knows operations of torch, not Triton's: copies to slots, in the threads that start them, and what
    torch reads of them."""
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(checkpoint)],
        env={**os.environ, "TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "done" in done.stdout
    assert "CSAN detected a possible data race" not in done.stderr


def test_no_memory_of_the_device_is_left(checkpoint: Path) -> None:
    generate(model := endor.load(checkpoint, device="cuda", device_memory=45_000, host_memory=90_000))
    runtime_of(model).close()
    del model
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        model = endor.load(checkpoint, device="cuda", device_memory=45_000, host_memory=90_000)
        generate(model)
        runtime_of(model).close()
        del model
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_run_offloaded_runs_on_the_gpu(demo_model: Path, tmp_path: Path) -> None:
    endor.convert(demo_model, tmp_path / "demo", method="magnitude", sparsity=0.5)
    common = [
        sys.executable,
        "-m",
        "endor.cli.run",
        str(tmp_path / "demo"),
        "--prompt",
        "import os",
        "--json",
    ]
    done = subprocess.run(
        [*common, "--device", "cuda", "--device-memory", "1MB", "--host-memory", "1MB"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"]["host"] > 0
    assert found["peak_memory"]["device"] > 0
    assert found["time"]["copy"] > 0
    assert found["kernel"].startswith("triton")


def test_gpudirect_is_used_or_said_not_to_be(checkpoint: Path) -> None:
    found = probe_kvikio(next(checkpoint.glob("*.safetensors")))
    if not found.serves_gds:
        pytest.skip(f"no GPUDirect Storage here: {found.reason}")
    model = endor.load(
        checkpoint, device="cuda", device_memory=0, host_memory=0, reader="kvikio", matmul="decode"
    )
    posix = endor.load(
        checkpoint, device="cuda", device_memory=0, host_memory=0, reader="posix", matmul="decode"
    )
    assert generate(model) == generate(posix)
    assert runtime_of(model).pinned_bytes == 0
    runtime_of(model).close()
    runtime_of(posix).close()


def test_the_link_is_measured_in_the_same_order_as_a_plain_copy() -> None:
    from endor.runtime.bandwidth import machine_bandwidths

    found = machine_bandwidths(Path.cwd(), measure=True)
    assert found.link is not None
    assert found.device is not None
    assert 1e9 < found.link.bytes_per_s < found.device.bytes_per_s


def test_a_device_that_is_nearly_full_is_planned_for(checkpoint: Path) -> None:
    accelerator = CudaAccelerator(torch.device("cuda"))
    leave = 400 << 20  # the margin is 256 MiB
    filler = torch.empty(accelerator.free_bytes() - leave, dtype=torch.uint8, device="cuda")
    model = endor.load(checkpoint, device=accelerator, context_length=64)
    generate(model)
    runtime_of(model).close()
    more = torch.empty(accelerator.free_bytes() - (200 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(PlanError, match="device memory are needed"):
        endor.load(checkpoint, device=accelerator, context_length=64)
    del filler, more


def test_memory_that_cannot_be_pinned_leaves_no_error_behind() -> None:
    accelerator = CudaAccelerator(torch.device("cuda"))
    with pytest.raises(PlanError, match="cannot be pinned"):
        accelerator.pin(torch.empty(1, dtype=torch.uint8).as_strided((1 << 50,), (0,)))
    assert torch.ones(3, device="cuda").sum().item() == 3

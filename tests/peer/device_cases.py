"""A streamed model on the fake accelerator, whose memory no CPU operation may touch; prints a JSON object."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import fakedev  # type: ignore[import-not-found]  # noqa: F401  # registers the device
import torch

import endor
from endor.errors import PlanError
from endor.loaders import BlockingAccelerator
from endor.runtime import runtime_of
from tests.support.models import tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])
FORWARDS = 20
TIERS = {"disk": (0, 0), "host": (0, 1 << 30), "device": (1 << 30, 0), "all three": (45_000, 90_000)}
device: Any = vars(torch)["fakedev"]


def generate(model: Any, tokens: int = 4) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            IDS.to(model.device), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    return [int(token) for token in out[0].cpu()]


def run(directory: Path, device_memory: int, host_memory: int, expected: list[int]) -> dict[str, Any]:
    """Make tokens, and say what some more of them moved to the device and held there."""
    before = device.memory_allocated(0)
    model = endor.load(
        directory,
        device=BlockingAccelerator(torch.device("fakedev:0")),
        device_memory=device_memory,
        host_memory=host_memory,
        matmul="decode",
    )
    runtime = runtime_of(model)
    right = generate(model) == expected
    with torch.inference_mode():
        copied = device.stats()["h2d_bytes"]
        for _ in range(FORWARDS):
            model(IDS[:, :1].to(model.device))
        copied = device.stats()["h2d_bytes"] - copied
    planned = runtime.ring_bytes + runtime.resident_bytes + runtime.scratch_bytes + runtime.dense_bytes
    held = device.memory_allocated(0) - before
    found = {
        "right": right,
        "placement": runtime.placement.counts(),
        "streamed_bytes": FORWARDS * runtime.streamed_bytes,
        "copied_bytes": copied,
        "planned_bytes": planned,
        "held_bytes": held,
    }
    runtime.close()
    del model, runtime
    gc.collect()
    return {**found, "left_bytes": device.memory_allocated(0) - before}


def refused(directory: Path) -> str:
    """What is said when the rest of the device is taken: there must be no out-of-memory error later."""
    free, _ = device.mem_get_info()
    filler = torch.empty(free - (257 << 20), dtype=torch.uint8, device="fakedev:0")
    try:
        endor.load(directory, device=BlockingAccelerator(torch.device("fakedev:0")), device_memory=1 << 30)
    except PlanError as error:
        return str(error)
    finally:
        del filler
    return ""


def main() -> None:
    source = tiny_llama()
    directory = write_endor_checkpoint(source, Path(sys.argv[1]))
    expected = generate(source)
    found: dict[str, Any] = {name: run(directory, *tiers, expected) for name, tiers in TIERS.items()}
    found["refused"] = refused(directory)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

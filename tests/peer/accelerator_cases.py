"""What Endor's dispatch does with an accelerator, counted by the fake one; prints a JSON object."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakedev  # type: ignore[import-not-found]  # noqa: F401  # registers the device
import torch
from torch import nn

from endor.integrations import accelerate as ours
from endor.runtime.filemap import MappedFile

WIDTH, LAYERS = 512, 6
Offload = Callable[[nn.Module, Path], nn.Module]
device: Any = vars(torch)["fakedev"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(x)
        return output


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return ours.disk_offload(model, folder, execution_device=0)


def to_host(model: nn.Module, folder: Path) -> nn.Module:
    return ours.cpu_offload(model, execution_device=0)


def by_map(model: nn.Module, folder: Path) -> nn.Module:
    parts = {f"layers.{number}": "disk" if number % 2 else "cpu" for number in range(LAYERS - 1)}
    return ours.dispatch_model(model, {**parts, f"layers.{LAYERS - 1}": 1}, offload_dir=folder)


def count(offload: Offload, folder: Path) -> dict[str, Any]:
    """Dispatch a model, run it twice, and say what the second time moved and held."""
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = model(x)
        offload(model, folder)
        right = torch.equal(model(x).cpu(), expected)
        gc.collect()
        held, before = device.memory_allocated(0), device.stats()["h2d_bytes"]
        device.reset_peak_memory_stats(0)
        right = right and torch.equal(model(x).cpu(), expected)
    return {
        "right": right,
        "moved_bytes": device.stats()["h2d_bytes"] - before,
        "peak_bytes": device.max_memory_allocated(0) - held,
        "left_bytes": device.memory_allocated(0) - held,
    }


def main() -> None:
    found: dict[str, Any] = {}
    cached_fraction = MappedFile.cached_fraction
    for way in ("ring", "mapped"):
        share = float(way == "mapped")
        vars_of: Any = MappedFile
        vars_of.cached_fraction = lambda *_, share=share: share
        for offload in (to_disk, to_host, by_map):
            found[f"{way} {offload.__name__}"] = count(offload, Path(sys.argv[1]) / way / offload.__name__)
        vars_of.cached_fraction = cached_fraction
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

"""Small modules that the dispatch tests offload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from endor.integrations.accelerate.hooks import align_hooks
from endor.runtime.offload import WeightStream

WIDTH = 256
"""A layer of this width is 256 KiB in float32: too large to stay in memory as a small group."""


class Stack(nn.Module):
    """Layers one after the other, and a norm between each two."""

    def __init__(self, layers: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.norm(torch.tanh(layer(x)))
        return x


class Tied(nn.Module):
    """Two layers with one weight, and one of their own between them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.middle = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return output


class Peeking(nn.Module):
    """Uses its child's weight without calling the child, as some models do."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.use = use
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.inner.weight)


def stack(seed: int = 0, **options: int) -> Stack:
    torch.manual_seed(seed)
    return Stack(**options).eval()


def sample(seed: int = 1, rows: int = 3, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    assert isinstance(output, torch.Tensor)
    return output


def save(model: nn.Module, directory: Path, *, shards: int = 1) -> Path:
    """A checkpoint of safetensors files, with an index where there are several."""
    import json

    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: state[key] for key in list(state)[number::shards]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def stream_of(model: nn.Module) -> WeightStream:
    """The stream behind a model's hooks."""
    for module in model.modules():
        for hook in align_hooks(module):
            if hook.state.stream is not None:
                return hook.state.stream
    raise AssertionError("no weight of this model is streamed")


def drop_from_memory(stream: WeightStream) -> None:
    """Make the next forward read from disk: nothing of the files stays in the page cache."""
    from endor.loaders import drop_from_page_cache

    stream.close()
    files = {stored.file for group in stream.groups for stored in group.tensors.values()}
    for path in files:
        drop_from_page_cache(path)


def locations(model: nn.Module) -> dict[str, Any]:
    """Where each parameter is now."""
    return {name: parameter.device.type for name, parameter in model.named_parameters()}

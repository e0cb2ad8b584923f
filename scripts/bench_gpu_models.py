"""The models of `bench_gpu.py`: Llamas with random weights, half of them zero, packed by Endor or dense.

A model has a number of distinct layers that repeat. One is enough for speed: neither a link nor a kernel
knows that it has seen the bytes before, and every copy lies in memory or a file of its own, so that no cache
can help.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_gpu_kernels import pruned

from bench_common import LlamaShape
from endor.formats import CheckpointWriter, header_bytes_bound
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode

__all__ = ["Recipe", "dense_bytes", "dense_on", "packed_bytes", "skeleton", "write_endor", "write_offload"]

BITS_PER_WEIGHT = {"raw": 9.1, "exponent": 6.2, "int8": 5.2, "int4": 3.2}
"""At 50 %, rounded up: to know before it is written how much room a checkpoint takes."""
_BLOCKS_PER_SHARD = 2
_WRITERS = 8
_HOST = torch.device("cpu")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """Which model.

    Attributes:
        shape: of it.
        distinct: layers that differ from each other; the others repeat them.
    """

    shape: LlamaShape
    distinct: int

    def embedding(self, device: torch.device) -> torch.Tensor:
        return _random((self.shape.vocabulary, self.shape.hidden), device, seed=1)

    def head(self, device: torch.device) -> torch.Tensor:
        return _random((self.shape.vocabulary, self.shape.hidden), device, seed=2)

    def norm(self, device: torch.device) -> torch.Tensor:
        return torch.ones(self.shape.hidden, dtype=torch.bfloat16, device=device)

    def layer(self, number: int, device: torch.device) -> Weights:
        """Weights by their names within the layer; those of Linear are pruned."""
        seed = 100 * (number % self.distinct + 1)
        weights = {
            f"{name}.weight": pruned(size, device, seed + i)
            for i, (name, size) in enumerate(linear_sizes(self.shape).items())
        }
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return weights | {name: self.norm(device) for name in norms}


def linear_sizes(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """[out, in] of the Linears of a layer, by their names within it."""
    hidden, wide = shape.hidden, shape.intermediate
    narrow = hidden // shape.heads * shape.key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def _random(size: tuple[int, int], device: torch.device, *, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(size, generator=generator, device=device) * 0.02).bfloat16()


def _layer_weights(shape: LlamaShape) -> int:
    return sum(rows * cols for rows, cols in linear_sizes(shape).values())


def dense_bytes(shape: LlamaShape, layers: int) -> int:
    """Of the bf16 model."""
    return 2 * (layers * _layer_weights(shape) + 2 * shape.vocabulary * shape.hidden)


def packed_bytes(shape: LlamaShape, layers: int, codec: str) -> int:
    """Of its checkpoint, at most: embedding and head count as dense."""
    packed = BITS_PER_WEIGHT[codec] / 8 * layers * _layer_weights(shape)
    return int(packed) + 4 * shape.vocabulary * shape.hidden + (layers + 3) * 65536


def config_of(shape: LlamaShape) -> Any:
    """For transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


# ── packed ──────────────────────────────────────────────────────────────────────────────────────────────────


def write_endor(directory: Path, recipe: Recipe, codec: str, device: torch.device) -> int:
    """Write the model as an Endor checkpoint, encoded on `device`; the bytes of its files."""
    blocks = list(_packed_blocks(recipe, codec, device))
    runs = [blocks[i : i + _BLOCKS_PER_SHARD] for i in range(0, len(blocks), _BLOCKS_PER_SHARD)]
    writer = CheckpointWriter(directory, shards=len(runs))

    def write(number: int) -> None:
        names = [f"{block}.{entry}" for block, entries in runs[number] for entry in entries]
        with writer.shard(number, header_reserve_bytes=header_bytes_bound(names)) as shard:
            for block, entries in runs[number]:
                with shard.block(block):
                    for entry, tensor in entries.items():
                        shard.add(f"{block}.{entry}", tensor)

    with ThreadPoolExecutor(_WRITERS) as pool:  # writing and checksums let go of the interpreter
        list(pool.map(write, range(len(runs))))
    writer.finish()
    config = config_of(recipe.shape).to_dict()
    config["quantization_config"] = {"quant_method": "endor", "format_version": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _packed_blocks(
    recipe: Recipe, codec: str, device: torch.device
) -> Iterator[tuple[str, Mapping[str, PackedTensor | torch.Tensor]]]:
    """Blocks in order, in host memory; repeated layers are the same objects."""
    yield "model.embed_tokens", {"weight": recipe.embedding(device).cpu()}
    distinct = []
    for number in range(recipe.distinct):
        weights = recipe.layer(number, device)
        distinct.append({name: _packed(weight, codec) for name, weight in weights.items()})
    for number in range(recipe.shape.layers):
        yield f"model.layers.{number}", distinct[number % recipe.distinct]
    yield "model.norm", {"weight": recipe.norm(device).cpu()}
    head = recipe.head(device)
    # As the converter does it: a head is coded, but never pruned.
    yield "lm_head", {"weight": head.cpu() if codec == "raw" else _coded(head)}


def _packed(weight: torch.Tensor, codec: str) -> PackedTensor | torch.Tensor:
    if weight.dim() == 1:
        return weight.cpu()
    return encode(weight, values=codec, mask="bitmap", backend="reference").to(_HOST)


def _coded(head: torch.Tensor) -> PackedTensor:
    return encode(head, values="exponent", mask="dense", backend="reference").to(_HOST)


# ── dense ───────────────────────────────────────────────────────────────────────────────────────────────────


def skeleton(shape: LlamaShape) -> Any:
    """The model with parameters on meta and real buffers."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config_of(shape), dtype=torch.bfloat16)
    model.eval()
    return model


def named_weights(recipe: Recipe, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """All of the model's, dense, on `device`; repeated layers are the same tensors."""
    yield "model.embed_tokens.weight", recipe.embedding(device)
    distinct = [recipe.layer(number, device) for number in range(recipe.distinct)]
    for number in range(recipe.shape.layers):
        for name, weight in distinct[number % recipe.distinct].items():
            yield f"model.layers.{number}.{name}", weight
    yield "model.norm.weight", recipe.norm(device)
    yield "lm_head.weight", recipe.head(device)


def dense_on(recipe: Recipe, target: torch.device, *, made_on: torch.device, codec: str = "raw") -> Any:
    """The model with every weight in memory of its own on `target`.

    Args:
        made_on: where the weights are drawn, which decides what they are.
        codec: a lossy one gives the weights that it decodes to.
    """
    model = skeleton(recipe.shape)
    host: dict[int, torch.Tensor] = {}
    weights = list(named_weights(recipe, made_on))  # kept, so that identities stay theirs
    for name, weight in weights:
        if id(weight) not in host:
            host[id(weight)] = _as_decoded(weight, name, codec).to(target)
        _set(model, name, host[id(weight)].clone())
    return model.to(target)


def _as_decoded(weight: torch.Tensor, name: str, codec: str) -> torch.Tensor:
    if codec in {"raw", "exponent"} or weight.dim() == 1 or "layers" not in name:
        return weight
    return decode(encode(weight, values=codec, backend="reference"), backend="reference")


def _set(model: Any, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def write_offload(directory: Path, recipe: Recipe, device: torch.device) -> None:
    """Write the dense weights as accelerate's `disk_offload` writes them."""
    from accelerate.utils import offload_state_dict

    host: dict[int, torch.Tensor] = {}
    weights = list(named_weights(recipe, device))
    state = {name: host.setdefault(id(w), w.cpu()) for name, w in weights}
    offload_state_dict(str(directory), state)

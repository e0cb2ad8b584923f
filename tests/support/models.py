"""Small random models, pruned and written as Endor checkpoints without the converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from endor.formats import CheckpointWriter, header_bytes_bound
from endor.kernels import encode


def tiny_llama(*, dtype: torch.dtype = torch.bfloat16, layers: int = 5, tied: bool = False) -> Any:
    """A random Llama whose block Linears are half zeros."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        dtype=dtype,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name in linear_names(model):
            weight = model.get_parameter(name)
            weight[torch.rand(weight.shape) < 0.5] = 0
    return model


def linear_names(model: Any) -> set[str]:
    """Names of the Linear weights inside the layers."""
    modules = model.model.layers.named_modules()
    return {f"model.layers.{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}


def write_endor_checkpoint(model: Any, directory: Path, *, shards: int = 2) -> Path:
    """Write a Llama as an Endor checkpoint of raw bitmaps."""
    state, packed = model.state_dict(), linear_names(model)
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    tied = model.config.tie_word_embeddings
    blocks = ["model.embed_tokens", *layers, "model.norm", *([] if tied else ["lm_head"])]
    writer = CheckpointWriter(directory, shards=shards)
    per_shard = -(-len(blocks) // shards)
    for number in range(shards):
        with writer.shard(number, header_reserve_bytes=header_bytes_bound(list(state))) as shard:
            for name in blocks[number * per_shard : (number + 1) * per_shard]:
                with shard.block(name):
                    for key in (k for k in state if k.startswith(name + ".")):
                        aliases = ["lm_head.weight"] if tied and key.startswith("model.embed") else []
                        shard.add(key, encode(state[key]) if key in packed else state[key], aliases=aliases)
    writer.finish()
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": {"quant_method": "endor", "format_version": 1},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def dense_reference(model: Any, directory: Path) -> Any:
    """The same weights as transformers loads them, from a plain checkpoint."""
    model.save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

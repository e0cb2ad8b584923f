"""Models of every kind run from disk with the results they have in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from endor.integrations import accelerate as ours
from endor.runtime.filemap import MappedFile

IDS = torch.arange(1, 9)[None]
ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
}
DECODER: dict[str, Any] = {**ATTENTION, "num_key_value_heads": 2, "vocab_size": 512}
EXPERTS: dict[str, Any] = {**DECODER, "moe_intermediate_size": 64, "num_experts": 8, "head_dim": 32}
T5: dict[str, Any] = {
    "d_model": 128,
    "d_ff": 256,
    "d_kv": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 512,
    "decoder_start_token_id": 0,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=128, n_layer=3, n_head=4, vocab_size=512)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**EXPERTS)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**ATTENTION, vocab_size=512)),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**ATTENTION, embedding_size=64, vocab_size=512)),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=128, num_hidden_layers=2, vocab_size=512, state_size=8)
    ),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**ATTENTION, image_size=32, patch_size=8)),
}


def result(name: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        if name == "vit":
            found = model(torch.ones(1, 3, 32, 32)).last_hidden_state
        elif name in {"bert", "albert"}:
            found = model(IDS).logits
        else:
            found = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_model_runs_from_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedFile, "cached_fraction", lambda *_: 0.0)  # always through the ring
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    expected = result(name, model)
    ours.disk_offload(model, tmp_path)
    for _ in range(3):
        assert torch.equal(result(name, model), expected)
    assert ours.offload_stats(model).read_bytes > 0
    assert ours.offload_stats(model).discarded_bytes == 0
    ours.remove_hook_from_submodules(model)
    assert torch.equal(result(name, model), expected)

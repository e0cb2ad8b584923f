"""Families whose layers are not all plain Linear: converted, streamed, and equal to the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import endor
from endor.runtime import runtime_of

SMALL: dict[str, Any] = {"vocab_size": 120, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SMALL)
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    config = transformers.T5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, **SMALL)
    return transformers.T5ForConditionalGeneration(config)


def converted(model: Any, base: Path, dtype: torch.dtype) -> tuple[Path, Any]:
    torch.manual_seed(0)
    model.to(dtype).save_pretrained(base / "dense")
    endor.convert(base / "dense", base / "endor", method="magnitude", sparsity=0.5)
    with endor.open(base / "endor") as checkpoint:
        state = {name: checkpoint.read_dense(name) for name in checkpoint}
    dense = type(model).from_pretrained(base / "dense", dtype=dtype)
    dense.load_state_dict(state, strict=False)
    dense.tie_weights()
    return base / "endor", dense.eval()


def test_gpt2_streams_its_conv1d_weights(tmp_path: Path) -> None:
    directory, dense = converted(gpt2(), tmp_path, torch.bfloat16)
    model = endor.load(directory, host_memory=0, matmul="decode")
    assert runtime_of(model).placement.counts()["disk"] == 2
    ids = torch.tensor([[5, 9, 77, 31]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_t5_keeps_float32_where_transformers_does(tmp_path: Path, dtype: torch.dtype) -> None:
    directory, dense = converted(t5(), tmp_path, torch.float32)
    dense = type(dense).from_pretrained(tmp_path / "dense", dtype=dtype)
    model = endor.load(directory, host_memory=0, dtype=dtype)
    ours = {name: p.dtype for name, p in model.named_parameters()}
    assert ours == {name: p.dtype for name, p in dense.named_parameters()}
    with torch.inference_mode():
        out = model.generate(torch.tensor([[5, 9, 77, 31]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] >= 2

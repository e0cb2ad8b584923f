"""A whole model by the Triton kernels: every codec, both ways to multiply, damage that nobody waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import endor
from endor.errors import FormatError
from endor.kernels.triton_mode import is_interpreted
from endor.loaders import Accelerator, CudaAccelerator
from endor.runtime import runtime_of
from tests.support.accelerators import CheckedAccelerator
from tests.support.models import tiny_llama
from tests.support.triton import DEVICE, MARKS

pytestmark = MARKS
IDS = torch.tensor([[5, 17, 200, 3]])


def accelerator() -> Accelerator:
    return CheckedAccelerator() if is_interpreted() else CudaAccelerator(DEVICE)


def wide_llama() -> Any:
    """Wide enough for products straight from packed weights, and hardly deep."""
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=264,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def converted(base: Path, source: Any = None, **options: Any) -> tuple[Path, Any]:
    """An Endor checkpoint, and the dense model of the same weights."""
    source = tiny_llama(layers=2) if source is None else source
    source.save_pretrained(base / "dense")
    endor.convert(base / "dense", base / "endor", method="magnitude", sparsity=0.5, **options)
    with endor.open(base / "endor") as checkpoint:
        source.load_state_dict({name: checkpoint.read_dense(name) for name in checkpoint}, strict=False)
    return base / "endor", source.to(DEVICE)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found = model(IDS.to(model.device)).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("values", ["raw", "exponent", "int8", "int4"])
@pytest.mark.parametrize("device_memory", [0, 1 << 20])
def test_decoded_weights_give_the_dense_models_logits(
    tmp_path: Path, values: str, device_memory: int
) -> None:
    directory, dense = converted(tmp_path, values=values)
    model = endor.load(
        directory, device=accelerator(), device_memory=device_memory, host_memory=0, matmul="decode"
    )
    runtime = runtime_of(model)
    assert runtime.kernel == "triton"
    assert torch.equal(logits(model), logits(dense))
    assert runtime.stats().decode_s > 0
    runtime.close()


@pytest.mark.parametrize("values", ["raw", "exponent"])
def test_products_from_packed_weights_round_as_dense_ones(tmp_path: Path, values: str) -> None:
    directory, dense = converted(tmp_path, wide_llama(), values=values)
    model = endor.load(directory, device=accelerator(), device_memory=0, host_memory=0)
    runtime = runtime_of(model)
    assert runtime.kernel == "triton (matmul: triton)"
    torch.testing.assert_close(logits(model).float(), logits(dense).float(), rtol=0.03, atol=0.03)
    if is_interpreted():  # on a GPU decoding first may have been measured to be faster
        assert runtime.stats().decode_s == 0
    runtime.close()


def break_bitmap(directory: Path, name: str) -> None:
    """Flip a bit of a weight's mask, which its row offsets then contradict."""
    with endor.open(directory) as opened:
        home, entry = opened.home(name), opened.entry(name)
        section = next(one for one in entry.sections if one.name == "bitmap")
        file, at = home.file, home.offset + section.begin - home.block.begin
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("matmul", ["auto", "decode"])
@pytest.mark.parametrize("found_by", ["the next forward", "stats", "close", "stats of layers alone"])
def test_damage_that_no_checksum_shows_is_noticed_and_names_the_block(
    tmp_path: Path, matmul: str, found_by: str
) -> None:
    directory, _ = converted(tmp_path, values="raw")
    break_bitmap(directory, "model.layers.1.mlp.up_proj.weight")
    model = endor.load(
        directory, device=accelerator(), device_memory=0, host_memory=0, verify="never", matmul=matmul
    )
    runtime = runtime_of(model)
    if found_by.endswith("alone"):
        with torch.inference_mode():
            model.model(IDS.to(model.device))
    else:
        logits(model)
    ways = {
        "the next forward": lambda: logits(model),
        "stats": runtime.stats,
        "stats of layers alone": runtime.stats,
        "close": runtime.close,
    }
    if found_by == "the next forward" and not is_interpreted():
        torch.cuda.synchronize()
    elif found_by == "the next forward":
        runtime._accelerator.settle()  # type: ignore[union-attr]
    with pytest.raises(FormatError, match=r"model\.layers\.1: row block \d+"):
        ways[found_by]()
    if found_by == "the next forward":
        assert runtime.stats().forwards == 1, "one that was refused is none"
    runtime.close()


def test_after_damage_the_other_blocks_are_not_blamed(tmp_path: Path) -> None:
    directory, _ = converted(tmp_path, values="raw")
    model = endor.load(directory, device=accelerator(), device_memory=0, host_memory=0)
    logits(model)
    runtime_of(model).stats()
    runtime_of(model).close()

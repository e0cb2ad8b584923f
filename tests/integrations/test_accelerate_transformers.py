"""Endor's dispatch where transformers calls accelerate: from_pretrained, generate, save_pretrained."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import accelerate
import accelerate.big_modeling
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from endor.integrations import accelerate as ours
from endor.integrations.accelerate.hooks import AlignDevicesHook
from endor.runtime.filemap import MappedFile
from tests.support.offload import locations, stream_of

PROMPT = torch.arange(1, 9)[None]


def small_llama(*, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    small_llama(tied=request.param).save_pretrained(directory, max_shard_size="600KB")
    return directory


@pytest.fixture(params=["mapped", "ring"], autouse=True)
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways from file to weight: as if the page cache had everything, and as if it had nothing."""
    cached = 1.0 if request.param == "mapped" else 0.0
    monkeypatch.setattr(MappedFile, "cached_fraction", lambda *_: cached)


def tokens(model: Any) -> list[int]:
    found: list[int] = model.generate(PROMPT, max_new_tokens=6, do_sample=False)[0].tolist()
    return found


def test_generation_from_disk_gives_the_models_tokens(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = tokens(model)
    ours.disk_offload(model, tmp_path / "offload")
    assert tokens(model) == expected
    assert set(locations(model).values()) == {"meta"}


def test_mapped_weights_are_not_written_again(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours.disk_offload(model, tmp_path / "offload")
    assert list((tmp_path / "offload").glob("*.safetensors")) == []
    used = {stored.file for group in stream_of(model).groups for stored in group.tensors.values()}
    assert used == set(checkpoint.glob("*.safetensors"))
    weights = accelerate.utils.OffloadedWeightsLoader(save_folder=tmp_path / "offload")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name], AutoModelForCausalLM.from_pretrained(checkpoint).get_parameter(name))


def test_a_weight_changed_after_loading_is_written(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1
    expected = tokens(model)
    ours.disk_offload(model, tmp_path / "offload")
    assert tokens(model) == expected


def test_from_pretrained_dispatches_with_ours_while_installed(checkpoint: Path, tmp_path: Path) -> None:
    expected = tokens(AutoModelForCausalLM.from_pretrained(checkpoint))
    theirs = accelerate.big_modeling.dispatch_model
    user: Any = importlib.import_module("transformers.integrations.accelerate")
    with ours.install():
        assert user.dispatch_model is ours.dispatch_model
        assert accelerate.disk_offload is ours.disk_offload
        model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"": "disk"})
    assert user.dispatch_model is accelerate.dispatch_model is theirs
    assert model.hf_device_map == {"": "disk"}
    assert isinstance(model.model.layers[0].mlp.up_proj._hf_hook, AlignDevicesHook)
    assert tokens(model) == expected
    assert stream_of(model).stats().forwards > 0


def test_installing_twice_is_undone_in_turn() -> None:
    theirs = accelerate.dispatch_model
    first = ours.install()
    second = ours.install()
    second.undo()
    assert accelerate.dispatch_model is ours.dispatch_model
    first.undo()
    first.undo()
    assert accelerate.dispatch_model is theirs


def test_mixed_device_maps_give_the_models_tokens(checkpoint: Path, tmp_path: Path) -> None:
    expected = tokens(AutoModelForCausalLM.from_pretrained(checkpoint))
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    with ours.install():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    assert tokens(model) == expected
    where = locations(model)
    assert where["model.layers.1.mlp.up_proj.weight"] == "cpu"
    assert where["model.layers.2.mlp.up_proj.weight"] == "meta"


def test_a_sharded_checkpoint_is_dispatched_without_a_copy(checkpoint: Path, tmp_path: Path) -> None:
    expected = tokens(AutoModelForCausalLM.from_pretrained(checkpoint))
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    with ours.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config).eval()
    model.tie_weights()
    ours.load_checkpoint_and_dispatch(model, checkpoint, {"": "disk"}, offload_folder=tmp_path / "offload")
    assert tokens(model) == expected
    assert [path.name for path in (tmp_path / "offload").iterdir()] == ["index.json"]


def test_an_offloaded_model_can_be_saved(checkpoint: Path, tmp_path: Path) -> None:
    with ours.install():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"": "disk"})
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    original = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert {name: torch.equal(saved[name], tensor) for name, tensor in original.items()} == dict.fromkeys(
        original, True
    )


@pytest.mark.parametrize("encode", ["auto", "raw"])
def test_encoding_at_dispatch_is_lossless_and_smaller(encode: str, tmp_path: Path) -> None:
    model = small_llama().to(torch.bfloat16)
    with torch.no_grad():  # half of the weights pruned, as the converter leaves them
        for layer in model.model.layers:
            for linear in (layer.mlp.up_proj, layer.mlp.down_proj, layer.mlp.gate_proj):
                linear.weight[torch.rand_like(linear.weight) < 0.5] = 0
    expected = tokens(model)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    ours.disk_offload(model, tmp_path, encode=encode)
    (path,) = tmp_path.glob("*.safetensors")
    assert path.stat().st_size < 0.9 * dense_bytes
    assert tokens(model) == expected
    assert stream_of(model).streamed_bytes < 0.9 * dense_bytes

"""Sources that cannot be converted: each is refused by name, with a next step, and nothing is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import endor
from endor.errors import ConvertError
from tests.support.sources import rewrite, save_as_bin, save_source


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source("llama", tmp_path_factory.mktemp("good") / "source")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source("llama", tmp_path_factory.mktemp("sharded") / "source", shard_size="50KB")


def copy_of(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


def refused(source: Path | str, out: Path, message: str, **options: Any) -> None:
    with pytest.raises(ConvertError, match=message):
        endor.convert(source, out, **{"method": "magnitude", "values": "raw", **options})
    assert not out.exists()


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_header(file: Path, change: Callable[[str], str]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length].decode()).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere: no such directory")


def test_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(
        "somebody/some-model", tmp_path / "out", "as a hub id it cannot be downloaded.*local model directory"
    )


def test_file_instead_of_directory(good: Path, tmp_path: Path) -> None:
    refused(good / "model.safetensors", tmp_path / "out", "is a file; SOURCE must be the directory")


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "not a Hugging Face model directory: it is empty")


def test_directory_without_config(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("hello")
    refused(tmp_path / "other", tmp_path / "out", "it has no config.json")


def test_config_that_is_not_json(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    (source / "config.json").write_text("{oops")
    refused(source, tmp_path / "out", "config.json is not valid JSON")


def test_endor_checkpoint_as_source(good: Path, tmp_path: Path) -> None:
    endor.convert(good, tmp_path / "endor", method="magnitude", values="raw")
    refused(
        tmp_path / "endor", tmp_path / "out", "is an Endor checkpoint already; convert the original model"
    )


def test_source_that_is_quantized(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(source, tmp_path / "out", "quantized already .*'gptq'.*unquantized model")


def test_config_without_weights(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", "model config without weights: expected model.safetensors")


def test_weights_of_another_kind_are_named(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    refused(source, tmp_path / "out", "it has adapter_model.safetensors, which is not a whole model")


def test_unknown_model_class(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    edit_config(source, architectures=["FrobnicatorForCausalLM"])
    refused(
        source, tmp_path / "out", "unknown model class 'FrobnicatorForCausalLM'; transformers [0-9.]+ has no"
    )


def test_unknown_model_type(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    edit_config(source, model_type="frobnicator")
    refused(source, tmp_path / "out", "cannot read this model's config.*frobnicator")


def test_config_that_no_model_can_be_built_from(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    edit_config(source, num_hidden_layers=-3, hidden_size=-1)
    refused(source, tmp_path / "out", "config")


def test_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    source = copy_of(sharded, tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(
        source, tmp_path / "out", rf"{shard.name}: expected a file of \d+ bytes, found \d+; it is truncated"
    )


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_shard_cut_inside_its_header(good: Path, tmp_path: Path, size: int) -> None:
    source = copy_of(good, tmp_path / "source")
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    refused(source, tmp_path / "out", "not a safetensors file|truncated")


def test_trailing_bytes(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"extra")
    refused(source, tmp_path / "out", "it is damaged")


def test_flipped_bits_in_the_header(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    shard = source / "model.safetensors"
    data = bytearray(shard.read_bytes())
    refusals = 0
    for position in range(8, 1000, 7):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        shard.write_bytes(changed)
        try:
            endor.convert(source, tmp_path / "out", method="none", values="raw", overwrite=True)
        except ConvertError:
            refusals += 1
    assert refusals > 100, "nearly every flip breaks a name, a dtype, a shape or an offset"


def test_duplicate_names_in_a_header(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    name = '"model.norm.weight"'
    other = '"model.layers.0.input_layernorm.weight"'
    edit_header(source / "model.safetensors", lambda text: text.replace(other, name))
    refused(source, tmp_path / "out", "duplicate name 'model.norm.weight'")


def test_overlapping_tensors(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")

    def overlap(text: str) -> str:
        table = json.loads(text)
        names = [name for name in table if name.endswith("layernorm.weight")]
        table[names[0]]["data_offsets"] = table[names[1]]["data_offsets"]
        return json.dumps(table)

    edit_header(source / "model.safetensors", overlap)
    refused(source, tmp_path / "out", "overlaps another, leaves a hole or has a wrong size")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F4"}, "unknown dtype 'F4'"),
        ({"shape": [-1, 64]}, "lists of non-negative integers"),
        ({"shape": [2**61, 2**61]}, "overlaps another, leaves a hole or has a wrong size"),
        ({"data_offsets": [0]}, "must be two integers"),
        ({"shape": None}, "must be lists"),
    ],
    ids=str,
)
def test_header_rows_that_lie(good: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = copy_of(good, tmp_path / "source")

    def lie(text: str) -> str:
        table = json.loads(text)
        table["model.norm.weight"] |= change
        return json.dumps(table)

    edit_header(source / "model.safetensors", lie)
    refused(source, tmp_path / "out", message)


def test_index_naming_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    source = copy_of(sharded, tmp_path / "source")
    shard = sorted(source.glob("*.safetensors"))[2]
    shard.unlink()
    refused(source, tmp_path / "out", rf"{shard.name} is missing, but .*index.json says that it has tensor")


def test_index_naming_a_tensor_that_its_shard_lacks(sharded: Path, tmp_path: Path) -> None:
    source = copy_of(sharded, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = min(source.glob("*.safetensors")).name
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "out", "does not have tensor 'model.extra.weight', which the index says")


def test_index_with_a_path_outside_the_directory(sharded: Path, tmp_path: Path) -> None:
    source = copy_of(sharded, tmp_path / "source")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "out", "which is not a file name")


def test_index_without_weight_map(sharded: Path, tmp_path: Path) -> None:
    source = copy_of(sharded, tmp_path / "source")
    (source / "model.safetensors.index.json").write_text("{}")
    refused(source, tmp_path / "out", "expected a weight_map")


def test_tensor_missing_from_the_weights(good: Path, tmp_path: Path) -> None:
    def drop(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
        return state

    source = rewrite(good, drop, tmp_path / "source")
    refused(source, tmp_path / "out", r"lacks 2 tensors that LlamaForCausalLM needs: .*model\.norm\.weight")


def test_tensor_of_another_shape_than_the_config_says(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    edit_config(source, intermediate_size=128)
    refused(source, tmp_path / "out", r"has shape \[64, 96\], but config.json makes .* \[64, 128\]")


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    tied = save_source("llama-tied", tmp_path / "tied")

    def untie(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}

    source = rewrite(tied, untie, tmp_path / "source")
    refused(source, tmp_path / "out", "ties 'lm_head.weight' to .* but the source has both and they differ")


def test_tied_weights_that_are_stored_twice_are_stored_once(tmp_path: Path) -> None:
    tied = save_source("llama-tied", tmp_path / "tied")
    source = rewrite(
        tied, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()}, tmp_path / "source"
    )
    assert endor.convert(source, tmp_path / "out", method="magnitude", values="raw").tensors == 29


def test_tied_weights_that_are_stored_under_the_other_name(tmp_path: Path) -> None:
    tied = save_source("llama-tied", tmp_path / "tied")

    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("model.embed_tokens", "lm_head"): t for name, t in state.items()}

    source = rewrite(tied, rename, tmp_path / "source")
    assert endor.convert(source, tmp_path / "out", method="magnitude", values="raw").tensors == 29


def test_tensors_the_model_has_no_use_for_are_left_out_with_a_warning(good: Path, tmp_path: Path) -> None:
    source = rewrite(good, lambda s: s | {"model.extra.weight": torch.ones(3)}, tmp_path / "source")
    with pytest.warns(
        UserWarning, match=r"1 tensors of the source are not part of LlamaForCausalLM.*model\.extra"
    ):
        endor.convert(source, tmp_path / "out", method="magnitude", values="raw")


def test_base_model_prefix_and_old_names_are_understood(tmp_path: Path) -> None:
    """A BertForMaskedLM checkpoint as of 2019: gamma and beta, position_ids stored."""
    plain = save_source("bert-masked", tmp_path / "plain")

    def age(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in state.items()
        }
        return old | {"bert.embeddings.position_ids": torch.arange(66)[None]}

    source = rewrite(plain, age, tmp_path / "source")
    endor.convert(source, tmp_path / "out", method="magnitude", values="raw")
    endor.convert(plain, tmp_path / "expected", method="magnitude", values="raw")
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "expected" / shard).read_bytes()


def test_checkpoint_of_a_base_model_without_prefix(good: Path, tmp_path: Path) -> None:
    def strip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    source = rewrite(good, strip, tmp_path / "source")
    assert endor.convert(source, tmp_path / "out", method="magnitude", values="raw").tensors == 30


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 100, b"PK\x03\x04" + b"x" * 100], ids=["empty", "garbage", "zip"]
)
def test_bin_file_that_torch_cannot_load(good: Path, tmp_path: Path, content: bytes) -> None:
    source = copy_of(good, tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    refused(
        source, tmp_path / "out", "pytorch_model.bin: not a file of weights that torch can load, or truncated"
    )


def test_truncated_bin_file(tmp_path: Path) -> None:
    source = save_as_bin("llama", tmp_path / "source")
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(source, tmp_path / "out", "or truncated")


def test_bin_file_with_code_is_not_executed(good: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    source = copy_of(good, tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, source / "pytorch_model.bin")
    refused(source, tmp_path / "out", "not a file of weights")
    assert not (tmp_path / "executed").exists()


def test_bin_file_that_holds_something_else(good: Path, tmp_path: Path) -> None:
    source = copy_of(good, tmp_path / "source")
    (source / "model.safetensors").unlink()
    torch.save([torch.ones(3)], source / "pytorch_model.bin")
    refused(source, tmp_path / "out", "expected a dictionary of tensors, found list")


def test_file_that_shrinks_while_it_is_read(good: Path, tmp_path: Path) -> None:
    from endor.convert.weight_files import SafetensorsFile

    source = copy_of(good, tmp_path / "source")
    file = source / "model.safetensors"
    with SafetensorsFile(file) as opened:
        last = max(opened.tensors, key=lambda name: opened._offsets[name])
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(ConvertError, match=r"the file ends at byte .* inside tensor .* it was truncated"):
            opened.read(last)


def test_nan_in_weights_is_kept(good: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def poison(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state[name][0, :3] = float("nan")
        return state

    source = rewrite(good, poison, tmp_path / "source")
    endor.convert(source, tmp_path / "out", method="magnitude", values="raw")
    with endor.open(tmp_path / "out") as checkpoint:
        assert checkpoint.read_dense(name)[0, :3].isnan().all()
    with pytest.raises(ConvertError, match=r"overflow or are not numbers.*--method magnitude"):
        endor.convert(source, tmp_path / "wanda", method="wanda", samples=2, values="raw")


def test_safetensors_shards_saved_by_the_library_are_read_bit_for_bit(good: Path, tmp_path: Path) -> None:
    from endor.convert.weight_files import SafetensorsFile

    tensors = {
        "a": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as opened:
        for name, tensor in expected.items():
            read = opened.read(name)
            assert read.shape == tensor.shape
            assert read.dtype == tensor.dtype
            assert read.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))

"""from_pretrained on an Endor checkpoint computes what the dense model does, and never makes up a weight."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import endor
from endor.errors import ChecksumError, EndorError, FormatError, LoadError, PlanError
from endor.formats import CODECS, CheckpointWriter, Codec, PackedTensor, TensorLayout, header_bytes_bound
from endor.formats.codecs import SectionSpec, ValuesContext
from endor.integrations.transformers import EndorConfig, EndorQuantizer
from endor.kernels import encode, matmul
from endor.kernels.tensor import BitmapTensor
from tests.support.bits import assert_bitwise_equal
from tests.support.models import dense_reference, linear_names, tiny_llama, write_endor_checkpoint
from tests.support.sources import VOCABULARY, save_source

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model as an Endor checkpoint, which asks for products with the bits of dense ones, and as a plain
    one."""
    base = tmp_path_factory.mktemp("quantizer")
    model = tiny_llama()
    dense_reference(model, base / "dense")
    return with_matmul(write_endor_checkpoint(model, base / "endor"), "decode"), base / "dense"


@pytest.fixture
def checkpoint(models: tuple[Path, Path]) -> Path:
    return models[0]


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What transformers logs, warnings and worse."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    ours = logging.getLogger("endor")
    for each in (logger, ours):
        each.addHandler(handler)
    yield lines
    for each in (logger, ours):
        each.removeHandler(handler)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result = model(ids).logits
    assert isinstance(result, torch.Tensor)
    return result


def generate(model: Any) -> list[int]:
    with torch.inference_mode():
        out = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return [int(token) for token in out[0]]


def assert_same_model(actual: Any, expected: Any) -> None:
    assert_bitwise_equal(logits(actual), logits(expected))
    assert generate(actual) == generate(expected)


def with_matmul(directory: Path, matmul: str | None) -> Path:
    """The same checkpoint, whose config says how to multiply."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].pop("matmul", None)
    config["quantization_config"] |= {} if matmul is None else {"matmul": matmul}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_model(model: Any, directory: Path, *, packed: Mapping[str, PackedTensor]) -> Path:
    """Any model as one block of one shard, with these weights packed."""
    ties = dict(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ties}
    writer = CheckpointWriter(directory, shards=1)
    with (
        writer.shard(0, header_reserve_bytes=header_bytes_bound([*state, *ties])) as shard,
        shard.block("all"),
    ):
        for name, tensor in state.items():
            shard.add(name, packed.get(name, tensor), aliases=[t for t, s in ties.items() if s == name])
    writer.finish()
    quantization = {"quant_method": "endor", "format_version": 1, "method": "test", "matmul": "decode"}
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": quantization,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize(
    "dtype", ["auto", torch.float32, torch.float16], ids=["stored", "float32", "float16"]
)
def test_logits_and_tokens_equal_the_dense_models_bit_for_bit(
    models: tuple[Path, Path], dtype: Any, device_map: str | None
) -> None:
    packed, plain = models
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype, device_map=device_map)
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(plain, dtype=dtype))


def test_logits_and_tokens_equal_those_of_endor_load(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert_same_model(model, endor.load(checkpoint, matmul="decode"))


def test_products_are_straight_from_packed_weights_unless_told_otherwise(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plain = models
    shutil.copytree(checkpoint, tmp_path / "copy")
    with_matmul(tmp_path / "copy", None)
    taken: list[torch.Tensor | None] = []
    straight = matmul.linear

    def noted(*arguments: Any, **options: Any) -> torch.Tensor | None:
        taken.append(straight(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(matmul, "linear", noted)
    dense = logits(AutoModelForCausalLM.from_pretrained(plain))
    assert taken == []
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"))
    assert len(taken) == 35  # the weights of five layers; the head is plain
    torch.testing.assert_close(found, dense)
    taken.clear()
    with pytest.warns(UserWarning, match="matmul"):  # transformers says that the config overrides
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "copy", quantization_config=EndorConfig(matmul="decode")
        )
    assert_bitwise_equal(logits(model), dense)
    assert taken == []


def test_an_unknown_matmul_is_refused(checkpoint: Path) -> None:
    quick = EndorConfig(matmul="quick")
    with (
        pytest.warns(UserWarning, match="matmul"),
        pytest.raises(PlanError, match="matmul must be one of auto, decode, found 'quick'"),
    ):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quick)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_any_number_of_shards_loads_and_ties_stay_ties(tied: bool, shards: int, tmp_path: Path) -> None:
    original = tiny_llama(layers=2, tied=tied)
    packed = write_endor_checkpoint(original, tmp_path / "endor", shards=shards)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert_same_model(model, dense_reference(original, tmp_path / "dense"))


def test_linear_weights_stay_packed_in_unchanged_modules(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    packed = {name for name, tensor in model.named_parameters() if isinstance(tensor, BitmapTensor)}
    assert packed == linear_names(model)
    assert all(type(model.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear for name in packed)
    assert not any(model.get_parameter(name).requires_grad for name in packed)


def test_nothing_is_missing_unexpected_or_logged(checkpoint: Path, log: list[str]) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    _, info = loaded
    assert not any(info.values())
    assert log == []


def test_float32_weights_that_a_model_insists_on_are_decoded_to_float32(tmp_path: Path) -> None:
    """T5 keeps `wo` in float32 when everything else is float16."""
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, vocab_size=40)
    torch.manual_seed(0)
    original = transformers.T5ForConditionalGeneration(config).eval()
    names = [n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    packed = {f"{name}.weight": encode(original.get_parameter(f"{name}.weight")) for name in names}
    directory = write_model(original, tmp_path / "endor", packed=packed)
    original.save_pretrained(tmp_path / "dense")
    inputs = {"input_ids": IDS % 40, "decoder_input_ids": IDS % 40}
    results = []
    for source in (directory, tmp_path / "dense"):
        model = transformers.T5ForConditionalGeneration.from_pretrained(source, dtype=torch.float16)
        kept = model.get_parameter("encoder.block.0.layer.1.DenseReluDense.wo.weight")
        assert kept.dtype == torch.float32
        with torch.inference_mode():
            results.append(model(**inputs).logits)
    assert_bitwise_equal(*results)


def test_conv1d_weights_stay_packed_as_those_of_linear_do(tmp_path: Path) -> None:
    endor.convert(save_source("gpt2", tmp_path / "source"), tmp_path / "out", method="magnitude")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.transformer.h[0].mlp.c_fc.weight, BitmapTensor)
    assert_bitwise_equal(logits(model, IDS % VOCABULARY), logits(model.dequantize(), IDS % VOCABULARY))


def test_a_packed_weight_that_is_tied_is_decoded_once(tmp_path: Path) -> None:
    original = tiny_llama(layers=1, tied=True)
    embedding = "model.embed_tokens.weight"
    packed = {embedding: encode(original.get_parameter(embedding))}
    model = AutoModelForCausalLM.from_pretrained(write_model(original, tmp_path / "endor", packed=packed))
    assert type(model.get_parameter(embedding)) is torch.nn.Parameter
    assert model.lm_head.weight is model.get_parameter(embedding)
    assert_same_model(model, original)


def test_a_module_called_like_a_section_keeps_its_name(checkpoint: Path) -> None:
    quantizer = EndorQuantizer(EndorConfig())
    with endor.open(checkpoint) as opened:
        entry = opened.entry("model.layers.0.mlp.up_proj.weight")
    quantizer._packed = {"attention.values.weight": entry}
    (converter,) = quantizer.get_weight_conversions()
    renamed, pattern = converter.rename_source_key("attention.values.weight.values")
    assert (renamed, pattern) == ("attention.values.weight", r"^(.+)\.values$")
    assert converter.rename_source_key("attention.values.weight") == ("attention.values.weight", None)


class _Halves(Codec):
    """A codec of tomorrow: other sections than today's."""

    name = "halves"
    lossless = True

    def supports(self, dtype: torch.dtype, mask: str) -> bool:
        return dtype.itemsize == 2

    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        return tuple(SectionSpec(name, torch.uint8, (values.nnz,)) for name in ("low", "high"))


def test_sections_are_whatever_the_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "halves", _Halves())
    original = tiny_llama(layers=1)
    packed = {}
    for number, name in enumerate(sorted(linear_names(original))):
        raw = packed[name] = encode(original.get_parameter(name))
        if number % 2:
            low, high = raw.sections["values"].view(torch.uint8).view(-1, 2).T.contiguous()
            layout = TensorLayout(raw.layout.shape, raw.layout.dtype, "bitmap", "halves", raw.layout.nnz)
            kept = {key: raw.sections[key] for key in ("bitmap", "row_offsets")}
            packed[name] = PackedTensor(layout, {**kept, "low": low, "high": high})
    model = AutoModelForCausalLM.from_pretrained(write_model(original, tmp_path / "endor", packed=packed))
    for name, expected in packed.items():
        weight = model.get_parameter(name)
        assert isinstance(weight, BitmapTensor)
        assert weight.packed.layout == expected.layout
        for key, section in expected.sections.items():
            assert_bitwise_equal(weight.packed.sections[key], section)


# What another class or another use of the model does.


def test_base_model_loads_without_the_head(models: tuple[Path, Path], log: list[str]) -> None:
    results = [AutoModel.from_pretrained(path)(IDS).last_hidden_state for path in models]
    assert_bitwise_equal(*results)


def test_a_new_head_is_initialised_and_reported_as_always(checkpoint: Path, log: list[str]) -> None:
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert loaded[1]["missing_keys"] == {"score.weight"}


def test_loaded_model_can_be_copied_and_pickled(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(other.model.layers[0].mlp.up_proj.weight, BitmapTensor)
        assert_bitwise_equal(logits(other), logits(model))


def test_threads_that_share_a_model_do_not_overwrite_each_other(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = logits(model)
    wrong: list[int] = []
    begin = threading.Barrier(4)

    def run(number: int) -> None:
        begin.wait(60)
        if not all(torch.equal(logits(model), expected) for _ in range(15)):
            wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_of_inputs_are_those_of_the_dense_model(models: tuple[Path, Path]) -> None:
    gradients = []
    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        embedded = model.model.embed_tokens(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
        assert embedded.grad is not None
        gradients.append(embedded.grad)
    assert_bitwise_equal(*gradients)


# Dense on request, and saving.


def load_dense(checkpoint: Path) -> Any:
    with pytest.warns(UserWarning, match="loading attributes"):
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=EndorConfig(dequantize=True)
        )


def test_dequantize_gives_a_dense_model_that_saves_as_a_plain_checkpoint(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    packed, plain = models
    model, expected = load_dense(packed), AutoModelForCausalLM.from_pretrained(plain)
    assert not any(isinstance(parameter, BitmapTensor) for parameter in model.parameters())
    assert_same_model(model, expected)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), expected)


def test_model_dequantize_decodes_in_place(models: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = models
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.dequantize()
    assert not any(isinstance(parameter, BitmapTensor) for parameter in model.parameters())
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(plain))
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_save_pretrained_of_a_packed_model_is_refused_with_the_way_out(
    checkpoint: Path, tmp_path: Path, log: list[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert "EndorConfig(dequantize=True)" in "".join(log)
    assert not (tmp_path / "saved").exists()


def test_what_config_json_says_of_the_conversion_is_kept(tmp_path: Path) -> None:
    directory = write_model(tiny_llama(layers=1), tmp_path, packed={})
    config = AutoModelForCausalLM.from_pretrained(directory).config.quantization_config
    expected = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config.to_dict() == {**expected, "dequantize": False}


# Refused by name.


def section_of(checkpoint: Path, name: str) -> tuple[Path, int]:
    """File and first byte of the last section of an entry."""
    with endor.open(checkpoint) as opened:
        for home in opened.blocks:
            for entry in home.block.entries:
                if entry.name == name:
                    return home.file, home.offset + entry.sections[-1].begin - home.block.begin
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"], ids=["packed", "plain"]
)
def test_damaged_section_is_refused_by_name(name: str, damaged: Path) -> None:
    file, offset = section_of(damaged, name)
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))
    with pytest.raises(ChecksumError, match=name):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_truncated_shard_is_refused(damaged: Path) -> None:
    shard = min(damaged.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 4096)
    with pytest.raises(EndorError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(damaged)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weight_that_the_checkpoint_lacks_is_refused_by_name(damaged: Path) -> None:
    edit_config(damaged, num_hidden_layers=6)
    with pytest.raises(FormatError, match=r"has no model\.layers\.5\."):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_untying_does_not_make_up_a_head(tmp_path: Path) -> None:
    directory = write_endor_checkpoint(tiny_llama(layers=1, tied=True), tmp_path)
    with pytest.raises(FormatError, match=r"has no lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(directory, tie_word_embeddings=False)


def test_weight_of_another_shape_is_refused_by_name(damaged: Path) -> None:
    edit_config(damaged, intermediate_size=100)
    with pytest.raises(FormatError, match=r"mlp\.\w+_proj\.weight.*config\.json does not belong"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_weight_that_transformers_leaves_out_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """A later transformers may match names otherwise: better no model than one with made-up weights."""
    monkeypatch.setattr(EndorQuantizer, "get_weight_conversions", lambda _: [])
    with pytest.raises(LoadError, match=r"use endor\.load"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_dense_checkpoint_is_refused_with_the_command_that_converts(models: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError, match="convert-model"):
        AutoModelForCausalLM.from_pretrained(models[1], quantization_config=EndorConfig())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device_map": {"": "disk"}}, id="asked-for"),
        pytest.param({"device_map": "auto", "max_memory": {"cpu": 100_000}}, id="too-little-memory"),
    ],
)
def test_offloading_to_disk_is_left_to_endor_load(options: Any, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"endor\.load"):
        AutoModelForCausalLM.from_pretrained(checkpoint, offload_folder=str(tmp_path), **options)


def test_auto_device_map_plans_with_packed_sizes(checkpoint: Path) -> None:
    """The budget holds the packed model and not the dense one."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    dense = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    packed = sum(p.nbytes for p in model.parameters())
    largest = max(sum(p.numel() * 2 for p in layer.parameters()) for layer in model.model.layers)
    budget = packed + largest + 1000
    assert budget < dense
    fitting = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto", max_memory={"cpu": budget})
    assert_bitwise_equal(logits(fitting), logits(model))


def test_a_state_dict_without_files_is_refused(checkpoint: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    with pytest.raises(LoadError, match="from_pretrained"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})

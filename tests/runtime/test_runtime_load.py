"""A loaded model computes what the dense one does, wherever its blocks are, and cleans up after itself."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import ChecksumError, FormatError, KernelError, LoadError, PlanError
from endor.kernels.tensor import BitmapTensor
from endor.runtime import runtime_of
from tests.support.models import dense_reference, tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    base = tmp_path_factory.mktemp("runtime")
    model = tiny_llama()
    return write_endor_checkpoint(model, base / "endor"), dense_reference(model, base / "dense")


@pytest.fixture
def checkpoint(models: tuple[Path, Any]) -> Path:
    return models[0]


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(directory: Path, **options: Any) -> Any:
    """A model whose products have the bits of the dense ones."""
    return endor.load(directory, **{"matmul": "decode", **options})


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result = model(IDS).logits
    assert isinstance(result, torch.Tensor)
    return result


def generate(model: Any, n: int = 8) -> list[int]:
    with torch.inference_mode():
        out = model.generate(IDS, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return [int(token) for token in out[0]]


def shard_with(checkpoint: Path, name: str) -> tuple[Path, int, int]:
    """File, first byte and size of the values of an entry."""
    with endor.open(checkpoint) as opened:
        for home in opened.blocks:
            for entry in home.block.entries:
                if entry.name == name:
                    section = entry.sections[-1]
                    return home.file, home.offset + section.begin - home.block.begin, section.nbytes
    raise AssertionError(name)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("host_memory", [0, 45_000, None], ids=["disk", "mixed", "host"])
def test_logits_and_tokens_equal_the_dense_models_bit_for_bit(
    models: tuple[Path, Any], host_memory: int | None, depth: int
) -> None:
    directory, dense = models
    model = load(directory, host_memory=host_memory, depth=depth)
    assert torch.equal(logits(model), logits(dense))
    assert generate(model) == generate(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_compute_dtype_equals_the_dense_model_in_it(
    models: tuple[Path, Any], dtype: torch.dtype
) -> None:
    directory, dense = models
    model = load(directory, host_memory=0, dtype=dtype)
    assert torch.equal(logits(model), logits(type(dense).from_pretrained(dense.name_or_path, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_checkpoints_of_other_dtypes_run(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny_llama(dtype=dtype, layers=2)
    directory = write_endor_checkpoint(source, tmp_path / "endor", shards=1)
    model = load(directory, host_memory=0)
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(dense_reference(source, tmp_path / "dense")))


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    source = tiny_llama(layers=1, tied=True)
    model = load(write_endor_checkpoint(source, tmp_path / "endor"), host_memory=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(dense_reference(source, tmp_path / "dense")))


def test_one_streamed_block_works(tmp_path: Path) -> None:
    source = tiny_llama(layers=1, tied=True)
    directory = write_endor_checkpoint(source, tmp_path / "endor", shards=1)
    assert generate(load(directory, host_memory=0, depth=2)) == generate(source)


def test_every_token_reads_every_streamed_byte_once(checkpoint: Path) -> None:
    model = load(checkpoint, host_memory=0)
    runtime = runtime_of(model)
    generate(model, 4)
    per_forward = runtime.per_forward()
    row_bytes = model.model.embed_tokens.weight.shape[1] * 2
    rows = [len(set(IDS[0].tolist())), 1, 1, 1]
    expected = [runtime.streamed_bytes + count * row_bytes for count in rows]
    assert [stats.disk_bytes for stats in per_forward] == expected
    assert all(stats.host_bytes == 0 for stats in per_forward)
    total = model.endor_stats()
    assert total.forwards == 4
    assert total.wall_s == pytest.approx(total.decode_s + total.compute_s + total.stall_s)


def test_resident_blocks_are_used_and_not_read_again(checkpoint: Path) -> None:
    model = load(checkpoint, host_memory=None)
    generate(model, 3)
    stats = model.endor_stats()
    assert stats.disk_bytes == 0
    assert stats.host_bytes == 3 * sum(b.home.nbytes for b in runtime_of(model)._blocks)


def test_a_streamed_weight_outside_its_block_says_so(checkpoint: Path) -> None:
    model = load(checkpoint, host_memory=0)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, BitmapTensor)
    with pytest.raises(KernelError, match=r"streamed weight .* host_memory"):
        torch.add(weight, 1)


def test_layers_may_be_called_out_of_order(models: tuple[Path, Any]) -> None:
    directory, dense = models
    model = load(directory, host_memory=0, depth=2)
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    for index in (3, 0, 0, 4, 1):
        ours, theirs = model.model.layers[index].mlp, dense.model.layers[index].mlp
        with torch.inference_mode(), pytest.raises(KernelError):
            ours(x)  # a part of a block is not the block
        position = model.model.rotary_emb(x, torch.arange(3)[None])
        with torch.inference_mode():
            a = model.model.layers[index](x, position_embeddings=position)
            b = dense.model.layers[index](x, position_embeddings=position)
        assert torch.equal(a, b), theirs
    assert torch.equal(logits(model), logits(dense))


def test_close_leaves_no_thread_descriptor_hook_or_attribute(checkpoint: Path) -> None:
    gc.collect()
    threads, fds = threading.active_count(), open_files()
    model = load(checkpoint, host_memory=45_000)
    generate(model, 2)
    runtime_of(model).close()
    runtime_attributes = [n for m in model.modules() for n in vars(m) if "endor" in n]
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert (runtime_attributes, hooks) == ([], [])
    assert threading.active_count() == threads
    assert open_files() == fds
    with pytest.raises(PlanError, match=r"not loaded by endor\.load, or its runtime is closed"):
        runtime_of(model)


def test_a_collected_model_ends_its_threads(checkpoint: Path) -> None:
    gc.collect()
    threads, fds = threading.active_count(), open_files()
    model = load(checkpoint, host_memory=0)
    generate(model, 2)
    del model
    gc.collect()
    assert threading.active_count() == threads
    assert open_files() == fds


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_layer_leaves_a_usable_model(
    models: tuple[Path, Any], error: type[BaseException]
) -> None:
    directory, dense = models
    model = load(directory, host_memory=0, depth=1)

    def fail(*_: object) -> None:
        raise error("in a layer")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), logits(dense))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime_of(model).close()


def test_a_flipped_bit_in_a_streamed_block_is_refused_by_name(damaged: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    file, offset, _ = shard_with(damaged, name)
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    model = load(damaged, host_memory=0)
    with pytest.raises(ChecksumError, match=name):
        logits(model)
    with pytest.raises(ChecksumError, match=name):
        load(damaged, host_memory=None)


def test_a_flipped_bit_in_a_dense_tensor_is_refused_by_name(damaged: Path) -> None:
    file, offset, _ = shard_with(damaged, "model.norm.weight")
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"model\.norm\.weight"):
        load(damaged, host_memory=0)


def test_a_shard_truncated_while_running_is_an_error_not_a_crash(damaged: Path) -> None:
    model = load(damaged, host_memory=0, depth=0)
    logits(model)
    file, offset, _ = shard_with(damaged, "model.layers.4.mlp.down_proj.weight")
    with file.open("r+b") as opened:
        opened.truncate(offset)
    with pytest.raises(LoadError, match=file.name):
        logits(model)


def test_a_missing_tensor_is_named(damaged: Path) -> None:
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace('"num_hidden_layers": 5', '"num_hidden_layers": 6'))
    with pytest.raises(FormatError, match=r"no model\.layers\.5\.\S+.*which the model needs"):
        load(damaged)


def test_a_tensor_the_model_lacks_is_named(damaged: Path) -> None:
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace('"num_hidden_layers": 5', '"num_hidden_layers": 4'))
    with pytest.raises(FormatError, match=r"model\.layers\.4\."):
        load(damaged)


def test_a_tensor_of_another_shape_is_named(damaged: Path) -> None:
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(
        config.replace('"intermediate_size": 104', '"intermediate_size": 96')
    )
    with pytest.raises(FormatError, match=r"gate_proj.weight: the model expects shape \[96, 64\]"):
        load(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"LlamaForCausalLM"', '"LamaForCausalLM"'), "unknown model class 'LamaForCausalLM'"),
        (('"model_type": "llama"', '"model_type": "lama"'), "cannot read this model's config"),
    ],
    ids=["class", "type"],
)
def test_an_unknown_model_is_refused(damaged: Path, change: tuple[str, str], message: str) -> None:
    config = (damaged / "config.json").read_text()
    assert change[0] in config
    (damaged / "config.json").write_text(config.replace(*change))
    with pytest.raises(LoadError, match=message):
        load(damaged)


def test_a_budget_below_one_block_says_how_much_is_needed(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match=r"budget of 100 bytes holds no block.*needs \d+ bytes"):
        load(checkpoint, host_memory=100)


@pytest.mark.parametrize("option", [{"device": "tpu"}, {"reader": "fax"}, {"depth": -1}], ids=str)
def test_unknown_options_are_refused(checkpoint: Path, option: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        load(checkpoint, **option)


def test_a_config_without_dtype_means_the_stored_one(damaged: Path) -> None:
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace('"dtype": "bfloat16", ', ""))
    assert '"dtype"' not in (damaged / "config.json").read_text()
    assert load(damaged, host_memory=0).dtype == torch.bfloat16


def test_a_config_without_architectures_means_the_language_model(damaged: Path) -> None:
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace('["LlamaForCausalLM"]', "[]"))
    assert type(load(damaged, host_memory=0)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("host_memory", [0, None], ids=["disk", "host"])
def test_threads_that_share_a_model_take_turns(models: tuple[Path, Any], host_memory: int | None) -> None:
    directory, dense = models
    model = load(directory, host_memory=host_memory, depth=1)
    prompts = [(IDS + shift) % 300 for shift in range(3)]
    with torch.inference_mode():
        expected = [dense(ids).logits for ids in prompts]
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            for _ in range(8):
                with torch.inference_mode():
                    if not torch.equal(model(prompts[index]).logits, expected[index]):
                        wrong.append(index)
        except endor_errors as error:
            wrong.append(error)

    endor_errors = (RuntimeError, ValueError, OSError)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_an_interrupted_thread_that_has_ended_does_not_keep_its_turn(models: tuple[Path, Any]) -> None:
    directory, dense = models
    model = load(directory, host_memory=0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            logits(model)

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    handle.remove()
    assert torch.equal(logits(model), logits(dense))


def test_saving_is_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    before = (checkpoint / "config.json").read_bytes()
    model = load(checkpoint, host_memory=0)
    for target in (checkpoint, tmp_path / "new"):
        with pytest.raises(PlanError, match="cannot be saved"):
            model.save_pretrained(target)
    assert (checkpoint / "config.json").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_copying_and_pickling_are_refused_in_words(checkpoint: Path) -> None:
    model = load(checkpoint, host_memory=0)
    with pytest.raises(PlanError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(PlanError, match="cannot be pickled"):
        pickle.dumps(model)


def test_a_model_that_changes_its_dtype_goes_on(models: tuple[Path, Any]) -> None:
    directory, dense = models
    model = load(directory, host_memory=None).float()
    wide = copy.deepcopy(dense).float()
    assert torch.equal(logits(model), logits(wide))


def test_a_depth_beyond_the_blocks_costs_no_more_memory(checkpoint: Path) -> None:
    rings = [runtime_of(load(checkpoint, host_memory=0, depth=depth)).ring_bytes for depth in (6, 500)]
    assert rings[0] == rings[1]


def test_a_compiled_model_gives_the_same_logits(models: tuple[Path, Any]) -> None:
    directory, dense = models
    model = load(directory, host_memory=0)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), logits(dense))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"host_memory": "8GiB"}, "number of bytes"),
        ({"depth": "2"}, "whole number"),
        ({"dtype": "float7"}, "bfloat16, float16, float32"),
        ({"dtype": torch.int8}, "bfloat16, float16, float32"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused_in_words(
    checkpoint: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        load(checkpoint, **option)


def test_names_of_dtypes_and_devices_are_understood(checkpoint: Path) -> None:
    model = load(checkpoint, host_memory=0, dtype="float32", device=torch.device("cpu"))
    assert model.dtype == torch.float32


def test_a_config_value_of_the_wrong_type_is_refused_in_words(damaged: Path) -> None:
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(
        config.replace('"num_hidden_layers": 5', '"num_hidden_layers": "five"')
    )
    with pytest.raises(LoadError, match="cannot read this model's config"):
        load(damaged)

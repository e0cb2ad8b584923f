"""Every supported architecture: names, blocks, ties and bits come out as the model itself has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.formats import CheckpointReader
from tests.support.sources import FAMILIES, build, dense_weights, save_as_bin, save_source

MERGED = ("mixtral",)
CALIBRATED = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "opt",
    "gpt-neox",
    "gpt2",
    "bert-masked",
    "t5",
)


def convert(source: Path, out: Path, **options: Any) -> endor.ConvertReport:
    return endor.convert(source, out, **{"method": "magnitude", "values": "raw", **options})


def linear_weights(model: Any) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split("."))
    }
    return linears | {name for name, p in model.named_parameters() if p.dim() == 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives_pruned_only_where_it_should_be(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_source(family, tmp_path / "source", shard_size="50KB")
    report = convert(tmp_path / "source", tmp_path / "out", shard_size=40_000)
    stored = dense_weights(tmp_path / "out")
    linears = linear_weights(model)
    state = model.state_dict()
    assert stored.keys() == state.keys()
    for name, weight in state.items():
        kept = stored[name] != 0
        assert torch.equal(stored[name][kept], weight[kept]), name
        if name in linears:
            assert kept.sum() == weight.numel() - weight.numel() // 2, name
        else:
            assert torch.equal(stored[name], weight), name
    assert report.pruned_tensors == len(linears)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_lie_in_execution_order(family: str, tmp_path: Path) -> None:
    model = build(family)
    ran: list[str] = []
    save_source(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    with CheckpointReader(tmp_path / "out") as reader:
        blocks = [home.block.name for home in reader.blocks]
    modules = dict(model.named_modules())
    for name in blocks:
        if name in modules:  # a tensor of the model itself is a block that does not run
            modules[name].register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    ids = torch.ones(1, 4, dtype=torch.long)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    model(**inputs)
    first_runs = list(dict.fromkeys(ran))
    assert first_runs == [name for name in blocks if name in set(ran)]


@pytest.mark.parametrize("family", ["llama-tied", "gemma", "opt", "bert-masked", "t5"])
def test_tied_weights_are_stored_once(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_source(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    with CheckpointReader(tmp_path / "out") as reader:
        assert dict(reader.aliases) == dict(model.all_tied_weights_keys)
        assert not set(reader.aliases) & set(reader.names())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    save_source("llama", tmp_path / "source", dtype=dtype)
    convert(tmp_path / "source", tmp_path / "out")
    assert {weight.dtype for weight in dense_weights(tmp_path / "out").values()} == {dtype}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert-masked"])
def test_bin_files_give_what_safetensors_give(family: str, shards: int, tmp_path: Path) -> None:
    save_as_bin(family, tmp_path / "bin", shards=shards)
    save_source(family, tmp_path / "source")
    convert(tmp_path / "bin", tmp_path / "from-bin")
    convert(tmp_path / "source", tmp_path / "from-safetensors")
    shard = "model-00001-of-00001.safetensors"
    assert (tmp_path / "from-bin" / shard).read_bytes() == (
        tmp_path / "from-safetensors" / shard
    ).read_bytes()


def test_bin_files_of_old_torch_are_read(tmp_path: Path) -> None:
    save_as_bin("llama", tmp_path / "source", legacy=True)
    convert(tmp_path / "source", tmp_path / "out")
    assert dense_weights(tmp_path / "out").keys() == build("llama").state_dict().keys()


@pytest.mark.parametrize("family", CALIBRATED)
def test_wanda_runs_and_prunes_every_row_to_the_count(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_source(family, tmp_path / "source")
    report = endor.convert(
        tmp_path / "source",
        tmp_path / "out",
        method="wanda",
        samples=3,
        sequence_length=24,
        sparsity=0.25,
        values="raw",
    )
    stored = dense_weights(tmp_path / "out")
    linears = linear_weights(model)
    assert report.pruned_tensors == len(linears)
    for name in linears:
        weight = stored[name] if family != "gpt2" else stored[name].t()
        assert ((weight == 0).sum(1) == weight.shape[1] // 4).all(), name


def test_experts_are_pruned_by_magnitude_with_a_warning(tmp_path: Path) -> None:
    save_source("mixtral", tmp_path / "source")
    with pytest.warns(UserWarning, match=r"6 tensors saw no activations and were pruned by magnitude"):
        report = endor.convert(
            tmp_path / "source", tmp_path / "out", method="wanda", samples=2, sequence_length=16, values="raw"
        )
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def test_wanda_chooses_as_the_whole_model_run_at_once_would(tmp_path: Path) -> None:
    """Blocks pruned one after another give what pruning a whole model in memory, block after block, gives."""
    model = build("llama", dtype=torch.float32)
    save_source("llama", tmp_path / "source", dtype=torch.float32)
    endor.convert(
        tmp_path / "source", tmp_path / "out", method="wanda", samples=4, sequence_length=32, values="raw"
    )
    stored = dense_weights(tmp_path / "out")
    prune_in_memory(model, calibration_ids(tmp_path / "source", samples=4, length=32))
    for name, weight in model.state_dict().items():
        assert torch.equal(stored[name], weight), name


def calibration_ids(source: Path, *, samples: int, length: int) -> torch.Tensor:
    import transformers

    from endor.pruning.calibration import read_documents, sample_sequences

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    return sample_sequences(read_documents(None), tokenizer, samples=samples, sequence_length=length, seed=0)


def keep_input(inputs: dict[Any, torch.Tensor]) -> Callable[[Any, Any], None]:
    """A hook that remembers what its module was given, as rows."""

    def hook(module: Any, args: Any) -> None:
        inputs[module] = args[0].flatten(0, 1)

    return hook


@torch.no_grad()
def prune_in_memory(model: Any, ids: torch.Tensor) -> None:
    """Wanda as published: layer by layer, each seeing what the pruned layers before it give."""
    for layer in model.model.layers:
        inputs: dict[Any, torch.Tensor] = {}
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        hooks = [m.register_forward_pre_hook(keep_input(inputs)) for m in linears]
        model(ids)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            score = linear.weight.abs() * inputs[linear].norm(dim=0)
            order = score.argsort(dim=1, stable=True)
            linear.weight.scatter_(1, order[:, : score.shape[1] // 2], 0.0)

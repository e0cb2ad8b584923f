"""Linear weights that are not pruned: losslessly coded, streamed, and the same bits as in the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import endor
from endor.formats import CheckpointReader, TensorEntry
from endor.formats.verify import verify_checkpoint
from endor.integrations.transformers import EndorConfig
from endor.runtime import runtime_of
from tests.support.sources import VOCABULARY, build, dense_weights, save_source

IDS = torch.tensor([[5, 17, 100, 3, 99, 42, 7]])
HEAD = "lm_head.weight"
_LARGER: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2}
"""Wide enough that coding a head saves more than its tables take."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source("llama", tmp_path_factory.mktemp("linears") / "source", **_LARGER)


def convert(source: Path, out: Path, **options: Any) -> dict[str, TensorEntry]:
    """The entries of a checkpoint made with these options."""
    endor.convert(source, out, **{"method": "magnitude", **options})
    with CheckpointReader(out) as reader:
        return dict(reader.entries)


def form(entry: TensorEntry) -> tuple[str, str]:
    return entry.layout.mask, entry.layout.codec


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result = model(IDS).logits
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("values", ["auto", "exponent", "int8", "int4"])
def test_an_untied_head_is_coded_losslessly_whatever_the_pruned_weights_are(
    source: Path, tmp_path: Path, values: str
) -> None:
    entries = convert(source, tmp_path / "out", values=values)
    assert form(entries[HEAD]) == ("dense", "exponent")
    assert entries[HEAD].layout.bits_per_weight < 12
    assert form(entries["model.embed_tokens.weight"]) == ("dense", "raw")
    head = build("llama", **_LARGER).lm_head.weight
    assert torch.equal(dense_weights(tmp_path / "out")[HEAD].view(torch.int16), head.view(torch.int16))


def test_raw_values_leave_the_head_as_it_is(source: Path, tmp_path: Path) -> None:
    assert form(convert(source, tmp_path / "out", values="raw")[HEAD]) == ("dense", "raw")


def test_a_head_tied_to_the_embedding_is_left_as_it_is(tmp_path: Path) -> None:
    source = save_source("llama-tied", tmp_path / "source", **_LARGER)
    assert form(convert(source, tmp_path / "out")["model.embed_tokens.weight"]) == ("dense", "raw")


def test_excluded_weights_are_coded_not_pruned(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    entries = convert(source, tmp_path / "out", exclude=[name])
    assert form(entries[name]) == ("dense", "exponent")
    assert torch.equal(dense_weights(tmp_path / "out")[name], build("llama", **_LARGER).get_parameter(name))


def test_an_included_head_is_pruned(source: Path, tmp_path: Path) -> None:
    assert form(convert(source, tmp_path / "out", include=[HEAD])[HEAD]) == ("bitmap", "exponent")


def test_a_dtype_that_no_lossless_codec_shrinks_stays_as_it_is(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source", dtype=torch.float32, **_LARGER)
    assert form(convert(source, tmp_path / "out")[HEAD]) == ("dense", "raw")


def test_the_report_counts_the_bits_of_pruned_weights_only(source: Path, tmp_path: Path) -> None:
    report = endor.convert(source, tmp_path / "out", method="magnitude")
    with CheckpointReader(tmp_path / "out") as reader:
        pruned = [e.layout for e in reader.entries.values() if e.layout.mask == "bitmap"]
    weights = sum(layout.geometry.numel for layout in pruned)
    assert report.pruned_tensors == len(pruned)
    assert report.bits_per_weight == pytest.approx(8 * sum(p.nbytes for p in pruned) / weights)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_coded_head_gives_the_logits_of_the_dense_pruned_model_bit_for_bit(
    source: Path, tmp_path: Path, method: str
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    assert not convert(source, out, method=method, samples=2, sequence_length=16)[HEAD].layout.is_plain
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.load_state_dict(dense_weights(out), strict=False)
    model.save_pretrained(plain)
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(plain)
    exact = EndorConfig(matmul="decode")
    with pytest.warns(UserWarning, match="matmul"):  # transformers says that the config overrides
        packed: Any = transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=exact)
    assert torch.equal(logits(packed), logits(dense))
    for host_memory in (0, None):
        streamed = endor.load(out, host_memory=host_memory, matmul="decode")
        assert torch.equal(logits(streamed), logits(dense))
        runtime_of(streamed).close()


def test_a_coded_head_is_streamed_as_a_block_of_its_own(source: Path, tmp_path: Path) -> None:
    entries = convert(source, tmp_path / "out")
    model = endor.load(tmp_path / "out", host_memory=0)
    runtime = runtime_of(model)
    assert runtime.placement.counts()["disk"] == 3
    logits(model)
    rows = IDS.numel() * 2 * 128  # of the embedding, which is looked up on disk
    assert runtime.per_forward()[0].disk_bytes == runtime.streamed_bytes + rows
    assert model.lm_head.weight.nbytes == entries[HEAD].layout.nbytes < 2 * VOCABULARY * 128
    runtime.close()


def test_verify_and_state_accept_a_coded_head(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out") == []
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    assert torch.equal(model.state_dict()[HEAD], build("llama", **_LARGER).lm_head.weight)


@pytest.mark.parametrize("family", ["opt", "gpt-neox", "bert", "bart", "t5", "gpt2", "mixtral"])
def test_every_linear_outside_the_blocks_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    source = save_source(family, tmp_path / "source")
    entries = convert(source, tmp_path / "out", method="none")
    stored = dense_weights(tmp_path / "out")
    for name, weight in build(family).state_dict().items():
        assert torch.equal(stored[name].view(torch.uint8), weight.contiguous().view(torch.uint8)), name
    aliased = [entry for entry in entries.values() if entry.aliases]
    assert all(entry.layout.is_plain for entry in aliased)

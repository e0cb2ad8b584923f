"""What OUT may hold, what is deleted and what never, and what a finished directory has."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.convert.output import JOURNAL_NAME
from endor.errors import ConvertError
from endor.formats import CheckpointReader
from tests.support.sources import dense_weights, file_digests, save_source, zero_share


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_source("llama", tmp_path_factory.mktemp("output") / "source")
    (directory / "LICENSE").write_text("do what you like")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "training_args.bin").write_bytes(b"not for you")
    (directory / "README.md").write_text("about the dense model")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return directory


def convert(source: Path, out: Path, **options: Any) -> endor.ConvertReport:
    return endor.convert(source, out, **{"method": "magnitude", "values": "raw", **options})


def test_finished_directory_has_everything_and_nothing_else(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "LICENSE",
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"] == {
        "quant_method": "endor",
        "format_version": 1,
        "method": "magnitude",
        "sparsity": 0.5,
        "pattern": "unstructured",
        "values": "raw",
    }
    del config["quantization_config"]
    assert config == json.loads((source / "config.json").read_text())
    assert report.output_bytes == (tmp_path / "out" / "model-00001-of-00001.safetensors").stat().st_size


def test_report_counts_what_is_there(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", sparsity=0.25)
    with CheckpointReader(tmp_path / "out") as reader:
        packed = [e for e in reader.entries.values() if e.layout.mask == "bitmap"]
        assert (report.tensors, report.pruned_tensors) == (len(reader.entries), len(packed))
    assert report.sparsity == pytest.approx(0.25)
    assert report.bits_per_weight == pytest.approx(16 * 0.75 + 1, abs=0.7)
    assert report.seconds > 0
    assert set(report.to_json()) == {
        "tensors", "pruned_tensors", "source_bytes", "output_bytes", "bits_per_weight", "sparsity", "seconds"
    }  # fmt: skip


def test_the_same_conversion_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(source, tmp_path / name, method="wanda", samples=3, sequence_length=20)
    assert file_digests(tmp_path / "one") == file_digests(tmp_path / "two")


def test_foreign_directory_is_left_alone_even_with_overwrite(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConvertError, match="is not empty and was not written by Endor"):
            convert(source, tmp_path / "out", **options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_file_as_out_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConvertError, match="is a file; OUT must be a directory"):
        convert(source, tmp_path / "out")


def test_source_as_out_is_refused(source: Path) -> None:
    with pytest.raises(ConvertError, match="same directory"):
        convert(source, source, overwrite=True)


def test_complete_checkpoint_needs_overwrite(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    with pytest.raises(
        ConvertError, match="is an Endor checkpoint already; choose a new directory, or --overwrite"
    ):
        convert(source, tmp_path / "out")
    with pytest.raises(ConvertError, match="nothing to resume"):
        convert(source, tmp_path / "out", resume=True)


def test_overwrite_deletes_only_what_is_ours(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", shard_size=40_000)
    (tmp_path / "out" / "my-notes.txt").write_text("keep me")
    convert(source, tmp_path / "out", overwrite=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "my-notes.txt" in names
    assert [name for name in names if name.startswith("model-")] == ["model-00001-of-00001.safetensors"]
    with CheckpointReader(tmp_path / "out") as reader:
        assert len(reader.names()) == 30


def test_overwrite_with_a_bad_source_loses_nothing(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = file_digests(tmp_path / "out")
    with pytest.raises(ConvertError):
        convert(tmp_path / "nowhere", tmp_path / "out", overwrite=True)
    with pytest.raises(ConvertError):
        convert(source, tmp_path / "out", overwrite=True, memory=1)
    assert file_digests(tmp_path / "out") == before


def test_interrupted_conversion_needs_a_decision(source: Path, tmp_path: Path) -> None:
    def stop(_: object) -> None:
        if (tmp_path / "out" / JOURNAL_NAME).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop)
    with pytest.raises(
        ConvertError, match="interrupted conversion; continue it with --resume, or --overwrite"
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", overwrite=True, sparsity=0.3)


def test_old_shards_are_not_taken_for_new_ones_if_deleting_them_was_interrupted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out", sparsity=0.25)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("endor.convert.output._remove", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", overwrite=True)
    convert(source, tmp_path / "out", resume=True)
    stored = dense_weights(tmp_path / "out")
    assert zero_share([stored["model.layers.0.mlp.up_proj.weight"]]) == pytest.approx(0.5)


def test_resume_and_overwrite_together_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="ask for one of them"):
        convert(source, tmp_path / "out", resume=True, overwrite=True)


def test_two_conversions_do_not_share_a_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another conversion is writing to"):
            convert(source, tmp_path / "out")
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_the_right_to_write(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(ConvertError, match="Permission denied"):
        convert(source, tmp_path / "out")


def test_include_replaces_the_default_selection(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", include=["*.mlp.down_proj.weight", "lm_head.weight"])
    stored = dense_weights(tmp_path / "out")
    assert report.pruned_tensors == 4
    assert zero_share([stored["lm_head.weight"]]) == pytest.approx(0.5)
    assert zero_share([stored["model.layers.0.mlp.up_proj.weight"]]) < 0.01


def test_exclude_takes_from_the_selection(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out", exclude=["*.self_attn.*"]).pruned_tensors == 9


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_matches_nothing_is_refused(source: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(ConvertError, match=rf"--{option} 'model.layer.\*' matches no tensor.*q_proj"):
        convert(source, tmp_path / "out", **{option: ["model.layer.*"]})


def test_including_what_cannot_be_pruned_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"model\.norm\.weight.* has shape \[64\]; only matrices"):
        convert(source, tmp_path / "out", include=["model.norm.weight"])


def test_method_none_keeps_every_bit(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    report = convert(source, tmp_path / "out", method="none")
    stored = dense_weights(tmp_path / "out")
    for name, weight in load_file(source / "model.safetensors").items():
        assert torch.equal(stored[name], weight)
    assert report.sparsity == 0


def test_sparsity_zero_needs_no_calibration(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source")
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert convert(source, tmp_path / "out", method="wanda", sparsity=0.0).sparsity == 0


def test_wanda_without_a_tokenizer_is_refused_with_a_way_out(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source")
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConvertError, match=r"needs the model's tokenizer.*--method magnitude"):
        convert(source, tmp_path / "out", method="wanda")


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_patterns_hold_in_every_group(source: Path, tmp_path: Path, method: str, pattern: str) -> None:
    convert(source, tmp_path / "out", method=method, pattern=pattern, samples=2, sequence_length=16)
    n, m = map(int, pattern.split(":"))
    weight = dense_weights(tmp_path / "out")["model.layers.1.mlp.gate_proj.weight"]
    assert ((weight.view(-1, m) != 0).sum(1) == n).all()


def test_width_that_a_pattern_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    source = save_source("llama", tmp_path / "source", intermediate_size=90)
    with pytest.raises(ConvertError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: its input width 90"):
        convert(source, tmp_path / "out", pattern="2:4")
    convert(source, tmp_path / "out", pattern="2:4", exclude=["*.down_proj.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, found 1.0"),
        ({"sparsity": -0.5}, "sparsity must be"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "2:4 always has sparsity 0.5"),
        ({"pattern": "3:7:1"}, "unknown pattern"),
        ({"method": "guess"}, "unknown method"),
        ({"values": "zip"}, "unknown values codec 'zip'; use one of auto, raw"),
        ({"samples": 0}, "must be at least 1"),
        ({"shard_size": 0}, "shard size must be"),
        ({"method": "wanda", "device": "abacus"}, "device 'abacus' cannot be used"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_package_is_callable_whatever_was_imported_first(source: Path, tmp_path: Path) -> None:
    import endor.convert.pipeline

    package: Any = endor.convert
    assert package(source, tmp_path / "out", method="none", values="raw").tensors == 30


def test_a_checkpoint_finished_meanwhile_by_another_conversion_is_left_alone(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    others: list[endor.ConvertReport] = []

    def convert_once(_: object) -> None:
        if not others:
            others.append(endor.convert(source, out, method="magnitude", sparsity=0.3))

    with pytest.raises(ConvertError, match="another one has written to it"):
        endor.convert(source, out, method="magnitude", sparsity=0.7, progress=convert_once)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["sparsity"] == 0.3
    with endor.open(out) as checkpoint:
        assert checkpoint.names()


def test_a_single_pattern_instead_of_a_list_is_refused_in_words(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="lists of patterns"):
        endor.convert(source, tmp_path / "out", method="magnitude", include="*.mlp.*")


def test_method_none_records_no_sparsity(source: Path, tmp_path: Path) -> None:
    endor.convert(source, tmp_path / "out", method="none")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sparsity"] == 0.0

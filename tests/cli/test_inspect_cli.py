"""`endor inspect`: the JSON keys that others rely on, and a table that a person can read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from endor.formats import codec_named
from endor.kernels import encode
from tests.support.shards import pruned, write_checkpoint

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def test_json_has_the_keys_of_the_interface(run_command: Run, model: Path) -> None:
    done = run_command("endor", "inspect", model, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert set(found) == {"format_version", "tensors", "bits_per_weight", "bytes", "lossless"}
    assert (found["format_version"], found["lossless"]) == (1, True)
    assert found["bytes"] == (model / "model-00001-of-00001.safetensors").stat().st_size
    packed = encode(pruned(5, 70)).layout
    assert found["tensors"][0] == {
        "name": "layers.0.w",
        "shape": [5, 70],
        "dtype": "BF16",
        "mask": "bitmap",
        "codec": "raw",
        "nnz": packed.nnz,
        "sparsity": packed.sparsity,
        "bytes": packed.nbytes,
        "bits_per_weight": packed.bits_per_weight,
        "aliases": [],
    }
    assert found["tensors"][2]["aliases"] == ["embed.w"]
    assert found["bits_per_weight"] == packed.bits_per_weight  # plain entries do not count


def test_bits_per_weight_is_null_where_nothing_is_encoded(run_command: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{"b": {"x": torch.ones(3)}}])
    assert json.loads(run_command("endor", "inspect", tmp_path, "--json").stdout)["bits_per_weight"] is None
    assert "encoded" not in run_command("endor", "inspect", tmp_path).stdout


def test_a_head_that_is_only_coded_has_its_own_line_of_bits_per_weight(
    run_command: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = encode(pruned(64, 64))
    head = encode(torch.randn(300, 64).bfloat16(), values="exponent", mask="dense")
    write_checkpoint(tmp_path, [{"l": {"l.w": layer}}, {"head": {"head.w": head}}])
    lines = run_command("endor", "inspect", tmp_path).stdout.splitlines()
    assert f"1 encoded: {layer.layout.bits_per_weight:.3f} bits per weight" in lines[-2]
    assert lines[-1].startswith(f"1 more without a bitmap: {head.layout.bits_per_weight:.3f} bits per weight")
    found = json.loads(run_command("endor", "inspect", tmp_path, "--json").stdout)
    assert found["bits_per_weight"] == layer.layout.bits_per_weight


def test_bits_per_weight_is_over_all_that_is_encoded_where_nothing_is_pruned(
    run_command: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    packed = [encode(torch.randn(n, 64).bfloat16(), values="exponent", mask="dense") for n in (64, 300)]
    write_checkpoint(tmp_path, [{"l": {"l.w": packed[0]}}, {"head": {"head.w": packed[1]}}])
    bits = 8 * sum(p.layout.nbytes for p in packed) / (364 * 64)
    found = json.loads(run_command("endor", "inspect", tmp_path, "--json").stdout)
    assert found["bits_per_weight"] == pytest.approx(bits)
    assert "2 encoded" in run_command("endor", "inspect", tmp_path).stdout.splitlines()[-1]


def test_the_table_has_a_row_per_kind_of_tensor_and_totals(run_command: Run, tmp_path: Path) -> None:
    """Hundreds of layers must not scroll what matters away."""
    packed = encode(pruned(8, 64))
    layers = [{f"l.{i}": {f"model.layers.{i}.up.weight": packed} for i in range(300)}]
    write_checkpoint(tmp_path, layers)
    lines = run_command("endor", "inspect", tmp_path).stdout.splitlines()
    assert len(lines) == 5
    assert lines[0].split() == [
        "tensor",
        "count",
        "shape",
        "dtype",
        "stored",
        "as",
        "zeros",
        "bits/weight",
        "size",
    ]
    assert lines[1].split()[:6] == ["model.layers.*.up.weight", "300", "8", "x", "64", "BF16"]
    assert "300 tensors in 300 blocks and 1 file" in lines[3]
    assert f"{packed.layout.bits_per_weight:.3f} bits per weight" in lines[4]
    assert "lossless" in lines[4]


def test_a_pattern_lists_tensors_one_by_one(run_command: Run, model: Path) -> None:
    lines = run_command("endor", "inspect", model, "layers.0.*").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["tensor", "layers.0.w", "layers.0.norm"]
    assert (
        len(json.loads(run_command("endor", "inspect", model, "layers.0.*", "--json").stdout)["tensors"]) == 2
    )


@pytest.mark.parametrize("name", ["head.w", "embed.w"], ids=["name", "alias"])
def test_one_tensor_is_shown_with_its_sections(run_command: Run, model: Path, name: str) -> None:
    text = run_command("endor", "inspect", model, name).stdout
    assert "block head" in text
    assert "also called embed.w" in text
    assert [line.split()[0] for line in text.splitlines() if line][-2] == "dense"


def test_sections_are_shown_at_their_place_in_the_file(run_command: Run, model: Path) -> None:
    lines = run_command("endor", "inspect", model, "layers.0.norm").stdout.splitlines()
    row = next(line for line in lines if line.startswith("dense")).split()
    raw = (model / "model-00001-of-00001.safetensors").read_bytes()[int(row[3]) : int(row[4])]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32), torch.arange(5.0))


def test_an_unknown_name_is_an_error_with_near_names(run_command: Run, model: Path) -> None:
    done = run_command("endor", "inspect", model, "0.norm")
    assert done.returncode == 1
    assert "has no tensor '0.norm'; did you mean layers.0.norm?" in done.stderr


def test_names_that_look_like_markup_are_shown_as_they_are(run_command: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{"b": {"[bold]x[/bold]:smile:": torch.ones(3)}}])
    assert "[bold]x[/bold]:smile:" in run_command("endor", "inspect", tmp_path).stdout


def test_a_long_name_is_not_broken(run_command: Run, tmp_path: Path) -> None:
    name = (
        "model.language_model.layers.0.block_sparse_moe.experts.gate_up_proj.parametrizations." * 3 + "weight"
    )
    write_checkpoint(tmp_path, [{"b": {name: torch.ones(3)}}])
    for arguments in ([], [name]):
        lines = run_command("endor", "inspect", tmp_path, *arguments).stdout.splitlines()
        assert any(line.startswith(f"{name} ") for line in lines)


def test_quiet_leaves_the_totals(run_command: Run, model: Path) -> None:
    lines = run_command("endor", "inspect", model, "--quiet").stdout.split("\n")
    assert lines[1].startswith("3 tensors in 2 blocks")


def test_a_lossy_codec_is_called_lossy(
    run_command: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(codec_named("raw")), "lossless", False)
    assert run_command("endor", "inspect", model).stdout.rstrip().endswith("lossy")
    assert json.loads(run_command("endor", "inspect", model, "--json").stdout)["lossless"] is False


def test_a_directory_that_is_no_checkpoint_is_refused(run_command: Run, tmp_path: Path) -> None:
    done = run_command("endor", "inspect", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: no config.json")


def test_the_shipped_model_is_described(run_command: Run, demo_checkpoint: Path) -> None:
    found = json.loads(run_command("endor", "inspect", demo_checkpoint, "--json").stdout)
    assert 5.6 < found["bits_per_weight"] < 6.05
    assert all(0.49 < t["sparsity"] < 0.51 for t in found["tensors"] if t["mask"] == "bitmap")

"""Golden checkpoints: old files are read to the same bits for ever, and writing gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from endor.formats import CheckpointReader, verify_checkpoint
from endor.kernels import backends, decode
from tests.golden import make_v1
from tests.support.shards import bits

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "v1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())
CHECKPOINT_FILES = sorted(path.name for path in GOLDEN.iterdir() if path.name != "expected.json")


def test_the_golden_checkpoint_is_whole() -> None:
    assert verify_checkpoint(GOLDEN) == []


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", EXPECTED)
def test_golden_tensors_are_read_to_their_bits(name: str, backend: str) -> None:
    with CheckpointReader(GOLDEN) as checkpoint:
        packed = checkpoint.read(name)
    packed.check()
    dense = decode(packed, backend=backend)
    assert list(dense.shape) == EXPECTED[name]["shape"]
    assert str(dense.dtype) == f"torch.{EXPECTED[name]['dtype']}"
    assert bits(dense).hex() == EXPECTED[name]["bits"]


@pytest.mark.parametrize("backend", backends())
def test_golden_blocks_are_unpacked_in_place(backend: str) -> None:
    with CheckpointReader(GOLDEN) as checkpoint:
        for home in checkpoint.blocks:
            for name, packed in home.block.unpack(checkpoint.read_block(home)).items():
                assert bits(decode(packed, backend=backend)).hex() == EXPECTED[name]["bits"]


def test_golden_names_blocks_and_aliases() -> None:
    with CheckpointReader(GOLDEN) as checkpoint:
        assert checkpoint.names() == tuple(EXPECTED)
        assert [home.block.name for home in checkpoint.blocks] == ["embed", "layers.0", "layers.1", "rest"]
        assert dict(checkpoint.aliases) == {
            "lm_head.weight": "embed.weight",
            "größe.ω": "embed.weight",
            "layers.0.tied": "layers.0.bf16",
        }
        assert bits(decode(checkpoint.read("größe.ω"))).hex() == EXPECTED["embed.weight"]["bits"]


@pytest.mark.parametrize("backend", backends())
def test_the_same_tensors_give_the_same_bytes(tmp_path: Path, backend: str) -> None:
    make_v1.write(tmp_path, backend=backend)
    for name in CHECKPOINT_FILES:
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == CHECKPOINT_FILES


def test_the_script_still_makes_what_the_files_hold() -> None:
    assert json.loads(make_v1.expected(make_v1.dense_tensors())) == EXPECTED


def test_the_golden_values_include_the_hard_ones() -> None:
    """A golden file without -0.0, subnormals and NaN payloads would hold nothing to its word."""
    for dtype, words in make_v1.SPECIAL.items():
        name = {2: "layers.0.bf16", 4: "layers.0.fp32", 1: "layers.0.fp8"}[dtype.itemsize]
        name = "layers.0.fp16" if dtype == torch.float16 else name
        stored = bytes.fromhex(EXPECTED[name]["bits"])
        found = {
            int.from_bytes(stored[i : i + dtype.itemsize], "little")
            for i in range(0, len(stored), dtype.itemsize)
        }
        assert set(words) <= found


def test_the_official_reader_lists_every_section() -> None:
    with CheckpointReader(GOLDEN) as checkpoint:
        for path in {home.file for home in checkpoint.blocks}:
            own = {
                name
                for home in checkpoint.blocks
                if home.file == path
                for e in home.block.entries
                for name in e.tensor_names()
            }
            with safe_open(path, "pt") as official:
                assert {name for name in official.keys() if not name.startswith("endor.padding.")} == own  # noqa: SIM118
                assert official.metadata()["format"] == "pt"

"""The golden checkpoint of `exponent`, `int8` and `int4`: read to the same bits for ever, by every backend.

What `exponent` writes is golden too. Scales and codebooks may get better, so what `int8` and `int4` write is
not: only what their bytes mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from endor.formats import CheckpointReader, verify_checkpoint
from endor.kernels import backends, decode
from endor.kernels.registry import choose
from tests.golden import make_v1, make_v1_codecs
from tests.support.bits import assert_bitwise_equal
from tests.support.shards import bits

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "v1-codecs"
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())


def skip_unless_supported(backend: str, codec: str) -> None:
    if not choose(backend, "raw", torch.device("cpu")).supports(codec, torch.device("cpu")):
        pytest.skip(f"{backend} does not have codec {codec}")


def test_the_golden_checkpoint_is_whole() -> None:
    assert verify_checkpoint(GOLDEN) == []


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", EXPECTED)
def test_golden_tensors_are_read_to_their_bits(name: str, backend: str) -> None:
    skip_unless_supported(backend, name.partition(".")[0])
    with CheckpointReader(GOLDEN) as checkpoint:
        packed = checkpoint.read(name)
    dense = decode(packed, backend=backend)
    assert list(dense.shape) == EXPECTED[name]["shape"]
    assert str(dense.dtype) == f"torch.{EXPECTED[name]['dtype']}"
    assert bits(dense).hex() == EXPECTED[name]["bits"]


@pytest.mark.parametrize("backend", backends())
def test_exponent_writes_the_golden_bytes(backend: str) -> None:
    skip_unless_supported(backend, "exponent")
    written = make_v1_codecs.packed_tensors(make_v1_codecs.LOSSLESS, backend=backend)
    with CheckpointReader(GOLDEN) as checkpoint:
        for name in make_v1_codecs.LOSSLESS:
            golden = checkpoint.read(name)
            assert written[name].layout == golden.layout
            for section, tensor in golden.sections.items():
                assert_bitwise_equal(written[name].sections[section], tensor)


def test_what_is_lossless_holds_what_went_in() -> None:
    dense = make_v1_codecs.dense_tensors()
    for name in make_v1_codecs.LOSSLESS:
        assert bits(dense[name]).hex() == EXPECTED[name]["bits"]


def test_the_golden_entries_have_pairs_singles_special_values_and_an_empty_row_block() -> None:
    with CheckpointReader(GOLDEN) as checkpoint:
        params = [checkpoint.read(name).layout.params for name in make_v1_codecs.LOSSLESS]
        offsets = checkpoint.read("exponent.bf16").sections["row_offsets"]
    assert {p["pairs"] > 0 for p in params} == {True, False}
    assert max(p["singles"] for p in params) > 2
    assert 0 in offsets.diff()
    for name, dtype in (("exponent.bf16", torch.bfloat16), ("exponent.fp16", torch.float16)):
        raw = bytes.fromhex(EXPECTED[name]["bits"])
        found = {int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)}
        assert set(make_v1.SPECIAL[dtype]) <= found

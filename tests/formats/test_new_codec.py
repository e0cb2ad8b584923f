"""A new codec is a class and a line in the registry: header, writer, reader, verifier and `inspect` stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from endor.errors import FormatError
from endor.formats import CODECS, CheckpointReader, PackedTensor, TensorLayout, verify_checkpoint
from endor.formats.codecs import Codec, SectionSpec, ValuesContext
from endor.kernels import encode
from tests.support.shards import ShardParts, bits, pruned, repair_index, write_checkpoint

SHARD = "model-00001-of-00001.safetensors"


class PlanesCodec(Codec):
    """High bytes and low bytes apart, the high ones xored with a param; offsets of its own per row block."""

    name = "planes"
    lossless = True

    def supports(self, dtype: torch.dtype, mask: str) -> bool:
        return dtype.itemsize == 2

    def sections(self, values: ValuesContext) -> tuple[SectionSpec, ...]:
        if set(values.params) != {"key"} or values.params["key"] > 255:
            raise FormatError(f"codec planes needs the param key, found {dict(values.params)} [F11]")
        return (
            SectionSpec("high", torch.uint8, (values.nnz,)),
            SectionSpec("low", torch.uint8, (values.nnz,)),
            SectionSpec("starts", torch.int64, (values.geometry.row_blocks + 1,)),
        )

    def check(self, values: ValuesContext, sections: Mapping[str, torch.Tensor]) -> None:
        if int(sections["starts"][-1]) != values.nnz:
            raise FormatError("starts must end at nnz")


def planes(weight: torch.Tensor, mask: str, key: int) -> PackedTensor:
    """Encode with the codec of this file."""
    raw = encode(weight)
    kept = raw.sections["values"] if mask == "bitmap" else weight.reshape(-1)
    layout = TensorLayout(tuple(weight.shape), weight.dtype, mask, "planes", kept.numel(), {"key": key})
    pairs = kept.view(torch.uint8).view(-1, 2)
    starts = torch.full((layout.geometry.row_blocks + 1,), kept.numel())
    sections = {"high": pairs[:, 1] ^ key, "low": pairs[:, 0].contiguous(), "starts": starts}
    if mask == "bitmap":
        sections |= {name: raw.sections[name] for name in ("bitmap", "row_offsets")}
    return PackedTensor(layout, sections)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "planes", PlanesCodec())


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("mask", ["bitmap", "dense"])
def test_a_new_codec_is_written_read_and_verified(tmp_path: Path, mask: str) -> None:
    packed = planes(pruned(9, 700), mask, key=0x5A)
    write_checkpoint(tmp_path, [{"b": {"w": packed}}])
    assert verify_checkpoint(tmp_path) == []
    with CheckpointReader(tmp_path) as checkpoint:
        read = checkpoint.read("w")
        (block,) = (home.block.unpack(checkpoint.read_block(home)) for home in checkpoint.blocks)
    assert read.layout == packed.layout == block["w"].layout
    names = ["high", "low", "starts"]
    assert list(read.sections) == (["bitmap", "row_offsets"] if mask == "bitmap" else []) + names
    for name, section in packed.sections.items():
        assert bits(read.sections[name]) == bits(section) == bits(block["w"].sections[name])


@pytest.mark.usefixtures("registered")
def test_its_params_sizes_and_contents_are_checked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{"b": {"w": planes(pruned(9, 700), "bitmap", key=1)}}])
    whole = (tmp_path / SHARD).read_bytes()
    parts = ShardParts.read(tmp_path / SHARD)
    parts.entry("w")["params"] = {"key": 256}
    parts.write(tmp_path / SHARD)
    repair_index(tmp_path)
    with pytest.raises(FormatError, match=r"entry 'w': codec planes needs the param key"):
        CheckpointReader(tmp_path)
    (tmp_path / SHARD).write_bytes(whole)
    parts = ShardParts.read(tmp_path / SHARD)
    parts.section("w.starts")[-8:] = bytes(8)
    parts.sign("w")
    parts.write(tmp_path / SHARD)
    repair_index(tmp_path)
    assert verify_checkpoint(tmp_path) == [f"{tmp_path / SHARD}: entry 'w': starts must end at nnz"]


def test_a_reader_without_the_codec_says_so_by_name(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, "planes", PlanesCodec())
        write_checkpoint(tmp_path, [{"b": {"w": planes(pruned(9, 700), "bitmap", key=1)}}])
    with pytest.raises(FormatError, match=r"entry 'w': .*unknown codec 'planes'.*upgrade to read it"):
        CheckpointReader(tmp_path)

"""Whatever is written is read back bit for bit, by us and by the official safetensors reader."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open

from endor.errors import LoadError
from endor.formats import CheckpointReader, verify_checkpoint
from endor.formats.dtypes import DTYPES
from endor.kernels import decode, encode
from tests.support.shards import bits, pruned, write_checkpoint
from tests.support.strategies import prunable_tensors

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(
    lambda text: f"t.{text}"
)


@settings(max_examples=60)
@given(
    tensors=st.dictionaries(names, st.tuples(prunable_tensors(max_elements=5000), st.booleans()), max_size=4),
    per_block=st.integers(1, 4),
    reserve=st.sampled_from([1, 100_000]),
)
def test_any_tensors_come_back_bit_for_bit(
    tensors: dict[str, tuple[torch.Tensor, bool]], per_block: int, reserve: int
) -> None:
    """Any names too: escapes, quotes, control characters and all of Unicode."""
    stored = {name: encode(tensor) if packed else tensor for name, (tensor, packed) in tensors.items()}
    listed = list(stored.items())
    blocks = {f"{i}": dict(listed[i : i + per_block]) for i in range(0, len(listed), per_block)}
    with tempfile.TemporaryDirectory() as folder:
        directory = write_checkpoint(Path(folder), [blocks], header_reserve_bytes=reserve)
        assert verify_checkpoint(directory) == []
        with CheckpointReader(directory) as checkpoint:
            assert checkpoint.names() == tuple(tensors)
            for name, (tensor, _) in tensors.items():
                packed = checkpoint.read(name)
                assert packed.layout.shape == tensor.shape
                assert packed.layout.dtype == tensor.dtype
                assert bits(decode(packed)) == bits(tensor)
            with safe_open(directory / "model-00001-of-00001.safetensors", "pt") as official:
                for entry in checkpoint.entries.values():
                    for section, tensor_name in zip(entry.sections, entry.tensor_names(), strict=True):
                        theirs = official.get_tensor(tensor_name)
                        assert bits(theirs) == bits(checkpoint.read(entry.name).sections[section.name])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_stored_as_it_is(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = int(torch.tensor(shape).prod()) if shape else 1
    raw = torch.arange(count * dtype.itemsize, dtype=torch.uint8) * 37
    tensor = (raw & 1 if dtype == torch.bool else raw).view(dtype).reshape(shape)
    write_checkpoint(tmp_path, [{"b": {"x": tensor}}])
    with CheckpointReader(tmp_path) as checkpoint:
        found = checkpoint.read("x").sections["dense"]
    assert (found.shape, found.dtype, bits(found)) == (tensor.shape, dtype, bits(tensor))


def test_blocks_read_as_one_are_the_entries_read_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as checkpoint:
        for home in checkpoint.blocks:
            memory = checkpoint.read_block(home)
            raw = home.file.read_bytes()[home.offset : home.offset + home.nbytes]
            assert memory.numpy().tobytes() == raw
            for name, packed in home.block.unpack(memory).items():
                for section, tensor in checkpoint.read(name).sections.items():
                    assert bits(tensor) == bits(packed.sections[section])
                    assert (
                        packed.sections[section].untyped_storage().data_ptr() == memory.data_ptr()
                    )  # no copy


# The reader


def test_an_alias_reads_its_entry(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as checkpoint:
        assert checkpoint.aliases == {"embed.w": "head.w"}
        assert checkpoint.entry("embed.w") is checkpoint.entry("head.w")
        assert checkpoint.home("embed.w").block.name == "head"
        assert "embed.w" not in checkpoint.names()


def test_an_unknown_name_is_answered_with_near_ones(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{"b": {"model.layers.0.up.weight": torch.ones(1)}}])
    with CheckpointReader(tmp_path) as checkpoint:
        with pytest.raises(
            KeyError, match=r"no tensor 'layers\.0\.up\.weight'; did you mean model\.layers\.0\.up\.weight"
        ):
            checkpoint.read("layers.0.up.weight")
        with pytest.raises(KeyError, match="no tensor 'x'"):
            checkpoint.entry("x")


def test_several_shards_are_one_checkpoint_in_execution_order(tmp_path: Path) -> None:
    shards = [{f"block {i}": {f"x{i}": encode(pruned(8, 64, seed=i))}} for i in range(11)]
    write_checkpoint(tmp_path, shards)
    with CheckpointReader(tmp_path) as checkpoint:
        assert [home.block.name for home in checkpoint.blocks] == [f"block {i}" for i in range(11)]
        assert checkpoint.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        for i in range(11):
            assert bits(decode(checkpoint.read(f"x{i}"))) == bits(pruned(8, 64, seed=i))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_a_closed_reader_holds_no_file_and_reads_again_when_asked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    before = open_descriptors()
    with CheckpointReader(tmp_path) as checkpoint:
        checkpoint.read("head.w")
        assert open_descriptors() == before + 1
    assert open_descriptors() == before
    checkpoint.read("head.w")
    checkpoint.close()
    checkpoint.close()
    assert open_descriptors() == before


def test_a_shard_replaced_behind_the_readers_back_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model-00001-of-00001.safetensors"
    with CheckpointReader(tmp_path) as checkpoint:
        raw = path.read_bytes()
        path.unlink()
        path.write_bytes(raw)
        with pytest.raises(LoadError, match="was replaced or changed since the checkpoint was opened"):
            checkpoint.read("head.w")
        path.unlink()
        with pytest.raises(LoadError, match=r"cannot open .*No such file"):
            checkpoint.read("head.w")


def test_a_shard_truncated_behind_the_readers_back_is_an_error(tmp_path: Path) -> None:
    """No mapping, so no SIGBUS."""
    write_checkpoint(tmp_path)
    path = tmp_path / "model-00001-of-00001.safetensors"
    with CheckpointReader(tmp_path) as checkpoint:
        checkpoint.read("layers.0.w")
        with path.open("r+b") as file:
            file.truncate(checkpoint.blocks[1].offset + 10)
        with pytest.raises(
            LoadError, match=r"block 'head': the file ends at byte \d+, expected \d+: it was truncated"
        ):
            checkpoint.read("head.w")


def test_an_unreadable_file_is_an_error_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)

    def preadv(*args: object) -> int:
        raise OSError(5, "Input/output error")

    with CheckpointReader(tmp_path) as checkpoint:
        monkeypatch.setattr("os.preadv", preadv)
        with pytest.raises(
            LoadError, match=r"block 'head': cannot read at byte \d+: Input/output error"
        ) as caught:
            checkpoint.read("head.w")
    assert caught.value.errno == 5

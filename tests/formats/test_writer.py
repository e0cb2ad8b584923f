"""The streaming writer: what it writes is valid for everyone, and no failure leaves half of a file."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from endor.errors import ConvertError, FormatError, LoadError
from endor.formats import (
    CheckpointReader,
    CheckpointWriter,
    PackedTensor,
    ShardWriter,
    atomic_write,
    header_bytes_bound,
    read_header,
    verify_checkpoint,
)
from endor.kernels import decode, encode
from tests.support.shards import ShardParts, bits, pruned, write_checkpoint

SHARD = "model-00001-of-00001.safetensors"


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def shard_writer(directory: Path, *, header_reserve_bytes: int = 4096) -> ShardWriter:
    return ShardWriter(directory / SHARD, header_reserve_bytes=header_reserve_bytes)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `nbytes`: as a full disk, at a byte one can choose."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_one(directory: Path, **more: torch.Tensor | PackedTensor) -> None:
    """A shard of one block with one entry, and `more`."""
    with shard_writer(directory) as shard, shard.block("b"):
        shard.add("x", torch.ones(3))
        for name, tensor in more.items():
            shard.add(name, tensor)


# What is written


def test_blocks_lie_on_pages_and_sections_on_cache_lines(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as checkpoint:
        for home in checkpoint.blocks:
            assert home.offset % 4096 == home.nbytes % 4096 == 0
            for entry in home.block.entries:
                for section in entry.sections:
                    assert section.begin % 64 == 0


def test_the_official_reader_sees_every_section_bit_for_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as checkpoint, safe_open(tmp_path / SHARD, "pt") as official:
        listed = {name for name in official.keys() if not name.startswith("endor.padding.")}  # noqa: SIM118
        ours = {name: checkpoint.read(name) for name in checkpoint.names()}
        assert listed == {tensor for entry in checkpoint.entries.values() for tensor in entry.tensor_names()}
        for name, packed in ours.items():
            for section, tensor in packed.sections.items():
                theirs = official.get_tensor(checkpoint.entry(name).section_tensor_name(section))
                assert theirs.dtype == tensor.dtype
                assert theirs.shape == tensor.shape
                assert bits(theirs) == bits(tensor)


def test_padding_is_zero_and_the_header_ends_in_spaces(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, header_reserve_bytes=20_000)
    parts = ShardParts.read(tmp_path / SHARD)
    for name in parts.table:
        if name.startswith("endor.padding."):
            assert not any(parts.section(name))
    raw = (tmp_path / SHARD).read_bytes()
    assert int.from_bytes(raw[:8], "little") == 20_480 - 8
    assert raw[8:20_480].rstrip(b" ").endswith(b"}")


def test_strides_slices_and_gradients_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(base.clone())
    write_checkpoint(tmp_path, [{"b": {"t": base.t(), "s": base[1:3, ::2], "p": parameter}}])
    with CheckpointReader(tmp_path) as checkpoint:
        for name, tensor in (("t", base.t()), ("s", base[1:3, ::2]), ("p", base)):
            assert torch.equal(decode(checkpoint.read(name)), tensor)


def test_a_block_without_bytes_takes_one_page(tmp_path: Path) -> None:
    """A range of no bytes cannot be read, so F9 forbids it."""
    write_checkpoint(tmp_path, [{"empty": {}, "zero": {"z": torch.empty(0, 3)}, "b": {"x": torch.ones(1)}}])
    with CheckpointReader(tmp_path) as checkpoint:
        assert [home.nbytes for home in checkpoint.blocks] == [4096] * 3
        assert checkpoint.read("z").sections["dense"].shape == (0, 3)
    assert verify_checkpoint(tmp_path) == []


def test_a_shard_without_blocks_is_valid(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{}])
    with CheckpointReader(tmp_path) as checkpoint, safe_open(tmp_path / SHARD, "pt") as official:
        assert checkpoint.names() == ()
        assert list(official.keys()) == []


def test_add_returns_the_entry_that_is_read_back(tmp_path: Path) -> None:
    with shard_writer(tmp_path) as shard, shard.block("b"):
        entry = shard.add("x", encode(pruned(5, 70)), aliases=["y"])
    header, _ = read_header(tmp_path / SHARD)
    assert header.entries["x"] == entry


# A header larger than its reserve


@pytest.mark.parametrize("payload_bytes", [0, 4096, 3 * 4096, 100_000], ids=str)
def test_a_header_that_outgrows_its_reserve_moves_the_payload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload_bytes: int
) -> None:
    """In steps smaller than the shift and larger, so that ranges overlap in every way."""
    data = torch.arange(payload_bytes, dtype=torch.int64).to(torch.uint8)
    names = [f"model.layers.{i}.weight" for i in range(60)]
    blocks: dict[str, Any] = {"data": {"data": data}, "many": {name: torch.ones(1) for name in names}}
    files = []
    for step, reserve in ((1 << 24, 1_000_000), (1 << 24, 1), (1000, 1), (4096, 8192)):
        monkeypatch.setattr("endor.formats.writer._MOVE_BYTES", step)
        directory = write_checkpoint(tmp_path / f"{step}-{reserve}", [blocks], header_reserve_bytes=reserve)
        assert verify_checkpoint(directory) == []
        assert names_in(directory) == ["config.json", SHARD, "model.safetensors.index.json"]
        files.append(ShardParts.read(directory / SHARD))
    assert all(parts == files[0] for parts in files)


def test_a_move_that_fails_leaves_nothing(tmp_path: Path) -> None:
    more: dict[str, torch.Tensor | PackedTensor] = {f"layer_{i}": torch.empty(0) for i in range(60)}
    more["data"] = torch.zeros(30_000, dtype=torch.uint8)
    with pytest.raises(ConvertError, match="cannot write"), file_size_limit(40_000):
        write_one(tmp_path, **more)
    assert names_in(tmp_path) == []


def test_the_reserve_for_ordinary_names_is_enough(tmp_path: Path) -> None:
    """Otherwise every conversion would move its payload."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(50)]
    reserve = header_bytes_bound(["b", *names, *(f"{name}.alias" for name in names)])
    with shard_writer(tmp_path, header_reserve_bytes=reserve) as shard, shard.block("b"):
        for name in names:
            shard.add(name, encode(pruned(2, 70)), aliases=[f"{name}.alias"])
    assert read_header(tmp_path / SHARD)[0].payload_begin == reserve


# Failures leave nothing


def interrupt(shard: ShardWriter, error: type[BaseException], where: str) -> None:
    """Raise `error` before, in or behind a block."""
    if where == "before":
        raise error
    with shard.block("b"):
        shard.add("x", torch.ones(3))
        if where == "in":
            raise error
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["before", "in", "behind"])
def test_an_exception_leaves_no_file(tmp_path: Path, error: type[BaseException], where: str) -> None:
    with pytest.raises(error), shard_writer(tmp_path) as shard:
        interrupt(shard, error, where)
    assert names_in(tmp_path) == []


def catch_inside(directory: Path) -> None:
    with shard_writer(directory) as shard, suppress(RuntimeError):
        interrupt(shard, RuntimeError, "in")


def test_an_error_caught_inside_cannot_lead_to_a_shard(tmp_path: Path) -> None:
    """Part of the block is written, so the rest must not be accepted as whole."""
    with pytest.raises(FormatError, match="a block failed"):
        catch_inside(tmp_path)
    assert names_in(tmp_path) == []


def test_a_block_that_is_still_open_cannot_be_finished(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="a block failed"), shard_writer(tmp_path) as shard:
        shard.block("b").__enter__()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("limit", [1, 5000, 9000, 50_000], ids=["first", "padding", "block", "later"])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    blocks: list[dict[str, Any]] = [{f"{i}": {f"x{i}": torch.ones(1000)} for i in range(20)}]
    with pytest.raises(ConvertError) as caught, file_size_limit(limit):
        write_checkpoint(tmp_path, blocks)
    message = str(caught.value)
    assert f"cannot write {tmp_path / SHARD}.part: File too large" in message
    assert "--resume" in message
    assert isinstance(caught.value.__cause__, OSError)
    assert names_in(tmp_path) == []


def test_a_full_disk_while_the_header_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is written last, over a hole: even then space may run out."""
    write = FileIO.write

    class Full(FileIO):
        def write(self, data: Any) -> int:
            if self.tell() == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, data)

    monkeypatch.setattr("endor.formats.writer.FileIO", Full)
    with pytest.raises(ConvertError, match="No space left on device"):
        write_one(tmp_path)
    assert names_in(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FileIO.write

    class Slow(FileIO):
        def write(self, data: Any) -> int:
            return write(self, memoryview(data)[:1000])

    monkeypatch.setattr("endor.formats.writer.FileIO", Slow)
    write_checkpoint(tmp_path, [{"b": {"x": torch.arange(5000.0)}}])
    assert verify_checkpoint(tmp_path) == []


@pytest.mark.parametrize("advice", ["taken", "refused", "unknown"])
def test_early_writeback_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advice: str
) -> None:
    """It is only advice: file systems may refuse it, and macOS does not know it."""
    ranges: list[tuple[int, int]] = []

    def fadvise(fd: int, offset: int, length: int, kind: int) -> None:
        ranges.append((offset, length))
        if advice == "refused":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("endor.formats.writer._FLUSH_BYTES", 1000)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    if advice == "unknown":
        monkeypatch.delattr(os, "posix_fadvise")
    write_checkpoint(tmp_path, header_reserve_bytes=4096)
    assert verify_checkpoint(tmp_path) == []
    if advice != "unknown":
        assert ranges[0][0] == 4096
        assert all(begin + length == after for (begin, length), (after, _) in pairwise(ranges))


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for action in (
        lambda: shard_writer(tmp_path / "nowhere").__enter__(),
        lambda: CheckpointWriter(tmp_path / "file" / "deeper", shards=1),
        lambda: atomic_write(tmp_path / "nowhere" / "x", b""),
    ):
        with pytest.raises(ConvertError, match="cannot write"):
            action()


def test_data_is_on_disk_before_its_name_and_the_name_before_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(fd: int) -> None:
        calls.append("fsync directory" if os.path.samestat(os.fstat(fd), tmp_path.stat()) else "fsync file")
        fsync(fd)

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    with shard_writer(tmp_path) as shard, shard.block("b"):
        shard.add("x", torch.ones(3))
    assert calls == ["fsync file", "rename", "fsync directory"]
    calls.clear()
    atomic_write(tmp_path / "small", b"x")
    assert calls == ["fsync file", "rename", "fsync directory"]


def test_a_killed_process_leaves_a_part_that_nobody_takes_for_a_shard(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from endor.formats import CheckpointWriter\n"
        "writer = CheckpointWriter(Path(sys.argv[1]), shards=1)\n"
        "with writer.shard(0, header_reserve_bytes=1) as shard, shard.block('b'):\n"
        "    shard.add('x', torch.ones(3)); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert names_in(tmp_path) == [f"{SHARD}.part"]
    assert not CheckpointWriter(tmp_path, shards=1).has_shard(0)
    write_checkpoint(tmp_path)
    assert verify_checkpoint(tmp_path) == []


# Names


def add_all(shard: ShardWriter, entries: list[tuple[str, list[str]]]) -> None:
    with shard.block("b"):
        for name, aliases in entries:
            shard.add(name, encode(pruned(2, 5)), aliases=aliases)


@pytest.mark.parametrize(
    ("first", "second", "aliases"),
    [
        pytest.param("x", "x", [], id="entry-twice"),
        pytest.param("x", "y", ["x"], id="alias-of-another-entry"),
        pytest.param("x", "y", ["y"], id="alias-of-itself"),
        pytest.param("x", "y", ["z", "z"], id="alias-twice"),
        pytest.param("x", "x.bitmap", [], id="called-like-a-section"),
        pytest.param("x", "y", ["x.values"], id="alias-like-a-section"),
        pytest.param("x", "y", ["y.values"], id="alias-like-its-own-section"),
    ],
)
def test_a_name_used_twice_is_refused(tmp_path: Path, first: str, second: str, aliases: list[str]) -> None:
    entries = [(first, []), (second, aliases)]
    with pytest.raises(FormatError, match=r"is used twice \[F14\]"), shard_writer(tmp_path) as shard:
        add_all(shard, entries)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["", "__metadata__", "endor.padding.0", "\ud800"], ids=ascii)
def test_a_reserved_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=r"\[F10\]"), shard_writer(tmp_path) as shard, shard.block("b"):
        shard.add(name, torch.ones(1))
    assert names_in(tmp_path) == []


def nest_blocks(shard: ShardWriter) -> None:
    with shard.block("a"), shard.block("b"):
        pass


def repeat_block(shard: ShardWriter) -> None:
    for _ in range(2):
        with shard.block("a"):
            pass


def leave_block_nameless(shard: ShardWriter) -> None:
    with shard.block(""):
        pass


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (nest_blocks, "inside another block"),
        (repeat_block, "written twice"),
        (leave_block_nameless, "a block needs a name"),
        (lambda shard: shard.add("x", torch.ones(1)), "outside a block"),
    ],
)
def test_blocks_have_names_and_follow_one_another(
    tmp_path: Path, misuse: Callable[[ShardWriter], Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message), shard_writer(tmp_path) as shard:
        misuse(shard)
    assert names_in(tmp_path) == []


def test_a_shard_is_written_inside_its_with_statement(tmp_path: Path) -> None:
    shard = shard_writer(tmp_path)
    with pytest.raises(FormatError, match="inside its with statement"), shard.block("b"):
        shard.add("x", torch.ones(1))


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="complex64 has no name"):
        write_one(tmp_path, complex=torch.ones(1, dtype=torch.complex64))
    assert names_in(tmp_path) == []


def test_a_packed_tensor_without_elements_is_refused(tmp_path: Path) -> None:
    """F11; the plain form of the same tensor is fine."""
    packed = encode(torch.empty(3, 0), backend="reference")
    with pytest.raises(FormatError, match=r"no elements and must be stored dense and raw \[F11\]"):
        write_one(tmp_path, packed=packed)
    assert names_in(tmp_path) == []


# Checkpoints


def test_finished_shards_are_found_again_and_damaged_ones_reported(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, shards=2)
    assert not writer.has_shard(0)
    with writer.shard(0, header_reserve_bytes=1) as shard, shard.block("b"):
        shard.add("x", torch.ones(1))
    assert CheckpointWriter(tmp_path, shards=2).has_shard(0)
    with pytest.raises(LoadError, match="model-00002-of-00002"):
        writer.finish()
    assert names_in(tmp_path) == ["model-00001-of-00002.safetensors"]
    writer.shard_path(0).write_bytes(b"short")
    with pytest.raises(FormatError, match="truncated"):
        writer.has_shard(0)


@pytest.mark.parametrize("shards", [0, -1, 100_000])
def test_a_checkpoint_has_a_number_of_shards_that_its_names_can_hold(tmp_path: Path, shards: int) -> None:
    with pytest.raises(FormatError, match="1 to 99999"):
        CheckpointWriter(tmp_path, shards=shards)


def test_a_shard_that_does_not_exist_has_no_path(tmp_path: Path) -> None:
    for number in (-1, 2):
        with pytest.raises(FormatError, match=f"no shard {number} of 2"):
            CheckpointWriter(tmp_path, shards=2).shard_path(number)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    atomic_write(tmp_path / "x", b"old")
    with pytest.raises(ConvertError, match="File too large"), file_size_limit(100):
        atomic_write(tmp_path / "x", b"new" * 1000)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names_in(tmp_path) == ["x"]

"""Sections that lie under a header that does not: checksums, `PackedTensor.check` and `endor verify` tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from endor.errors import ChecksumError, FormatError
from endor.formats import CheckpointReader, PackedTensor, TensorLayout, verify_checkpoint
from endor.formats.checksums import verify_block
from endor.kernels import backends, decode, encode
from tests.support.shards import ShardParts, pruned, repair_index, write_checkpoint

SHARD = "model-00001-of-00001.safetensors"
W, NORM = "layers.0.w", "layers.0.norm"


@dataclass(frozen=True)
class Lie:
    """What is changed in the sections of a packed bf16 [600, 70] (row blocks of 64), and what is said."""

    id: str
    rule: str
    change: Callable[[dict[str, torch.Tensor]], Any]
    words: tuple[str, ...]


def set_offset(at: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda sections: sections["row_offsets"].__setitem__(at, value)


def set_bit(row: int, byte: int, mask: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(sections: dict[str, torch.Tensor]) -> None:
        sections["bitmap"][row, byte] ^= mask

    return change


def swap_offsets(sections: dict[str, torch.Tensor]) -> None:
    offsets = sections["row_offsets"]
    offsets[3], offsets[4] = offsets[4].clone(), offsets[3].clone()


NNZ = encode(pruned(600, 70)).layout.nnz
LIES = [
    Lie("first-offset-not-0", "F18", set_offset(0, 1), ("from 0 to nnz", f"found 1 to {NNZ}")),
    Lie("last-offset-not-nnz", "F18", set_offset(-1, NNZ - 1), ("from 0 to nnz", f"found 0 to {NNZ - 1}")),
    Lie("offsets-decrease", "F18", swap_offsets, ("decrease at row block 3",)),
    Lie("offset-is-negative", "F18", set_offset(2, -1), ("decrease at row block 1",)),
    Lie("offset-is-huge", "F18", set_offset(2, 2**31 - 1), ("decrease at row block 2",)),
    Lie("bit-missing", "F18", set_bit(130, 0, 0xFF), ("row block 2 has", "row_offsets say")),
    Lie(
        "offset-off-by-one",
        "F18",
        lambda s: s["row_offsets"][5].add_(1),
        ("row block 4 has", "row_offsets say"),
    ),
    Lie("bit-beyond-last-column", "F17", set_bit(7, 8, 0x40), ("bitmap row 7", "beyond column 70")),
    Lie("bit-in-last-padding-byte", "F17", set_bit(599, 15, 0x80), ("bitmap row 599", "beyond column 70")),
]
IDS = [f"{lie.rule}-{lie.id}" for lie in LIES]


def lying(lie: Lie) -> PackedTensor:
    packed = encode(pruned(600, 70))
    sections = {name: section.clone() for name, section in packed.sections.items()}
    lie.change(sections)
    return PackedTensor(packed.layout, sections)


@pytest.mark.parametrize("lie", LIES, ids=IDS)
def test_check_finds_the_lie(lie: Lie) -> None:
    with pytest.raises(FormatError) as caught:
        lying(lie).check()
    assert str(caught.value).endswith(f"[{lie.rule}]")
    assert all(word in str(caught.value) for word in lie.words), caught.value


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("lie", LIES, ids=IDS)
def test_no_kernel_decodes_the_lie(lie: Lie, backend: str) -> None:
    with pytest.raises(FormatError):
        decode(lying(lie), backend=backend)


@pytest.mark.parametrize("lie", LIES, ids=IDS)
def test_verify_reports_the_lie_even_under_a_right_checksum(tmp_path: Path, lie: Lie) -> None:
    packed = encode(pruned(600, 70))
    write_checkpoint(tmp_path, [{"b": {"x": lying(lie), "y": packed}}])
    (error,) = verify_checkpoint(tmp_path)
    assert error.startswith(f"{tmp_path / SHARD}: entry 'x': ")
    assert error.endswith(f"[{lie.rule}]")


def test_offsets_at_the_ends_of_64_bits_do_not_overflow_the_check() -> None:
    """Differences of hostile 64-bit offsets wrap around; comparisons do not."""
    layout = TensorLayout((8192, 1), torch.bfloat16, "bitmap", "raw", 0)
    sections = {
        "bitmap": torch.zeros(8192, 8, dtype=torch.uint8),
        "row_offsets": torch.tensor([0, -(2**31), 0], dtype=torch.int32),
        "values": torch.empty(0, dtype=torch.bfloat16),
    }
    with pytest.raises(FormatError, match="decrease"):
        PackedTensor(layout, sections).check()


def damage(directory: Path, tensor: str) -> None:
    """Flip the last bit of a tensor of the table."""
    path = directory / SHARD
    parts = ShardParts.read(path)
    parts.section(tensor)[-1] ^= 1
    parts.write(path)
    repair_index(directory)


@pytest.mark.parametrize(
    ("entry", "section"),
    [(W, "bitmap"), (W, "row_offsets"), (W, "values"), (NORM, "dense")],
    ids=lambda name: name,
)
def test_a_section_with_a_wrong_checksum_is_refused_by_name(tmp_path: Path, entry: str, section: str) -> None:
    """F16"""
    write_checkpoint(tmp_path)
    damage(tmp_path, entry if section == "dense" else f"{entry}.{section}")
    with CheckpointReader(tmp_path) as checkpoint:
        with pytest.raises(ChecksumError) as caught:
            checkpoint.read(entry)
        home = checkpoint.home(entry)
        with pytest.raises(ChecksumError):
            verify_block(home.block, checkpoint.read_block(home).numpy().data, file=str(home.file))
        checkpoint.read("head.w")
        checkpoint.read(entry, verify=False)
    message = str(caught.value)
    for word in (
        str(tmp_path / SHARD),
        repr(entry),
        f"section {section}",
        "expected checksum",
        "copy it again",
        "[F16]",
    ):
        assert word in message
    assert verify_checkpoint(tmp_path) == [message]


def test_padding_that_is_not_zero_is_found_by_verify_alone(tmp_path: Path) -> None:
    """F15: no checksum covers padding and no reader uses it."""
    write_checkpoint(tmp_path)
    damage(tmp_path, "endor.padding.0")
    with CheckpointReader(tmp_path) as checkpoint:
        checkpoint.read(W)
    (error,) = verify_checkpoint(tmp_path)
    assert error.startswith(f"{tmp_path / SHARD}: block 'layers.0': padding at payload bytes")
    assert error.endswith("[F15]")


def test_verify_reports_all_errors_and_goes_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for tensor in (f"{W}.values", NORM, "head.w", "endor.padding.0"):
        damage(tmp_path, tensor)
    errors = verify_checkpoint(tmp_path)
    assert [error.rsplit("[")[-1] for error in errors] == ["F16]", "F16]", "F15]", "F16]"]


def test_verify_reports_progress_up_to_the_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    calls: list[tuple[int, int]] = []
    assert verify_checkpoint(tmp_path, progress=lambda done, total: calls.append((done, total))) == []
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (8192, 8192)


def test_verify_reads_large_plain_entries_through_a_small_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endor.formats.checksums._BUFFER_BYTES", 1000)
    write_checkpoint(tmp_path, [{"b": {"x": torch.arange(5000.0)}}])
    assert verify_checkpoint(tmp_path) == []
    damage(tmp_path, "x")
    (error,) = verify_checkpoint(tmp_path)
    assert "[F16]" in error


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask": "csr"},
        {"codec": "zip"},
        {"nnz": 17},
        {"nnz": -1},
        {"mask": "dense"},
        {"dtype": torch.int32},
        {"shape": ()},
        {"shape": (-1, 4)},
        {"shape": (2**40, 2**40)},
        {"params": {"x": 1}},
    ],
    ids=str,
)
def test_a_layout_that_contradicts_itself_cannot_be_made(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "shape": (4, 4),
        "dtype": torch.bfloat16,
        "mask": "bitmap",
        "codec": "raw",
        "nnz": 3,
    }
    TensorLayout(**right)
    with pytest.raises(FormatError, match=r"\[F(4|11)\]$"):
        TensorLayout(**{**right, **wrong})


def test_sections_that_do_not_fit_the_layout_make_no_packed_tensor() -> None:
    packed = encode(pruned(4, 70))
    good = dict(packed.sections)
    for name, wrong, message in (
        ("bitmap", good["bitmap"][:3], r"section bitmap: expected U8\[4, 16\], found U8\[3, 16\]"),
        ("values", good["values"].view(torch.float16), "section values: expected BF16"),
        ("bitmap", good["bitmap"].t().contiguous().t(), "section bitmap is not contiguous"),
    ):
        with pytest.raises(FormatError, match=message):
            PackedTensor(packed.layout, {**good, name: wrong})
    with pytest.raises(FormatError, match="expected sections"):
        PackedTensor(packed.layout, {"bitmap": good["bitmap"]})


def test_a_block_unpacks_only_a_buffer_of_its_own_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with CheckpointReader(tmp_path) as checkpoint:
        home = checkpoint.blocks[0]
        memory = checkpoint.read_block(home)
        assert list(home.block.unpack(memory, names={W})) == [W]
        for wrong in (memory[:-1], memory.view(torch.int8), memory.view(2, -1)):
            with pytest.raises(FormatError, match=r"needs a buffer of uint8 \[4096\]"):
                home.block.unpack(wrong)


def test_the_check_agrees_with_a_plain_count() -> None:
    """The vectorised popcount against unpacked bits, with a ragged last row block."""
    packed = encode(pruned(130, 70))
    ones = np.unpackbits(packed.sections["bitmap"].numpy(), axis=1).sum(axis=1)
    g = packed.layout.geometry
    counts = [int(ones[i : i + g.row_block].sum()) for i in range(0, g.rows, g.row_block)]
    assert packed.sections["row_offsets"].diff().tolist() == counts
    packed.check()

"""Calibration text: what is read, what is refused, and that a seed decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from endor.errors import ConvertError
from endor.pruning.calibration import read_documents, sample_sequences


def characters(text: str) -> dict[str, Any]:
    return {"input_ids": [ord(c) for c in text]}


def test_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\nstill one\n\n\n  two\n\n")
    assert read_documents(file) == ["one\nstill one", "  two"]


def test_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in ("a\n\nb", "c")))
    assert read_documents(file) == ["a\n\nb", "c"]


def test_the_text_that_ships_is_the_default() -> None:
    assert len(read_documents(None)) > 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read the calibration file .*missing.txt"),
        ("empty.txt", b"", "has no text"),
        ("blank.txt", b"\n\n  \n", "has no text"),
        ("binary.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{oops', "line 2: not valid JSON"),
        ("other.jsonl", b'{"content": "a"}', 'line 1: expected an object with a string "text"'),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        read_documents(tmp_path / name)


def test_a_seed_decides_the_sequences() -> None:
    documents = [f"document {i} " * 5 for i in range(50)]
    first, again, other = (
        sample_sequences(documents, characters, samples=4, sequence_length=32, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first.shape == (4, 32)
    assert first.equal(again)
    assert not first.equal(other)


def test_too_little_text_gives_fewer_sequences_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="gives 2 sequences of 10 tokens; 8 of 10 were wanted"):
        ids = sample_sequences(["x" * 23], characters, samples=8, sequence_length=10, seed=0)
    assert ids.shape == (2, 10)


def test_a_text_shorter_than_a_sequence_gives_a_short_one() -> None:
    with pytest.warns(UserWarning, match="1 sequences of 5 tokens"):
        ids = sample_sequences(["abc"], characters, samples=2, sequence_length=10, seed=0)
    assert ids.shape == (1, 5)


def test_text_without_tokens_is_refused() -> None:
    with pytest.raises(ConvertError, match="makes no token"):
        sample_sequences(["abc"], lambda _: {"input_ids": []}, samples=1, sequence_length=4, seed=0)

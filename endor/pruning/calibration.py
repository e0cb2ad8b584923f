"""Calibration text: documents from a file, cut into token sequences of equal length, the same ones for the
same seed."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch

from endor.errors import ConvertError

__all__ = ["DEFAULT_TEXT", "Tokenize", "read_documents", "sample_sequences"]

DEFAULT_TEXT = "calibration.txt"
"""In endor/assets."""


class Tokenize(Protocol):
    """What is needed of a tokenizer."""

    def __call__(self, text: str, /) -> Any:
        """A mapping with `input_ids`."""


def read_documents(file: Path | None) -> list[str]:
    """The documents of a .jsonl file with `text`, or of a text file that separates them by blank lines.

    Args:
        file: None is the text that ships.

    Raises ConvertError if the file cannot be read or has no text.
    """
    path = file if file is not None else Path(str(files("endor") / "assets" / DEFAULT_TEXT))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConvertError(f"cannot read the calibration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConvertError(
            f"the calibration file {path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    parts = _json_texts(text, path) if path.suffix in (".jsonl", ".json") else text.split("\n\n")
    documents = [part.strip("\n") for part in parts if part.strip()]
    if not documents:
        raise ConvertError(f"the calibration file {path} has no text")
    return documents


def _json_texts(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConvertError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ConvertError(f'{path}, line {number}: expected an object with a string "text"')
        yield row["text"]


def sample_sequences(
    documents: list[str], tokenize: Tokenize, *, samples: int, sequence_length: int, seed: int
) -> torch.Tensor:
    """Token sequences, int64 [sequences, length], from documents taken in random order.

    Documents are joined and cut without gaps. Too little text gives fewer sequences, with a warning, or a
    single shorter one.

    Raises ConvertError if the text gives no token.
    """
    order = random.Random(seed).sample(documents, len(documents))
    tokens: list[int] = []
    wanted = samples * sequence_length
    for document in order:
        if len(tokens) >= wanted:
            break
        tokens.extend(tokenize(document + "\n\n")["input_ids"])
    if not tokens:
        raise ConvertError("the tokenizer makes no token of the calibration text; use another --calibration")
    length = min(sequence_length, len(tokens))
    count = min(samples, len(tokens) // length)
    if count < samples or length < sequence_length:
        warnings.warn(
            f"the calibration text gives {count} sequences of {length} tokens; {samples} of "
            f"{sequence_length} were wanted",
            stacklevel=2,
        )
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)

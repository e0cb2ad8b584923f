"""What must hold before transformers loads an Endor checkpoint: nothing damaged, nothing missing.

transformers itself gives a weight that it does not find random values and a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from endor.errors import FormatError
from endor.formats.entries import TensorEntry
from endor.formats.reader import CheckpointReader

__all__ = ["preflight"]


def preflight(model: Any, directory: Path) -> dict[str, TensorEntry]:
    """Verify the checkpoint in `directory`, and that it has what `model`, a model on meta, needs.

    Every byte is read once, into memory that is freed again; the tensors that transformers maps afterwards
    share the page cache this leaves.

    Returns the entries by the name that their weight has in the model; those it does not have are left out.

    Raises:
        LoadError: a file is missing, too short or cannot be read.
        ChecksumError: a section is damaged; the message names it.
        FormatError: a header breaks a rule, or a tensor that the model needs is missing or of another shape.
    """
    # transformers calls under torch.device("meta") and with the model's dtype as the default.
    with CheckpointReader(directory) as reader, torch.device("cpu"):
        for name in reader.names():
            reader.read(name)
    homes = dict(_homes(model, reader.entries))
    _check_shapes(model, homes, directory)
    # Another class than the converted one may have tensors of its own: a new head that is to be trained.
    if type(model).__name__ in (reader.config.get("architectures") or ()):
        _check_complete(model, homes, directory)
    return homes


def _homes(model: Any, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    """Each entry that the model has, found as transformers does: with or without the base model's prefix."""
    names = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    for name, entry in entries.items():
        for candidate in (name.removeprefix(prefix), prefix + name, name):
            if candidate in names:
                yield candidate, entry
                break


def _check_shapes(model: Any, homes: Mapping[str, TensorEntry], directory: Path) -> None:
    expected = model.state_dict()
    for name, entry in homes.items():
        if entry.layout.shape != tuple(expected[name].shape):
            raise FormatError(
                f"{directory}: entry {entry.name!r}: {type(model).__name__} expects shape "
                f"{list(expected[name].shape)}, found {list(entry.layout.shape)}. config.json does not "
                "belong to these weights; convert the model again"
            )


def _check_complete(model: Any, homes: Mapping[str, TensorEntry], directory: Path) -> None:
    """Raise FormatError if the model has a tensor that is not in the checkpoint, nor tied to one that is."""
    ties = model.all_tied_weights_keys
    provided = {ties.get(name, name) for name in homes}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name in model.state_dict()
        if ties.get(name, name) not in provided and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FormatError(
            f"{directory}: the checkpoint has no {', '.join(missing[:3])}{more}, which "
            f"{type(model).__name__} needs; convert the model again"
        )

"""What a conversion is asked to do, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from endor.errors import ConvertError
from endor.formats.codecs import CODECS
from endor.pruning import Criterion, Pattern, criterion_named, parse_pattern

__all__ = ["VALUES", "CalibrationOptions", "ConvertOptions"]

VALUES = ("auto", *CODECS)
"""What `--values` takes: the smallest lossless codec per tensor, or one by name."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text a criterion sees, and where the model runs on it.

    Attributes:
        file: text or .jsonl; None is the text that ships.
        samples: number of sequences.
        sequence_length: tokens of each; shortened to what the model can take.
        seed: chooses the sequences.
        device: "auto", "cpu" or "cuda[:n]".
    """

    file: Path | None = None
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.sequence_length < 1:
            raise ConvertError(
                f"samples and sequence_length must be at least 1, found {self.samples} and "
                f"{self.sequence_length}"
            )


@dataclass(frozen=True)
class ConvertOptions:
    """A conversion's options, without the paths.

    Attributes:
        method: name of the criterion, or `none`.
        sparsity: share of the weights that go.
        pattern: `unstructured` or `N:M`.
        values: name of a codec, or `auto`. Other Linear weights than those selected, such as a head that is
            not tied, are losslessly coded whatever it says, but for `raw`.
        calibration: what a criterion that needs activations sees.
        memory: bound on resident memory in bytes; None is the largest tensor x 4 + 1 GiB.
        shard_bytes: size a shard does not exceed unless a single block does.
        include: patterns of names to prune instead of the Linear weights of the blocks.
        exclude: patterns of names not to prune.

    Raises ConvertError for values that cannot be.
    """

    method: str
    sparsity: float
    pattern: str
    values: str
    calibration: CalibrationOptions
    memory: int | None
    shard_bytes: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ConvertError(f"sparsity must be at least 0 and below 1, found {self.sparsity}")
        if self.values not in VALUES:
            raise ConvertError(f"unknown values codec {self.values!r}; use one of {', '.join(VALUES)}")
        if self.shard_bytes < 1:
            raise ConvertError(f"the shard size must be at least 1 byte, found {self.shard_bytes}")
        _ = self.criterion, self.rule

    @cached_property
    def criterion(self) -> Criterion | None:
        """What scores the weights; None if nothing is to be pruned."""
        criterion = criterion_named(self.method)
        return None if self.pattern == "unstructured" and self.sparsity == 0 else criterion

    @cached_property
    def rule(self) -> Pattern:
        """What chooses by the scores."""
        return parse_pattern(self.pattern, sparsity=self.sparsity)

    def identity(self) -> dict[str, Any]:
        """The options that decide what is written, JSON-able: what a resumed conversion must have in
        common."""
        decided: dict[str, Any] = {
            "method": self.method,
            "sparsity": self.sparsity,
            "pattern": self.pattern,
            "values": self.values,
            "shard_size": self.shard_bytes,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }
        if self.criterion is not None and self.criterion.needs_activations:
            c = self.calibration
            decided |= {
                "samples": c.samples,
                "sequence_length": c.sequence_length,
                "seed": c.seed,
                "device": c.device,
            }
        return decided

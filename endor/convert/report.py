"""What a conversion tells: progress while it runs, a report when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endor.formats.entries import Header

__all__ = ["ConvertReport", "Progress", "ProgressCallback", "summarize"]


@dataclass(frozen=True)
class Progress:
    """How far a conversion is.

    Attributes:
        stage: what is being done, for people.
        done_bytes: of the source.
        total_bytes: of the source.
        resumed_bytes: of `done_bytes`, those that an earlier run converted.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    resumed_bytes: int = 0


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class ConvertReport:
    """What a finished conversion made.

    Attributes:
        out: the checkpoint's directory.
        tensors: number of tensors stored; tied ones count once.
        pruned_tensors: number of those that were selected to be pruned and packed.
        source_bytes: of the tensors as the source has them.
        output_bytes: of the shards.
        bits_per_weight: all sections of the selected tensors, per weight. A Linear weight that is not pruned
            but losslessly coded, such as a head, does not count here; in `output_bytes` it does.
        sparsity: share of zeros among the weights of the selected tensors.
        seconds: from the first look at the source to the last write.
    """

    out: Path
    tensors: int
    pruned_tensors: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    sparsity: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `convert-model --json` prints."""
        values = asdict(self)
        del values["out"]
        return values


def summarize(
    out: Path, headers: Iterable[Header], *, selected: set[str], source_bytes: int, seconds: float
) -> ConvertReport:
    """The report on shards with these headers."""
    tensors = output = stored_bits = weights = kept = 0
    for header in headers:
        output += header.file_bytes
        tensors += len(header.entries)
        for name in selected & header.entries.keys():
            layout = header.entries[name].layout
            stored_bits += 8 * layout.nbytes
            weights += layout.geometry.numel
            kept += layout.nnz
    return ConvertReport(
        out=out,
        tensors=tensors,
        pruned_tensors=len(selected),
        source_bytes=source_bytes,
        output_bytes=output,
        bits_per_weight=stored_bits / weights if weights else 0.0,
        sparsity=1 - kept / weights if weights else 0.0,
        seconds=seconds,
    )

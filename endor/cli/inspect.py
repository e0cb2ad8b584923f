"""`endor inspect`: what a checkpoint holds, how it is stored, and how many bits a weight takes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.options import common_options, emit_json, exits_cleanly, format_size
from endor.errors import LoadError

if TYPE_CHECKING:
    from endor.formats import CheckpointReader, TensorEntry

__all__ = ["command", "inspect"]

_WIDEST = 10_000
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("name", required=False)
@common_options
@exits_cleanly
def command(*, model: Path, name: str | None, as_json: bool, quiet: bool) -> None:
    """Show what the Endor checkpoint in directory MODEL holds: sizes, sparsity, codecs, bits per weight.

    NAME is a tensor or a pattern such as 'model.layers.0.*'. Without it, tensors that differ only in numbers
    in their names share a row. Only headers are read; `endor verify` checks the contents.
    """
    from endor.formats import CheckpointReader

    with CheckpointReader(model) as checkpoint:
        entries = _select(checkpoint, name)
        if as_json:
            emit_json(_as_json(checkpoint, entries))
        else:
            _print_entries(checkpoint, entries, everything=name is None, quiet=quiet)


def _print_entries(
    checkpoint: CheckpointReader, entries: Sequence[TensorEntry], *, everything: bool, quiet: bool
) -> None:
    if not quiet or not everything:  # `--quiet` leaves the totals
        _print_table(entries, grouped=everything)
    if everything:
        click.echo(_summary(checkpoint))
    elif len(entries) == 1:
        _print_sections(checkpoint, entries[0])


def _select(checkpoint: CheckpointReader, name: str | None) -> list[TensorEntry]:
    """The entries that NAME means; all without one."""
    if name is None:
        return list(checkpoint.entries.values())
    matching = [e for e in checkpoint.entries.values() if fnmatch.fnmatchcase(e.name, name)]
    if matching:
        return matching
    try:
        return [checkpoint.entry(name)]
    except KeyError as error:
        raise LoadError(str(error.args[0])) from None


def _encoded(entries: Sequence[TensorEntry]) -> tuple[list[TensorEntry], list[TensorEntry]]:
    """The encoded entries in two parts: those with a bitmap, and those without, such as a head.

    Where none has a bitmap, nothing was pruned, and the first part is all of them.
    """
    encoded = [entry for entry in entries if not entry.layout.is_plain]
    bitmaps = [entry for entry in encoded if entry.layout.mask == "bitmap"]
    return (bitmaps, [e for e in encoded if e.layout.mask != "bitmap"]) if bitmaps else (encoded, [])


def _bits_per_weight(entries: Sequence[TensorEntry]) -> float | None:
    """Bits per weight of some entries, all their sections included; None of no weight."""
    weights = sum(entry.layout.geometry.numel for entry in entries)
    return 8 * sum(entry.layout.nbytes for entry in entries) / weights if weights else None


def _is_lossless(entries: Sequence[TensorEntry]) -> bool:
    from endor.formats import codec_named

    return all(codec_named(entry.layout.codec).lossless for entry in entries)


def _as_json(checkpoint: CheckpointReader, entries: Sequence[TensorEntry]) -> dict[str, Any]:
    from endor.formats import FORMAT_VERSION

    return {
        "format_version": FORMAT_VERSION,
        "tensors": [_tensor_json(entry) for entry in entries],
        "bits_per_weight": _bits_per_weight(_encoded(entries)[0]),
        "bytes": checkpoint.file_bytes,
        "lossless": _is_lossless(entries),
    }


def _tensor_json(entry: TensorEntry) -> dict[str, Any]:
    from endor.formats.dtypes import dtype_name

    layout = entry.layout
    return {
        "name": entry.name,
        "shape": list(layout.shape),
        "dtype": dtype_name(layout.dtype),
        "mask": layout.mask,
        "codec": layout.codec,
        "nnz": layout.nnz,
        "sparsity": layout.sparsity,
        "bytes": layout.nbytes,
        "bits_per_weight": layout.bits_per_weight,
        "aliases": list(entry.aliases),
    }


def _group(entries: Sequence[TensorEntry], *, grouped: bool) -> dict[Any, list[TensorEntry]]:
    """Entries that share a row of the table: alike in all but the numbers in their names."""
    groups: dict[Any, list[TensorEntry]] = {}
    for entry in entries:
        name = _NUMBERS.sub("*", entry.name) if grouped else entry.name
        layout = entry.layout
        groups.setdefault((name, layout.shape, layout.dtype, layout.mask, layout.codec), []).append(entry)
    return groups


def _print_table(entries: Sequence[TensorEntry], *, grouped: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", no_wrap=True)
    for heading in ("count", "shape", "dtype", "stored as", "zeros", "bits/weight", "size"):
        table.add_column(heading, justify="left" if heading == "stored as" else "right", no_wrap=True)
    for (name, *_), members in _group(entries, grouped=grouped).items():
        table.add_row(name if len(members) > 1 else members[0].name, *_cells(members))
    _print(table)


def _cells(members: Sequence[TensorEntry]) -> tuple[str, ...]:
    from endor.formats.dtypes import dtype_name

    layouts = [entry.layout for entry in members]
    first, weights = layouts[0], sum(layout.geometry.numel for layout in layouts)
    kept, size = sum(layout.nnz for layout in layouts), sum(layout.nbytes for layout in layouts)
    return (
        str(len(members)),
        " x ".join(map(str, first.shape)) or "scalar",
        dtype_name(first.dtype),
        "as it is" if first.is_plain else f"{first.mask} + {first.codec}",
        "" if first.mask == "dense" else f"{100 * (1 - kept / weights):.1f} %",
        f"{8 * size / weights:.2f}" if weights else "",
        format_size(size),
    )


def _print_sections(checkpoint: CheckpointReader, entry: TensorEntry) -> None:
    from rich.table import Table

    from endor.formats.dtypes import dtype_name

    home = checkpoint.home(entry.name)
    click.echo(f"\n{home.file.name}, block {home.block.name}")
    table = Table(box=None, pad_edge=False)
    for heading in ("section", "dtype", "shape", "from byte", "to byte", "xxh3-64"):
        table.add_column(
            heading, justify="left" if heading in {"section", "dtype"} else "right", no_wrap=True
        )
    payload_begin = home.offset - home.block.begin
    for spec, section in zip(entry.layout.sections, entry.sections, strict=True):
        shape = " x ".join(map(str, spec.shape)) or "scalar"
        span = (str(payload_begin + section.begin), str(payload_begin + section.end))
        table.add_row(spec.name, dtype_name(spec.dtype), shape, *span, f"{section.checksum:016x}")
    _print(table)
    if entry.aliases:
        click.echo(f"also called {', '.join(entry.aliases)}")


def _summary(checkpoint: CheckpointReader) -> str:
    """The last lines: totals of the whole checkpoint."""
    entries = list(checkpoint.entries.values())
    files = len({home.file for home in checkpoint.blocks})
    dense_bytes = sum(entry.layout.dense_bytes for entry in entries)
    where = f"{_count(len(checkpoint.blocks), 'block')} and {_count(files, 'file')}"
    sizes = f"{format_size(checkpoint.file_bytes)}, dense {format_size(dense_bytes)}"
    lines = ["", f"{_count(len(entries), 'tensor')} in {where}: {sizes}"]
    first, coded = _encoded(entries)
    bits = _bits_per_weight(first)
    if bits is not None:
        weights = sum(entry.layout.geometry.numel for entry in first)
        zeros = 100 * (1 - sum(entry.layout.nnz for entry in first) / weights)
        kind = _kind(first)
        lines.append(f"{len(first)} encoded: {bits:.3f} bits per weight, {zeros:.1f} % zeros, {kind}")
    if coded:
        bits = _bits_per_weight(coded)
        lines.append(f"{len(coded)} more without a bitmap: {bits:.3f} bits per weight, {_kind(coded)}")
    return "\n".join(lines)


def _kind(entries: Sequence[TensorEntry]) -> str:
    return "lossless: the weights come back bit for bit" if _is_lossless(entries) else "lossy"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _print(table: Any) -> None:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False, highlight=False, emoji=False)  # a name may look like markup
    console.width = _WIDEST  # a name that is broken in two can be neither read nor copied
    console.width = max(1, Measurement.get(console, console.options, table).maximum)
    console.print(table)


inspect = command

"""`endor plan`: where a model's blocks would be and how fast it could run, before its weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.options import SIZE, common_options, emit_json, exits_cleanly, format_size, say

if TYPE_CHECKING:
    from endor.runtime.planner import Demand

__all__ = ["command"]


class _Rate(click.ParamType[int]):
    """Bytes per second: `2GB/s`, or the same without `/s`."""

    name = "size/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        rate = SIZE.convert(re.sub(r"\s*/\s*s$", "", str(value)), param, ctx)
        return rate if rate > 0 else self.fail(f"{value!r} is not more than 0 bytes per second", param, ctx)


_RATE = _Rate()


@click.command("plan", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--host-memory",
    type=SIZE,
    help="Bytes of compressed weights to keep in memory, e.g. 8GiB; 0 streams all.  "
    "[default: what fits in 70 % of free memory]",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Blocks read ahead of the one that runs.",
)
@click.option("--disk-bandwidth", type=_RATE, help="Of the disk, e.g. 2GB/s.  [default: measured once]")
@click.option(
    "--memory-bandwidth", type=_RATE, help="At which memory is read, e.g. 20GB/s.  [default: measured once]"
)
@common_options
@exits_cleanly
def command(
    *,
    model: Path,
    host_memory: int | None,
    depth: int,
    disk_bandwidth: int | None,
    memory_bandwidth: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say where the blocks of the Endor checkpoint in directory MODEL would be, and the tokens/s to expect.

    That is a bound, for one sequence, with reading hidden behind computing; decoding comes on top where it is
    slower than memory. `run-offloaded --stats` says what really happens.
    """
    from endor.runtime.planner import demand_of, predict

    disk, memory = _bandwidths(model, disk_bandwidth, memory_bandwidth, quiet=quiet or as_json)
    demand = demand_of(model, host_memory=host_memory, depth=depth)
    forecast = predict(demand, disk_bytes_per_s=disk, memory_bytes_per_s=memory)
    found = {
        "placement": demand.placement.counts(),
        "bytes_per_token": {"disk": demand.disk_bytes, "host": demand.host_bytes},
        "memory": _memory(demand),
        "bandwidth": {"disk": disk, "memory": memory},
        "seconds_per_token": {"disk": forecast.disk_s, "memory": forecast.memory_s},
        "bound": forecast.bound,
        "tokens_per_second": forecast.tokens_per_s,
    }
    if as_json:
        emit_json(found)
    else:
        _print(found)


def _bandwidths(model: Path, disk: int | None, memory: int | None, *, quiet: bool) -> tuple[float, float]:
    """Those given; what is not, as it was measured on this machine."""
    if disk is not None and memory is not None:
        return disk, memory
    from endor.runtime.bandwidth import cached_bandwidths, machine_bandwidths

    found = cached_bandwidths(model)
    if found is None:
        say(f"measuring memory and the disk of {model}", quiet=quiet)
        found = machine_bandwidths(model)
    return disk or found.disk.bytes_per_s, memory or found.memory.bytes_per_s


def _memory(demand: Demand) -> dict[str, int]:
    return {
        "resident": demand.resident_bytes,
        "ring": demand.ring_bytes,
        "dense": demand.dense_bytes,
        "total": demand.memory_bytes,
    }


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(found):
        table.add_row(name, text)
    Console(highlight=False).print(table)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    blocks, moved, memory = found["placement"], found["bytes_per_token"], found["memory"]
    seconds, rates = found["seconds_per_token"], found["bandwidth"]
    return [
        ("blocks", f"{blocks['host']} in memory, {blocks['disk']} streamed from disk"),
        ("per token", f"{format_size(moved['disk'])} from disk, {format_size(moved['host'])} from memory"),
        (
            "memory",
            ", ".join(f"{name} {format_size(memory[name])}" for name in ("resident", "ring", "dense")),
        ),
        *(
            (f"{link} time", f"{seconds[link]:.3f} s per token at {rates[link] / 1e9:.2f} GB/s")
            for link in ("disk", "memory")
        ),
        ("tokens/s", f"{found['tokens_per_second']:.2f} at most, bound by {found['bound']}"),
    ]

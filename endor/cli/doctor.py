"""`endor doctor`: what this machine has and what Endor makes of it."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import endor
from endor.cli.options import common_options, emit_json, exits_cleanly, format_size, say

if TYPE_CHECKING:
    from endor.loaders import KvikioProbe
    from endor.runtime.bandwidth import Bandwidths

__all__ = ["command"]


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", type=click.Path(path_type=Path), default=Path())
@click.option("--measure", is_flag=True, help="Measure bandwidths even if they are known from before.")
@common_options
@exits_cleanly
def command(*, path: Path, measure: bool, as_json: bool, quiet: bool) -> None:
    """Say what this machine has: device, memory, kernels, readers, and the bandwidth of its links.

    The disk is the one that holds PATH, a file or a folder, by default the current one. Its largest file is
    read for a second; where none has 32 MiB, one of 256 MiB is written and deleted. Results are remembered.
    """
    found = _examine(path, measure=measure, quiet=quiet or as_json)
    if as_json:
        emit_json(found)
    else:
        _print(found)


def _examine(path: Path, *, measure: bool, quiet: bool) -> dict[str, Any]:
    from endor.loaders import available_bytes, probe_kvikio

    kvikio = probe_kvikio()
    return {
        "version": endor.__version__,
        "device": _device(),
        "memory": {"available_bytes": available_bytes()},
        "kernels": _kernels(),
        "readers": _readers(kvikio),
        "gds": {"path": kvikio.path, "reason": kvikio.reason},
        "bandwidth": _bandwidth(path, measure=measure, quiet=quiet),
    }


def _device() -> dict[str, Any]:
    """What weights are decoded and multiplied on. A GPU is named, and not used yet."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "kind": "cpu",
        "name": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "torch": torch.__version__,
    }


def _processor() -> str:
    import platform

    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _kernels() -> dict[str, str]:
    """The fastest backend here, by codec."""
    from endor.formats import CODECS
    from endor.kernels import active_backend

    return {codec: active_backend("cpu", codec=codec) for codec in CODECS}


def _readers(kvikio: KvikioProbe) -> dict[str, dict[str, Any]]:
    """What each name of `--reader` means here, and why."""
    from endor.loaders import choose_reader

    auto = choose_reader("auto")
    auto.reader.close()
    posix = "around the page cache what is not in it (O_DIRECT), through it what is"
    return {
        "auto": {"available": True, "takes": auto.reader.name, "reason": auto.reason},
        "posix": {"available": True, "reason": posix},
        "kvikio": {"available": kvikio.serves_host, "version": kvikio.version, "reason": kvikio.reason},
        "mmap": {"available": True, "reason": "through the page cache; slower than posix where measured"},
    }


def _bandwidth(path: Path, *, measure: bool, quiet: bool) -> dict[str, Any]:
    from endor.runtime.bandwidth import cached_bandwidths, machine_bandwidths

    known: Bandwidths | None = None if measure else cached_bandwidths(path)
    if known is None:
        say(f"measuring memory and the disk of {path.resolve()}", quiet=quiet)
    found = known or machine_bandwidths(path, measure=measure)
    return {"where": str(path.resolve()), "remembered": known is not None, **asdict(found)}


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
    device, memory, gds = found["device"], found["memory"]["available_bytes"], found["gds"]
    return [
        ("endor", f"{found['version']}, torch {device['torch']}"),
        ("device", f"{device['name']}, {device['threads']} threads"),
        ("GPUs", ", ".join(device["gpus"]) + " (not used yet)" if device["gpus"] else "none"),
        ("free memory", "unknown" if memory is None else format_size(memory)),
        ("kernels", ", ".join(f"{codec}: {name}" for codec, name in found["kernels"].items())),
        *((f"reader {name}", _reader_text(reader)) for name, reader in found["readers"].items()),
        ("GPUDirect path", gds["path"] if gds["path"] == "GDS" else f"{gds['path']}: {gds['reason']}"),
        *_bandwidth_rows(found["bandwidth"]),
    ]


def _reader_text(reader: dict[str, Any]) -> str:
    if "takes" in reader:
        return f"{reader['takes']}: {reader['reason']}"
    return reader["reason"] if reader["available"] else f"not available: {reader['reason']}"


def _bandwidth_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Each with when it was measured: disks drift."""
    return [
        (
            f"{link} bandwidth",
            f"{one['bytes_per_s'] / 1e9:.2f} GB/s, {one['path']}, measured {one['measured']}",
        )
        for link, one in (("disk", found["disk"]), ("memory", found["memory"]))
    ]

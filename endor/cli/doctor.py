"""`endor doctor`: what this machine has and what Endor makes of it."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import endor
from endor.cli.options import common_options, emit_json, exits_cleanly, format_size, say
from endor.errors import PlanError

if TYPE_CHECKING:
    from endor.loaders import KvikioProbe

__all__ = ["command"]


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", type=click.Path(path_type=Path), default=Path())
@click.option("--measure", is_flag=True, help="Measure bandwidths even if they are known from before.")
@common_options
@exits_cleanly
def command(*, path: Path, measure: bool, as_json: bool, quiet: bool) -> None:
    """Say what this machine has: GPUs, memory, kernels, readers, and the bandwidth of its links.

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

    gpus = _gpus()
    file = _file_at(path) if gpus else None
    kvikio = probe_kvikio(file)
    found = {
        "version": endor.__version__,
        "device": _device(gpus),
        "memory": {"available_bytes": available_bytes()},
        "kernels": _kernels("cpu"),
        "readers": _readers(kvikio, file, gpu=bool(gpus)),
        "gds": {"path": kvikio.path, "reason": kvikio.reason},
        "bandwidth": _bandwidth(path, measure=measure, gpu=bool(gpus), quiet=quiet),
    }
    return found | ({"gpu_kernels": _gpu_kernels()} if gpus else {})


def _gpus() -> list[dict[str, Any]]:
    """Those that torch can compute on; the first one is what `auto` takes."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    return [
        {
            "device": f"cuda:{i}",
            "name": torch.cuda.get_device_name(i),
            "free_bytes": free_bytes,
            "memory_bytes": memory_bytes,
        }
        for i, (free_bytes, memory_bytes) in enumerate(memory)
    ]


def _device(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """What weights are decoded and multiplied on."""
    import torch

    processor = _processor()
    return {
        "kind": "cuda" if gpus else "cpu",
        "name": gpus[0]["name"] if gpus else processor,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpus": [gpu["name"] for gpu in gpus],
        "gpu_memory": gpus,
        "torch": torch.__version__,
    }


def _file_at(path: Path) -> Path | None:
    """The largest file there: whether a GPU reads by itself depends on the file system."""
    if path.is_file():
        return path
    try:
        sizes = {file: file.stat().st_size for file in path.iterdir() if file.is_file()}
    except OSError:  # who measures the disk says so
        return None
    return max(sizes, key=sizes.__getitem__, default=None)


def _processor() -> str:
    import platform

    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _kernels(device: str) -> dict[str, str]:
    """The fastest backend there, by codec."""
    from endor.formats import CODECS
    from endor.kernels import active_backend

    return {codec: active_backend(device, codec=codec) for codec in CODECS}


def _gpu_kernels() -> dict[str, Any]:
    """The same on a GPU, and why."""
    import importlib.metadata

    found = _kernels("cuda")
    if "triton" not in found.values():
        reason = "Triton is not installed: weights are decoded by plain torch, slowly; pip install triton"
        return {"codecs": found, "reason": reason}
    try:
        reason = f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        reason = "Triton"
    return {"codecs": found, "reason": reason}


def _readers(kvikio: KvikioProbe, file: Path | None, *, gpu: bool) -> dict[str, dict[str, Any]]:
    """What each name of `--reader` means here, and why."""
    from endor.loaders import choose_reader

    auto = choose_reader("auto", device_memory=gpu, file=file)
    auto.reader.close()
    posix = "around the page cache what is not in it (O_DIRECT), through it what is"
    return {
        "auto": {"available": True, "takes": auto.reader.name, "reason": auto.reason},
        "posix": {"available": True, "reason": posix},
        "kvikio": {"available": kvikio.serves_host, "version": kvikio.version, "reason": kvikio.reason},
        "mmap": {"available": True, "reason": "through the page cache; slower than posix where measured"},
    }


def _bandwidth(path: Path, *, measure: bool, gpu: bool, quiet: bool) -> dict[str, Any]:
    import torch

    from endor.loaders import accelerator_for
    from endor.runtime.bandwidth import cached_bandwidths, machine_bandwidths

    accelerator = accelerator_for(torch.device("cuda")) if gpu else None
    known = None if measure else cached_bandwidths(path, accelerator=accelerator)
    if known is None:
        say(f"measuring memory and the disk of {path.resolve()}", quiet=quiet)
    remembered = known is not None and (known.link is not None or not gpu)
    if not remembered and accelerator is not None:
        say(f"measuring the link to {accelerator.name}", quiet=quiet)
    where = {"where": str(path.resolve()), "remembered": remembered}
    try:
        found = machine_bandwidths(path, measure=measure, accelerator=accelerator)
    except PlanError as error:  # of the link: disk and memory are known by now
        found = machine_bandwidths(path)
        return where | asdict(found) | {"link_error": str(error)}
    return where | asdict(found)


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
    gpus = [_gpu_text(gpu) for gpu in device["gpu_memory"]]
    processor = f"{device['processor']}, {device['threads']} threads"
    used = [("device", gpus[0]), ("processor", processor)] if gpus else [("device", processor)]
    return [
        ("endor", f"{found['version']}, torch {device['torch']}"),
        *used,
        ("GPUs", "; ".join(gpus) if gpus else "none"),
        ("free memory", "unknown" if memory is None else format_size(memory)),
        ("kernels", _kernels_text(found["kernels"])),
        *_gpu_kernel_rows(found.get("gpu_kernels")),
        *((f"reader {name}", _reader_text(reader)) for name, reader in found["readers"].items()),
        ("GPUDirect path", gds["path"] if gds["path"] == "GDS" else f"{gds['path']}: {gds['reason']}"),
        *_bandwidth_rows(found["bandwidth"]),
    ]


def _gpu_text(gpu: dict[str, Any]) -> str:
    free, memory = format_size(gpu["free_bytes"]), format_size(gpu["memory_bytes"])
    return f"{gpu['device']} {gpu['name']}, {memory}, {free} of them free"


def _kernels_text(kernels: dict[str, str]) -> str:
    return ", ".join(f"{codec}: {name}" for codec, name in kernels.items())


def _gpu_kernel_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [("kernels on the GPU", f"{_kernels_text(found['codecs'])}; {found['reason']}")] if found else []


def _reader_text(reader: dict[str, Any]) -> str:
    if "takes" in reader:
        return f"{reader['takes']}: {reader['reason']}"
    return reader["reason"] if reader["available"] else f"not available: {reader['reason']}"


def _bandwidth_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Each with when it was measured: disks drift."""
    names = {"disk": "disk", "memory": "memory", "link": "link to the GPU", "device": "GPU memory"}
    rows = [
        (
            f"{name} bandwidth",
            f"{one['bytes_per_s'] / 1e9:.2f} GB/s, {one['path']}, measured {one['measured']}",
        )
        for key, name in names.items()
        if (one := found[key]) is not None
    ]
    error = found.get("link_error")
    return [*rows, ("link to the GPU", f"not measured: {error}")] if error else rows

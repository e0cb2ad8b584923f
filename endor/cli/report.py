"""The table of `run-offloaded --stats`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from endor.cli.generation import Generation
from endor.cli.options import format_size
from endor.runtime import Runtime

__all__ = ["print_stats"]


_TABLE_WIDTH = 110


def print_stats(generation: Generation, runtime: Runtime) -> None:
    """Print what a generation took and moved to stderr."""
    table = Table(title="run-offloaded", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for row in (
        *_speed(generation),
        *_bytes(generation, runtime),
        *_time(generation),
        *_memory(generation, runtime),
    ):
        table.add_row(*row)
    console = Console(stderr=True)
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)


def _speed(generation: Generation) -> list[tuple[str, str, str]]:
    rest = len(generation.token_ids) - 1
    after = generation.seconds - generation.first_token_seconds
    rows = [
        ("tokens/s", f"{generation.tokens_per_second:.2f}", f"{len(generation.token_ids)} new tokens"),
        (
            "first token",
            f"{generation.first_token_seconds:.3f} s",
            f"{generation.prompt_tokens} prompt tokens",
        ),
    ]
    if rest > 0 and after > 0:
        rows.append(("tokens/s after the first", f"{rest / after:.2f}", ""))
    return rows


def _bytes(generation: Generation, runtime: Runtime) -> list[tuple[str, str, str]]:
    stats, counts = generation.stats, runtime.placement.counts()
    forwards = max(1, stats.forwards)
    rows = [
        (f"from {tier}", format_size(n), f"{format_size(n / forwards)} per forward, {counts[tier]} blocks")
        for tier, n in stats.bytes_by_tier().items()
        if n or tier != "device"
    ]
    if stats.read_s:
        rows.append(("disk rate while reading", f"{stats.disk_bytes / stats.read_s / 1e9:.2f} GB/s", ""))
    return rows


def _time(generation: Generation) -> list[tuple[str, str, str]]:
    parts = generation.stats.seconds_by_part()
    total = max(generation.seconds, 1e-9)
    other = generation.seconds - generation.stats.wall_s
    rows = [
        (name, f"{parts[name]:.3f} s", f"{100 * parts[name] / total:.0f} % of the time")
        for name in ("stall", "decode", "compute")
    ]
    rows.append(
        ("outside the model", f"{other:.3f} s", f"{100 * other / total:.0f} % of the time: sampling, text")
    )
    rows.append(("read", f"{parts['read']:.3f} s", "in the background"))
    if parts["copy"]:
        rate = (generation.stats.disk_bytes + generation.stats.host_bytes) / parts["copy"] / 1e9
        rows.append(("copy", f"{parts['copy']:.3f} s", f"to the device, in the background, {rate:.1f} GB/s"))
    return rows


def _memory(generation: Generation, runtime: Runtime) -> list[tuple[str, str, str]]:
    decoding, _, products = runtime.kernel.rstrip(")").partition(" (matmul: ")
    sizes = {"ring": runtime.ring_bytes, "resident": runtime.resident_bytes, "dense": runtime.dense_bytes}
    parts = ", ".join(f"{name} {format_size(n)}" for name, n in sizes.items())
    parts += f", scratch {format_size(runtime.scratch_bytes)}"
    own_memory = runtime.device.type != "cpu"
    pinned = f"pinned {format_size(runtime.pinned_bytes)}" if own_memory else parts
    device = (f"peak on {runtime.device}", format_size(generation.peak_device_bytes), parts)
    return [
        ("peak memory", format_size(generation.peak_host_bytes), pinned),
        *([device] if own_memory else []),
        ("reader", runtime.reader.name, runtime.reader_reason),
        ("kernel", decoding, f"products straight from packed weights: {products}" if products else ""),
    ]

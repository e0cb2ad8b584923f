"""`endor plan`: what of a model would be where, and the tokens/s to expect, before its weights are read."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.options import SIZE, common_options, depth_option, emit_json, exits_cleanly, format_size, say
from endor.errors import LoadError

if TYPE_CHECKING:
    from endor.runtime.planner import Budgets, Plan, Rates
    from endor.runtime.survey import Parts

__all__ = ["command"]

_SHARES = (0, 25, 50, 75, 100)
_GUESSED_DISK = 2e9
_GUESSED_LINK = 20e9
_GUESSED_DEVICE = 400e9
_TABLE_WIDTH = 110


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
    "[default: a table for 0 to 100 % of the model]",
)
@click.option(
    "--device-memory",
    type=SIZE,
    help="The same in the memory of a device that has its own; `run-offloaded` does not use one yet.",
)
@depth_option
@click.option("--disk-bandwidth", type=_RATE, help="Of the disk, e.g. 2GB/s.  [default: measured once]")
@click.option(
    "--memory-bandwidth",
    type=_RATE,
    help="At which compressed weights are decoded and multiplied, e.g. 8GB/s.  "
    "[default: measured on weights of the model]",
)
@common_options
@exits_cleanly
def command(
    *,
    model: Path,
    host_memory: int | None,
    device_memory: int | None,
    depth: int,
    disk_bandwidth: int | None,
    memory_bandwidth: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what of the Endor checkpoint in directory MODEL would be where, and the tokens/s to expect.

    The prediction is for one sequence, after its first token: bytes are read while others are computed with,
    and the slower of both decides. Weights are not read, but for a second's measurement of one block.
    """
    from endor.runtime.survey import survey

    parts = survey(model, dtype=None, matmul="auto")
    links = _links(model, parts, disk_bandwidth, memory_bandwidth, device_memory, quiet=quiet or as_json)
    plans = _plans(parts, links.rates, host_memory, device_memory, depth=depth)
    if as_json:
        emit_json(_to_json(model, parts, links, plans))
    elif host_memory is None:
        _print_table(plans, links)
    else:
        _print_plan(plans[0], links)


@dataclass(frozen=True)
class _Links:
    """Rates, and in words where each is from."""

    rates: Rates
    sources: dict[str, str]


@dataclass(frozen=True)
class _Planned:
    """One row: a budget and what it gives; `label` is for people."""

    label: str
    budgets: Budgets
    plan: Plan


def _plans(
    parts: Parts, rates: Rates, host_memory: int | None, device_memory: int | None, *, depth: int
) -> list[_Planned]:
    from endor.runtime.planner import Budgets, plan

    if host_memory is not None:
        wanted = {format_size(host_memory): host_memory}
    else:
        wanted = {f"{share} %": _share(parts, share) for share in _SHARES} | {"default": _default(parts)}
    budgets = {label: Budgets(n, device_memory) for label, n in wanted.items()}
    return [_Planned(label, b, plan(parts.sizes, b, rates, depth=depth)) for label, b in budgets.items()]


def _share(parts: Parts, percent: int) -> int:
    """A budget of so much of the model, or 0 where that holds no block."""
    smallest = min((block.whole.nbytes for block in parts.sizes.blocks), default=0)
    budget = parts.sizes.nbytes * percent // 100
    return budget if budget >= smallest else 0


def _default(parts: Parts) -> int:
    """What `endor.load` takes when nobody says."""
    from endor.runtime.load import default_host_bytes

    return default_host_bytes(to_come=parts.sizes.dense_bytes)


# Bandwidths: given, measured, or guessed, and said to be so.


def _links(
    model: Path, parts: Parts, disk: int | None, memory: int | None, device: int | None, *, quiet: bool
) -> _Links:
    from endor.runtime.planner import USUAL, Rates

    disk_rate, disk_source = _disk(model, disk, quiet=quiet)
    kinds: dict[str, float] = {}
    if memory is not None:
        work, work_source = float(memory), "given"
    elif device is not None:
        work, work_source = _GUESSED_DEVICE, "guessed: a common GPU; give --memory-bandwidth"
    else:
        kinds, work_source = _work(parts, quiet=quiet), "measured now on weights of this model"
        work = min(kinds.values(), default=_GUESSED_LINK)
    sources = {"disk": disk_source, "work": work_source}
    if device is None:
        return _Links(Rates(disk_rate, work, kinds=kinds, overheads=USUAL), sources)
    sources["copy"] = "guessed: PCI Express 4.0 with 16 lanes"
    rates = Rates(disk_rate, work, copy_bytes_per_s=_GUESSED_LINK, overheads=USUAL)
    return _Links(rates, sources)


def _disk(model: Path, given: int | None, *, quiet: bool) -> tuple[float, str]:
    from endor.runtime.bandwidth import cached_bandwidths, machine_bandwidths

    if given is not None:
        return float(given), "given"
    found = cached_bandwidths(model)
    if found is None:
        say(f"measuring memory and the disk of {model}", quiet=quiet)
        try:
            found = machine_bandwidths(model)
        except LoadError as error:
            return _GUESSED_DISK, f"guessed, as it cannot be measured ({error}); give --disk-bandwidth"
    return found.disk.bytes_per_s, f"measured {found.disk.measured}"


def _work(parts: Parts, *, quiet: bool) -> dict[str, float]:
    from endor.runtime.work import measure_work

    say("measuring how fast weights of this model are multiplied", quiet=quiet)
    return measure_work(parts, matmul="auto")


# What is printed.


def _to_json(model: Path, parts: Parts, links: _Links, plans: list[_Planned]) -> dict[str, Any]:
    rates = links.rates
    bandwidth: dict[str, Any] = {
        "disk": {"bytes_per_s": rates.disk_bytes_per_s, "source": links.sources["disk"]},
        "work": {
            "bytes_per_s": rates.work_bytes_per_s,
            "kinds": dict(rates.kinds),
            "source": links.sources["work"],
        },
    }
    if "copy" in links.sources:
        bandwidth["copy"] = {"bytes_per_s": rates.copy_bytes_per_s, "source": links.sources["copy"]}
    return {
        "model": str(model),
        "bytes": parts.sizes.nbytes,
        "bandwidth": bandwidth,
        "plans": [_plan_to_json(planned) for planned in plans],
    }


def _plan_to_json(planned: _Planned) -> dict[str, Any]:
    decision, timing = planned.plan.decision, planned.plan.timing
    memory = asdict(decision.memory) | {"total": decision.memory.total}
    if decision.host_memory is not None:
        memory["host"] = decision.host_memory.total
    return {
        "label": planned.label,
        "host_memory": planned.budgets.host_bytes,
        "device_memory": planned.budgets.device_bytes,
        "placement": decision.placement.counts(),
        "expert_slots": decision.expert_slots,
        "bytes_per_token": asdict(planned.plan.traffic),
        "memory": memory,
        "seconds_per_token": {
            "read": timing.read_s,
            "copy": timing.copy_s,
            "work": timing.work_s,
            "exposed": timing.exposed_s,
            "total": timing.token_s,
        },
        "bound": timing.bound,
        "tokens_per_second": timing.tokens_per_s,
    }


def _print_table(plans: list[_Planned], links: _Links) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("to keep", style="bold", no_wrap=True)
    for name in ("bytes", "blocks kept", "from disk/token", "memory", "tokens/s", "bound by"):
        table.add_column(name, justify="right", no_wrap=True)
    for planned in plans:
        decision, plan = planned.plan.decision, planned.plan
        counts = decision.placement.counts()
        table.add_row(
            planned.label,
            format_size(planned.budgets.host_bytes),
            f"{counts['device'] + counts['host']} of {sum(counts.values())}",
            format_size(plan.traffic.disk),
            format_size(decision.memory.total),
            f"{plan.timing.tokens_per_s:.2f}",
            plan.timing.bound,
        )
    _show(table)
    for name, text in _link_rows(links):
        click.echo(f"{name}: {text}")


def _print_plan(planned: _Planned, links: _Links) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in (*_plan_rows(planned.plan), *_link_rows(links)):
        table.add_row(name, text)
    _show(table)


def _show(table: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    decision, timing, moved = plan.decision, plan.timing, asdict(plan.traffic)
    counts = decision.placement.counts()
    kept = [f"{counts['device']} on the device"] if decision.host_memory else []
    rows = [
        ("blocks", ", ".join([*kept, f"{counts['host']} in memory", f"{counts['disk']} streamed from disk"])),
        ("per token", ", ".join(f"{format_size(n)} from {t}" for t, n in moved.items() if n or t == "disk")),
        ("memory", _memory_text(asdict(decision.memory), decision.memory.total)),
        (
            "seconds per token",
            f"read {timing.read_s:.4f}, "
            + (f"copy {timing.copy_s:.4f}, " if decision.host_memory else "")
            + f"decode and compute {timing.work_s:.4f}, not overlapped {timing.exposed_s:.4f}",
        ),
        ("tokens/s", f"{timing.tokens_per_s:.2f} predicted, bound by {timing.bound}"),
    ]
    if decision.host_memory:
        text = _memory_text(asdict(decision.host_memory), decision.host_memory.total)
        rows.insert(3, ("memory of the host", text))
    if decision.expert_slots:
        rows.insert(1, ("experts", f"room for {decision.expert_slots}; all are taken to be as likely"))
    return rows


def _memory_text(parts: dict[str, int], total: int) -> str:
    named = ", ".join(f"{name} {format_size(n)}" for name, n in parts.items() if n)
    return f"{format_size(total)}: {named}" if named else format_size(total)


def _link_rows(links: _Links) -> list[tuple[str, str]]:
    rates = links.rates
    work = ", ".join(f"{rate / 1e9:.2f} GB/s {kind}" for kind, rate in sorted(rates.kinds.items()))
    rows = [
        ("disk", f"{rates.disk_bytes_per_s / 1e9:.2f} GB/s, {links.sources['disk']}"),
        (
            "decode and compute",
            f"{work or f'{rates.work_bytes_per_s / 1e9:.2f} GB/s'}, {links.sources['work']}",
        ),
    ]
    if "copy" in links.sources:
        rows.append(("to the device", f"{rates.copy_bytes_per_s / 1e9:.2f} GB/s, {links.sources['copy']}"))
    return rows

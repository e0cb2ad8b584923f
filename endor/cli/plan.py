"""`endor plan`: what of a model would be where, and the tokens/s to expect, before its weights are read."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.options import (
    DEVICE,
    SIZE,
    common_options,
    depth_option,
    emit_json,
    exits_cleanly,
    format_size,
)
from endor.cli.rates import Given, Links, find_links
from endor.errors import PlanError

if TYPE_CHECKING:
    from endor.loaders import Accelerator
    from endor.runtime.planner import Budgets, Decision, Plan, Rates
    from endor.runtime.survey import Parts

__all__ = ["command"]

_SHARES = (0, 25, 50, 75, 100)
_TABLE_WIDTH = 110
_DEEPER = (2, 4)
_WORTH_IT = 1.1


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
    "--device",
    type=DEVICE,
    default="auto",
    show_default=True,
    metavar="[auto|cpu|cuda[:N]]",
    help="Where to compute; auto takes a GPU if there is one, or if --device-memory is given.",
)
@click.option(
    "--host-memory",
    type=SIZE,
    help="Bytes of compressed weights to keep in memory, e.g. 8GiB; 0 streams all.  "
    "[default: a table for 0 to 100 % of the model]",
)
@click.option(
    "--device-memory",
    type=SIZE,
    help="The same in the memory of a GPU, which need not be here.  [default: what fits on the GPU]",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=1),
    help="Tokens that a GPU's memory is to have room for, prompt included.  [default: 4096, or the model's]",
)
@depth_option
@click.option("--disk-bandwidth", type=_RATE, help="Of the disk, e.g. 2GB/s.  [default: measured once]")
@click.option(
    "--link-bandwidth",
    type=_RATE,
    help="From host memory to a GPU, e.g. 25GB/s.  [default: measured once, or guessed without a GPU]",
)
@click.option(
    "--memory-bandwidth",
    type=_RATE,
    help="At which compressed weights are decoded and multiplied, e.g. 8GB/s.  "
    "[default: measured on weights of the model; for a GPU guessed]",
)
@common_options
@exits_cleanly
def command(
    *,
    model: Path,
    device: str,
    host_memory: int | None,
    device_memory: int | None,
    context_length: int | None,
    depth: int,
    disk_bandwidth: int | None,
    link_bandwidth: int | None,
    memory_bandwidth: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what of the Endor checkpoint in directory MODEL would be where, and the tokens/s to expect.

    The prediction is for one sequence, after its first token: bytes are read while others are computed with,
    and the slower of both decides. Weights are not read, but for a second's measurement of one block.
    """
    from endor.runtime.survey import survey

    where = _target(device, device_memory)
    parts = survey(model, dtype=None, matmul="auto", own_memory=where.own_memory)
    given = Given(disk=disk_bandwidth, memory=memory_bandwidth, link=link_bandwidth)
    request = _Request(
        host_bytes=host_memory,
        device_bytes=_device_budget(where, parts, device_memory, context_length, depth=depth),
        context_tokens=parts.context_tokens(context_length) if where.own_memory else 0,
        depth=depth,
    )
    links = find_links(
        model,
        parts,
        given,
        own_memory=where.own_memory,
        accelerator=where.accelerator,
        quiet=quiet or as_json,
    )
    plans = _plans(parts, links.rates, request)
    if as_json:
        emit_json(_to_json(model, parts, plans, where=where, links=links, request=request))
    elif host_memory is None:
        _print_table(plans, links, where)
    else:
        deeper = _deeper(parts, plans[0], links.rates, request) if where.own_memory else None
        _print_plan(plans[0], links, where, deeper)


@dataclass(frozen=True)
class _Target:
    """Where to compute: on the CPU, on a GPU that is here, or on one that is not."""

    own_memory: bool
    accelerator: Accelerator | None = None

    @property
    def name(self) -> str:
        if self.accelerator is not None:
            return f"{self.accelerator.device}, {self.accelerator.name}"
        return "a GPU that is not here" if self.own_memory else "cpu"


@dataclass(frozen=True)
class _Request:
    """What to plan for; without `host_bytes` a table of some."""

    host_bytes: int | None
    device_bytes: int | None
    context_tokens: int
    depth: int


@dataclass(frozen=True)
class _Planned:
    """One row: a budget and what it gives; `label` is for people."""

    label: str
    budgets: Budgets
    plan: Plan


def _target(device: str, device_memory: int | None) -> _Target:
    """Raises PlanError for a device that is not here, if nobody says how much memory it is to keep."""
    if device == "cpu" and device_memory is not None:
        raise PlanError("--device-memory is for a device with its own memory; on the CPU give --host-memory")
    if device == "cpu":
        return _Target(own_memory=False)
    accelerator = _accelerator(device, needed=device_memory is None)
    return _Target(accelerator is not None or device_memory is not None, accelerator)


def _accelerator(device: str, *, needed: bool) -> Accelerator | None:
    """The device that is here; for `auto` None if there is none, for others as well if it is not `needed`."""
    import torch

    from endor.loaders import accelerator_for

    if device == "auto" and not torch.cuda.is_available():
        return None
    try:
        return accelerator_for(torch.device("cuda" if device == "auto" else device))
    except PlanError as error:
        if needed:
            hint = "give --device-memory to plan for a machine that has one"
            raise PlanError(f"{error}, or {hint}") from error
        return None


def _device_budget(
    where: _Target, parts: Parts, given: int | None, context_length: int | None, *, depth: int
) -> int | None:
    """As given, if a device that is here has room for that; otherwise what fits on it."""
    from endor.runtime.planner import Budgets, check_room, default_device_bytes

    if where.accelerator is None:
        return given
    tokens = parts.context_tokens(context_length)
    free = where.accelerator.free_bytes() - parts.sizes.dense_bytes
    if given is None:
        return default_device_bytes(parts.sizes, depth=depth, context_tokens=tokens, free_bytes=free)
    check_room(
        parts.sizes,
        Budgets(0, given),
        depth=depth,
        free_bytes=None,
        context_tokens=tokens,
        device_free_bytes=free,
    )
    return given


def _plans(parts: Parts, rates: Rates, request: _Request) -> list[_Planned]:
    from endor.runtime.planner import Budgets, plan

    if request.host_bytes is not None:
        wanted = {format_size(request.host_bytes): request.host_bytes}
    else:
        wanted = {f"{share} %": _share(parts, share) for share in _SHARES}
        wanted["default"] = _default(parts, request)
    budgets = {label: Budgets(n, request.device_bytes) for label, n in wanted.items()}
    tokens, depth = request.context_tokens, request.depth
    return [
        _Planned(label, b, plan(parts.sizes, b, rates, depth=depth, context_tokens=tokens))
        for label, b in budgets.items()
    ]


def _deeper(parts: Parts, planned: _Planned, rates: Rates, request: _Request) -> str | None:
    """In words: what a deeper ring would give, if that is worth it.

    With 0 nothing overlaps; with 1 the link rests where uneven blocks are worked on for long. With 2 every
    simulated model was within 1 % of what link, disk and work allow: docs/design/planner.md.
    """
    from endor.runtime.planner import plan

    now = planned.plan
    for depth in (depth for depth in _DEEPER if depth > request.depth):
        found = plan(parts.sizes, planned.budgets, rates, depth=depth, context_tokens=request.context_tokens)
        if found.timing.tokens_per_s > _WORTH_IT * now.timing.tokens_per_s:
            before, after = now.decision, found.decision
            device = after.memory.total - before.memory.total
            host = _pinned_bytes(after) - _pinned_bytes(before)
            return (
                f"--depth {depth} would give {found.timing.tokens_per_s:.2f} tokens/s and take "
                f"{format_size(device)} more of the device's memory, {format_size(host)} of the host's"
            )
    return None


def _pinned_bytes(decision: Decision) -> int:
    return decision.host_memory.total if decision.host_memory else 0


def _share(parts: Parts, percent: int) -> int:
    """A budget of so much of the model, or 0 where that holds no block."""
    smallest = min((block.whole.nbytes for block in parts.sizes.blocks), default=0)
    budget = parts.sizes.nbytes * percent // 100
    return budget if budget >= smallest else 0


def _default(parts: Parts, request: _Request) -> int:
    """What `endor.load` takes when nobody says."""
    from endor.runtime.load import default_host_bytes
    from endor.runtime.planner import default_pinned_bytes

    if request.device_bytes is None:
        return default_host_bytes(to_come=parts.sizes.dense_bytes)
    return default_pinned_bytes(
        parts.sizes, request.device_bytes, depth=request.depth, free_bytes=default_host_bytes()
    )


# What is printed.


def _to_json(
    model: Path, parts: Parts, plans: list[_Planned], *, where: _Target, links: Links, request: _Request
) -> dict[str, Any]:
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
        "device": where.name,
        "context_tokens": request.context_tokens,
        "bandwidth": bandwidth,
        "plans": [_plan_to_json(planned) for planned in plans],
    }


def _plan_to_json(planned: _Planned) -> dict[str, Any]:
    decision, timing = planned.plan.decision, planned.plan.timing
    memory = asdict(decision.memory) | {"total": decision.memory.total}
    host = decision.host_memory
    if host is not None:
        memory["host"] = host.total
    return {
        "label": planned.label,
        "host_memory": planned.budgets.host_bytes,
        "device_memory": planned.budgets.device_bytes,
        "placement": decision.placement.counts(),
        "expert_slots": decision.expert_slots,
        "host_experts": sum(decision.host_experts),
        "bytes_per_token": asdict(planned.plan.traffic),
        "memory": memory,
        "pinned_memory": None if host is None else asdict(host) | {"total": host.total},
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


def _print_table(plans: list[_Planned], links: Links, where: _Target) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("to keep", style="bold", no_wrap=True)
    rows = [_table_row(planned, own_memory=where.own_memory) for planned in plans]
    for name in rows[0]:
        table.add_column(name, justify="right", no_wrap=True)
    for planned, row in zip(plans, rows, strict=True):
        table.add_row(planned.label, *row.values())
    _show(table)
    for name, text in (*_device_rows(where), *links.rows()):
        click.echo(f"{name}: {text}")


def _table_row(planned: _Planned, *, own_memory: bool) -> dict[str, str]:
    """Cells by column."""
    plan, decision = planned.plan, planned.plan.decision
    counts, host = decision.placement.counts(), decision.host_memory
    total = sum(counts.values())
    row = {"bytes": format_size(planned.budgets.host_bytes)}
    if own_memory:
        row |= {"on device": f"{counts['device']} of {total}", "in memory": str(counts["host"])}
    else:
        row |= {"blocks kept": f"{counts['host']} of {total}"}
    row |= {"from disk/token": format_size(plan.traffic.disk)}
    if host is not None:
        row |= {"device memory": format_size(decision.memory.total), "pinned": format_size(host.total)}
    else:
        row |= {"memory": format_size(decision.memory.total)}
    return row | {"tokens/s": f"{plan.timing.tokens_per_s:.2f}", "bound by": plan.timing.bound}


def _print_plan(planned: _Planned, links: Links, where: _Target, deeper: str | None) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    hints = [("deeper ring", deeper)] if deeper else []
    for name, text in (*_device_rows(where), *_plan_rows(planned.plan), *hints, *links.rows()):
        table.add_row(name, text)
    _show(table)


def _device_rows(where: _Target) -> list[tuple[str, str]]:
    return [("device", where.name)] if where.own_memory else []


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
        (
            "memory of the device" if decision.host_memory else "memory",
            _memory_text(asdict(decision.memory), decision.memory.total),
        ),
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
        held = sum(decision.host_experts)
        room = f"room for {decision.expert_slots}" + (f" on the device, {held} in memory" if held else "")
        rows.insert(1, ("experts", f"{room}; all are taken to be as likely"))
    return rows


def _memory_text(parts: dict[str, int], total: int) -> str:
    named = ", ".join(f"{name} {format_size(n)}" for name, n in parts.items() if n)
    return f"{format_size(total)}: {named}" if named else format_size(total)

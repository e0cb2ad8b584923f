"""Whether a decision fits the memory that is free, and which one would: pure functions of sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from endor.errors import PlanError
from endor.runtime.decision import Decision, Memory, budget_used, decide, host_budget_used
from endor.runtime.sizes import Budgets, ModelSizes

__all__ = [
    "DEVICE_MARGIN_BYTES",
    "DEVICE_MARGIN_SHARE",
    "check_room",
    "default_device_bytes",
    "default_pinned_bytes",
    "device_margin",
]

DEVICE_MARGIN_BYTES: Final = 256 << 20
DEVICE_MARGIN_SHARE: Final = 0.04
"""Left free on a device, the larger of both: for cuBLAS's workspace (tens of MiB), allocations that are
rounded up to 2 MiB and more, pieces between them, and activations that the estimate misses. The CUDA context
is not in it: it is paid when one asks what is free. Chosen, not measured."""


def device_margin(free_bytes: int) -> int:
    """What is left free of `free_bytes` on a device."""
    return max(DEVICE_MARGIN_BYTES, int(DEVICE_MARGIN_SHARE * free_bytes))


def default_device_bytes(sizes: ModelSizes, *, depth: int, context_tokens: int, free_bytes: int) -> int:
    """The largest budget for weights on a device with which everything that has to be there fits.

    That is ring, scratch, embeddings, keys and values of the context, activations and a margin. It fits
    whatever the host's budget is.

    Args:
        depth: units that are read ahead.
        context_tokens: to have room for.
        free_bytes: on the device, once what is dense in any case is there.

    Raises PlanError if not even 0 fits: what is needed at least, and which depth or context would do.
    """

    hosts = _extreme_hosts(sizes)

    def decided(device_bytes: int) -> Decision:
        return _largest(sizes, hosts, device_bytes, depth=depth, context_tokens=context_tokens)

    room = free_bytes - device_margin(free_bytes) + sizes.dense_bytes
    fits = _fitting(
        sizes,
        _everything(sizes),
        decided,
        needed=lambda decision: decision.memory.total - room,
        used=lambda decision, budget: budget_used(sizes, decision, budget),
    )
    if fits is None:
        needed = _device_text(sizes, decided(0).memory, context_tokens, free_bytes)
        advice = _device_advice(
            sizes, hosts, depth=depth, context_tokens=context_tokens, free_bytes=free_bytes
        )
        raise PlanError(f"{needed}; {advice}")
    return fits


def default_pinned_bytes(sizes: ModelSizes, device_bytes: int, *, depth: int, free_bytes: int) -> int:
    """The largest budget for blocks and experts in pinned host memory beside which what is read from disk has
    room.

    Args:
        device_bytes: the device's budget.
        depth: units that are read ahead.
        free_bytes: of host memory, that all of this may take.

    Gives 0 if nothing fits: `check_room` says so where it matters.
    """
    budgets = Budgets(_everything(sizes), device_bytes)
    return _fitting_host(sizes, budgets, depth=depth, free_bytes=free_bytes) or 0


def check_room(
    sizes: ModelSizes,
    budgets: Budgets,
    *,
    depth: int,
    free_bytes: int | None,
    context_tokens: int = 0,
    device_free_bytes: int | None = None,
) -> None:
    """Refuse budgets whose plan needs more memory than is free.

    Args:
        depth: units that are read ahead.
        free_bytes: in host memory, once what is dense in any case is there; None if nobody knows.
        context_tokens: that a device has to have room for.
        device_free_bytes: the same on the device.

    Raises PlanError, which names the parts, and says which budget would fit or what is needed at least.
    """
    decision = decide(sizes, budgets, depth=depth, context_tokens=context_tokens)
    if decision.host_memory is None:
        _check_cpu(sizes, budgets, decision, depth=depth, free_bytes=free_bytes)
        return
    if device_free_bytes is not None:
        _check_device(
            sizes, budgets, decision, depth=depth, context_tokens=context_tokens, free_bytes=device_free_bytes
        )
    if free_bytes is not None:
        _check_pinned(sizes, budgets, decision.host_memory, depth=depth, free_bytes=free_bytes)


def _check_cpu(
    sizes: ModelSizes, budgets: Budgets, decision: Decision, *, depth: int, free_bytes: int | None
) -> None:
    memory = decision.memory
    needed = memory.total - sizes.dense_bytes
    if free_bytes is None or needed <= free_bytes:
        return
    fits = _fitting(
        sizes,
        budgets.host_bytes,
        lambda host_bytes: decide(sizes, Budgets(host_bytes), depth=depth),
        needed=lambda decision: decision.memory.total - sizes.dense_bytes - free_bytes,
        used=lambda decision, budget: budget_used(sizes, decision, budget),
    )
    least = decide(sizes, Budgets(0), depth=0).memory.total - sizes.dense_bytes
    advice = (
        f"at least {least} bytes are needed, with host_memory=0 and depth=0"
        if fits is None
        else f"host_memory={fits} would fit"
    )
    raise PlanError(
        f"{needed} bytes of memory are needed, {free_bytes} are free: ring {memory.ring}, resident "
        f"{memory.resident}, experts {memory.experts}, scratch {memory.scratch}, embeddings "
        f"{memory.dense - sizes.dense_bytes}; {advice}"
    )


def _check_device(
    sizes: ModelSizes,
    budgets: Budgets,
    decision: Decision,
    *,
    depth: int,
    context_tokens: int,
    free_bytes: int,
) -> None:
    """The device's own memory, with the margin."""
    room = free_bytes - device_margin(free_bytes) + sizes.dense_bytes
    if decision.memory.total <= room:
        return
    fits = _fitting(
        sizes,
        budgets.device_bytes or 0,
        lambda n: decide(sizes, Budgets(budgets.host_bytes, n), depth=depth, context_tokens=context_tokens),
        needed=lambda decision: decision.memory.total - room,
        used=lambda decision, budget: budget_used(sizes, decision, budget),
    )
    advice = (
        _device_advice(
            sizes,
            [budgets.host_bytes],
            depth=depth,
            context_tokens=context_tokens,
            free_bytes=free_bytes,
        )
        if fits is None
        else f"device_memory={fits} would fit; a shorter context_length or a smaller depth leaves more room"
    )
    raise PlanError(f"{_device_text(sizes, decision.memory, context_tokens, free_bytes)}; {advice}")


def _check_pinned(
    sizes: ModelSizes, budgets: Budgets, pinned: Memory, *, depth: int, free_bytes: int
) -> None:
    """The host's memory, if weights are used on a device."""
    if pinned.total <= free_bytes:
        return
    fits = _fitting_host(sizes, budgets, depth=depth, free_bytes=free_bytes)
    least = _host_total(decide(sizes, replace(budgets, host_bytes=0), depth=0))
    advice = (
        f"at least {least} bytes are needed, with host_memory=0 and depth=0; more device_memory, if there is"
        " any, leaves less to stream"
        if fits is None
        else f"host_memory={fits} would fit; a smaller depth leaves more room"
    )
    raise PlanError(
        f"{pinned.total} bytes of pinned host memory are needed, {free_bytes} are free: ring of the disk "
        f"{pinned.ring}, resident {pinned.resident}, experts {pinned.experts}; {advice}"
    )


def _fitting_host(sizes: ModelSizes, budgets: Budgets, *, depth: int, free_bytes: int) -> int | None:
    """The largest budget of the host, from this one down, that fits beside a device's; None if none does."""
    return _fitting(
        sizes,
        budgets.host_bytes,
        lambda host_bytes: decide(sizes, replace(budgets, host_bytes=host_bytes), depth=depth),
        needed=lambda decision: _host_total(decision) - free_bytes,
        used=lambda decision, _: host_budget_used(sizes, decision),
    )


def _host_total(decision: Decision) -> int:
    return decision.host_memory.total if decision.host_memory else 0


def _device_text(sizes: ModelSizes, memory: Memory, context_tokens: int, free_bytes: int) -> str:
    """What is needed and free, by part."""
    margin = device_margin(free_bytes)
    needed = memory.total - sizes.dense_bytes + margin
    return (
        f"{needed} bytes of device memory are needed, {free_bytes} are free: ring {memory.ring}, resident "
        f"{memory.resident}, experts {memory.experts}, scratch {memory.scratch}, embeddings "
        f"{memory.dense - sizes.dense_bytes}, cache {memory.cache} and activations {memory.activations} for "
        f"{context_tokens} tokens, margin {margin}"
    )


def _device_advice(
    sizes: ModelSizes, hosts: Sequence[int], *, depth: int, context_tokens: int, free_bytes: int
) -> str:
    """With no weights resident: what would fit, or what is needed at least."""
    beside = device_margin(free_bytes) - sizes.dense_bytes

    def needed(depth: int, tokens: int) -> int:
        return _largest(sizes, hosts, 0, depth=depth, context_tokens=tokens).memory.total + beside

    def longest(depth: int) -> int | None:
        """Context that fits at most, up to the one asked for; None if not even a token's does."""
        per_token = sizes.cache_bytes_per_token + sizes.activation_bytes_per_token
        left = free_bytes - needed(depth, 0)
        fits = min(context_tokens, left // per_token) if per_token else context_tokens
        return fits if left >= 0 and fits >= min(1, context_tokens) else None

    fitting = [(d, tokens) for d in dict.fromkeys((depth, 0)) if (tokens := longest(d)) is not None]
    ways = [_way(d, tokens, depth, context_tokens) for d, tokens in fitting]
    least = f"at least {needed(0, min(1, context_tokens))} bytes are needed, with device_memory=0, depth=0"
    least += " and context_length=1" if context_tokens else ""
    return f"{least}; with device_memory=0, {' or '.join(ways)} would fit" if ways else least


def _way(depth: int, tokens: int, asked_depth: int, asked_tokens: int) -> str:
    parts = [f"depth={depth}"] if depth != asked_depth else []
    parts += [f"context_length={tokens}"] if tokens != asked_tokens else []
    return " with ".join(parts) or f"depth={depth} with context_length={tokens}"


def _extreme_hosts(sizes: ModelSizes) -> tuple[int, ...]:
    """Budgets of the host with which the device needs least and most: a head there is copied whole."""
    return (0, _everything(sizes)) if any(block.tiles for block in sizes.blocks) else (0,)


def _largest(
    sizes: ModelSizes, hosts: Iterable[int], device_bytes: int, *, depth: int, context_tokens: int
) -> Decision:
    """The decision by which the device needs most, of those with one of these budgets of the host."""
    found = (
        decide(sizes, Budgets(host, device_bytes), depth=depth, context_tokens=context_tokens)
        for host in hosts
    )
    return max(found, key=lambda decision: decision.memory.total)


def _everything(sizes: ModelSizes) -> int:
    """A budget that holds whatever can stay."""
    slot_bytes = max((layer.expert.span_bytes for layer in sizes.experts), default=0)
    slots = sum(layer.count for layer in sizes.experts)
    tables = sum(table.nbytes for table in sizes.tables)
    return sum(block.whole.nbytes for block in sizes.blocks) + tables + slots * slot_bytes


def _fitting(
    sizes: ModelSizes,
    budget: int,
    decided: Callable[[int], Decision],
    *,
    needed: Callable[[Decision], int],
    used: Callable[[Decision, int], int],
) -> int | None:
    """The largest budget found, from `budget` down, whose plan fits; None if not even 0 does.

    Args:
        decided: by a budget.
        needed: bytes beyond those that are free.
        used: bytes of the budget that the decision fills; what is over has to come off these.
    """
    smallest = min((block.whole.nbytes for block in sizes.blocks), default=0)
    while True:
        decision = decided(budget)
        over = needed(decision)
        if over <= 0:
            return budget
        if budget == 0:
            return None
        budget = used(decision, budget) - over
        budget = budget if budget >= max(1, smallest) else 0

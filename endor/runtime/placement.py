"""Which blocks stay in memory and which are streamed: a pure function of sizes and budgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from endor.errors import PlanError
from endor.runtime.overlap import Step, overlap

__all__ = ["Placement", "plan_placement", "plan_tiers", "spread"]

_OUTLIER: Final = 1.5
"""Times the usual block: such a one (a head) is tried resident first, and streamed first."""
_PHASES: Final = (0.0, 0.25, 0.5, 0.75)
_DISKS: Final = (0.75, 1.0, 1.5)
_WORK_PER_COPY: Final = 0.1
"""Of the same bytes on a device: its memory is some ten times as fast as the link."""


@dataclass(frozen=True)
class Placement:
    """Indices of blocks by tier; together they are 0 to n - 1, each in rising order.

    On a CPU, which uses blocks where they are in host memory, none is on the device.
    """

    host: tuple[int, ...]
    disk: tuple[int, ...]
    device: tuple[int, ...] = ()

    def counts(self) -> dict[str, int]:
        """Number of blocks per tier."""
        return {"device": len(self.device), "host": len(self.host), "disk": len(self.disk)}


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers below `total`, as evenly apart as they can be: reads then have time between
    uses."""
    return tuple(i for i in range(total) if (i + 1) * count // total > i * count // total)


def plan_placement(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    host_bytes: int,
    pieces: Sequence[Sequence[int]] | None = None,
    depth: int = 2,
) -> Placement:
    """Keep as many bytes in host memory as fit, in blocks that leave the disk no time to rest.

    Of some sets of blocks that fill the budget, the one is taken with which passes are shortest where the
    disk is about as fast as the work: with a disk much slower or faster it matters little which blocks stay.
    So the placement depends on sizes alone, not on what somebody measured.

    Args:
        names: of the blocks, in execution order, for messages.
        sizes: compressed bytes of each block.
        host_bytes: budget for resident compressed blocks; 0 streams every block.
        pieces: the sizes in which each block is read if it is streamed; by default in one.
        depth: units that are read ahead.

    Raises:
        PlanError: the budget is neither 0 nor enough for one block; the message says how much is.
    """
    if not sizes:
        return Placement((), ())
    _check_budget(names, sizes, host_bytes)
    if sum(sizes) <= host_bytes:
        return Placement(tuple(range(len(sizes))), ())
    pieces = [(size,) for size in sizes] if pieces is None else pieces
    # With the middle one a disk reads what the budget leaves in the time that the work on everything takes.
    slowness = [factor * sum(sizes) / (sum(sizes) - host_bytes) for factor in _DISKS]
    host = min(_filling(sizes, host_bytes), key=lambda c: _passes_s(sizes, pieces, c, slowness, depth=depth))
    return Placement(host, tuple(i for i in range(len(sizes)) if i not in host))


def plan_tiers(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    device_bytes: int,
    host_bytes: int,
    pieces: Sequence[Sequence[int]] | None = None,
    depth: int = 2,
) -> Placement:
    """The same for a device with its own memory: blocks there, in host memory, and on disk.

    The device's are chosen first, so that the link has no time to rest. Of the others those are read from
    disk with which passes are shortest where the disk takes about as long as the link.

    Args:
        names: of the blocks, in execution order, for messages.
        sizes: compressed bytes of each block.
        device_bytes: budget for blocks that stay on the device.
        host_bytes: budget for blocks that stay in host memory and are copied; one that holds no block which
            the device leaves is as good as 0, if it holds any at all.
        pieces: the sizes in which each block is read if it is on disk; by default in one.
        depth: units that are read and copied ahead.

    Raises:
        PlanError: a budget is neither 0 nor enough for one block; the message says how much is.
    """
    if not sizes:
        return Placement((), ())
    _check_budget(names, sizes, host_bytes)
    device = plan_placement(names, sizes, host_bytes=device_bytes, pieces=pieces, depth=depth).host
    rest = [i for i in range(len(sizes)) if i not in device]
    host = _host_tier(sizes, rest, host_bytes, pieces or [(size,) for size in sizes], depth=depth)
    return Placement(host, tuple(i for i in rest if i not in host), device)


def _host_tier(
    sizes: Sequence[int],
    rest: Sequence[int],
    budget: int,
    pieces: Sequence[Sequence[int]],
    *,
    depth: int,
) -> tuple[int, ...]:
    """Of the blocks that are not on the device, those that are in host memory."""
    streamed = [sizes[i] for i in rest]
    if sum(streamed) <= budget:
        return tuple(rest)
    candidates = [tuple(rest[n] for n in chosen) for chosen in _filling(streamed, budget)]
    return min(candidates, key=lambda host: _tier_passes_s(sizes, rest, host, pieces, depth=depth))


def _tier_passes_s(
    sizes: Sequence[int],
    rest: Sequence[int],
    host: Sequence[int],
    pieces: Sequence[Sequence[int]],
    *,
    depth: int,
) -> float:
    """Of a pass with each disk, if the link takes a second."""
    streamed, resident = {*rest}, {*host}
    copied = sum(sizes[i] for i in rest)
    read = copied - sum(sizes[i] for i in host)
    passes_s = 0.0
    for factor in _DISKS:
        steps = [
            Step(
                work_s=_WORK_PER_COPY * piece / copied,
                read_s=factor * piece / read if i in streamed and i not in resident else 0.0,
                copy_s=piece / copied if i in streamed else 0.0,
            )
            for i, size in enumerate(sizes)
            for piece in (pieces[i] if i in streamed and i not in resident else (size,))
        ]
        passes_s += overlap(steps, depth=depth).pass_s
    return round(passes_s, 9)


def _filling(sizes: Sequence[int], budget: int) -> dict[tuple[int, ...], None]:
    """Sets of blocks that fill the budget, each once, in the order of preference where they are as good."""
    return dict.fromkeys(_filled(chosen, sizes, budget) for chosen in _candidates(sizes, budget))


def _check_budget(names: Sequence[str], sizes: Sequence[int], budget: int) -> None:
    smallest = min(range(len(sizes)), key=sizes.__getitem__)
    if budget < 0 or 0 < budget < sizes[smallest]:
        raise PlanError(
            f"a memory budget of {budget} bytes holds no block: the smallest, {names[smallest]!r}, "
            f"needs {sizes[smallest]} bytes. Give at least that, or 0 to stream every block; all blocks "
            f"together need {sum(sizes)} bytes"
        )


def _candidates(sizes: Sequence[int], budget: int) -> Iterator[tuple[int, ...]]:
    """Sets of blocks that fit: evenly apart by number and by bytes, with and without the outliers."""
    usual = median(sizes)
    outliers = [i for i in range(len(sizes)) if sizes[i] > _OUTLIER * usual]
    others = [i for i in range(len(sizes)) if i not in outliers]
    yield from _spread_over(range(len(sizes)), sizes, budget)
    if outliers and others:
        yield from _spread_over(others, sizes, budget)
        kept = [i for n, i in enumerate(outliers) if sum(sizes[j] for j in outliers[: n + 1]) <= budget]
        left = budget - sum(sizes[i] for i in kept)
        yield from ((*kept, *chosen) for chosen in _spread_over(others, sizes, left))


def _spread_over(among: Sequence[int], sizes: Sequence[int], budget: int) -> Iterator[tuple[int, ...]]:
    for count in range(len(among), -1, -1):
        chosen = tuple(among[i] for i in spread(count, len(among)))
        if sum(sizes[i] for i in chosen) <= budget:
            yield chosen
            break
    yield from (_even_by_bytes(among, sizes, budget, phase=phase) for phase in _PHASES)


def _even_by_bytes(
    among: Sequence[int], sizes: Sequence[int], budget: int, *, phase: float
) -> tuple[int, ...]:
    """Blocks of which at any point as many bytes are chosen as the budget's share of those passed so far."""
    share = budget / max(1, sum(sizes[i] for i in among))
    chosen: list[int] = []
    passed = used = 0
    for i in among:
        passed += sizes[i]
        if used + sizes[i] <= min(budget, share * passed + phase * sizes[i]):
            chosen.append(i)
            used += sizes[i]
    return tuple(chosen)


def _filled(chosen: Sequence[int], sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """The blocks chosen, and the largest others for which there is still room."""
    kept = set(chosen)
    left = budget - sum(sizes[i] for i in kept)
    for i in sorted(set(range(len(sizes))) - kept, key=lambda i: (-sizes[i], i)):
        if sizes[i] <= left:
            kept.add(i)
            left -= sizes[i]
    return tuple(sorted(kept))


def _passes_s(
    sizes: Sequence[int],
    pieces: Sequence[Sequence[int]],
    host: Sequence[int],
    slowness: Iterable[float],
    *,
    depth: int,
) -> float:
    """Of a pass with each disk, if all work takes a second and reading a byte `slowness` times its work."""
    resident, total = set(host), sum(sizes)
    passes_s = 0.0
    for slow in slowness:
        steps = [
            Step(work_s=piece / total, read_s=0.0 if i in resident else piece / total * slow)
            for i, size in enumerate(sizes)
            for piece in ((size,) if i in resident else pieces[i])
        ]
        passes_s += overlap(steps, depth=depth).pass_s
    return round(passes_s, 9)  # what differs by less is equal: the first is taken

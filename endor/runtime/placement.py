"""Which blocks stay in host memory and which are streamed: a pure function of sizes and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from endor.errors import PlanError

__all__ = ["Placement", "plan_placement", "spread"]


@dataclass(frozen=True)
class Placement:
    """Indices of blocks by tier; together they are 0 to n - 1, each in rising order."""

    host: tuple[int, ...]
    disk: tuple[int, ...]

    def counts(self) -> dict[str, int]:
        """Number of blocks per tier."""
        return {"device": 0, "host": len(self.host), "disk": len(self.disk)}


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers below `total`, as evenly apart as they can be: reads then have time between
    uses."""
    return tuple(i for i in range(total) if (i + 1) * count // total > i * count // total)


def plan_placement(names: Sequence[str], sizes: Sequence[int], *, host_bytes: int) -> Placement:
    """Keep as many blocks in host memory as fit, spread between those that are streamed.

    Args:
        names: of the blocks, in execution order, for messages.
        sizes: compressed bytes of each block.
        host_bytes: budget for resident compressed blocks; 0 streams every block.

    Raises:
        PlanError: the budget is neither 0 nor enough for one block; the message says how much is.
    """
    if not sizes:
        return Placement((), ())
    smallest = min(range(len(sizes)), key=sizes.__getitem__)
    if host_bytes < 0 or 0 < host_bytes < sizes[smallest]:
        raise PlanError(
            f"a host memory budget of {host_bytes} bytes holds no block: the smallest, {names[smallest]!r}, "
            f"needs {sizes[smallest]} bytes. Give at least that, or 0 to stream every block"
        )
    host = _largest_spread(sizes, host_bytes)
    left = host_bytes - sum(sizes[i] for i in host)
    for i in sorted(set(range(len(sizes))) - set(host), key=lambda i: -sizes[i]):
        if sizes[i] <= left:
            host.append(i)
            left -= sizes[i]
    chosen = set(host)
    return Placement(tuple(sorted(chosen)), tuple(i for i in range(len(sizes)) if i not in chosen))


def _largest_spread(sizes: Sequence[int], budget: int) -> list[int]:
    for count in range(len(sizes), 0, -1):
        chosen = spread(count, len(sizes))
        if sum(sizes[i] for i in chosen) <= budget:
            return list(chosen)
    return []

"""How long a pass over a model takes when reading, copying and computing overlap in a ring: by simulation.

A unit is read when its turn on the disk comes and the unit `depth + 1` before it has left the ring; then it
is used. On a device with memory of its own it is copied to a slot of that ring first, from host memory: from
where it stays, or from a ring there, into which `depth` units from disk are read ahead whatever the slots do.
Units that stay where they are used only take their work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from endor.errors import PlanError

__all__ = ["Overlap", "Step", "overlap"]

_WARM_UP: Final = 4
_MEASURED: Final = 4
"""Passes: the first ones start with an empty ring; the rest repeat, alone or in pairs."""
_COPYING: Final = 2
"""Units from disk that may still be copied to a device while `depth` others are read (`DiskFeed`)."""


@dataclass(frozen=True)
class Step:
    """What one part of the model needs in each pass; without `read_s` and `copy_s` it is where it is used."""

    work_s: float
    read_s: float = 0.0
    copy_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.work_s, self.read_s, self.copy_s) < 0:
            raise PlanError(f"a step takes 0 seconds or more, found {self}")

    @property
    def is_streamed(self) -> bool:
        return self.read_s > 0 or self.copy_s > 0


@dataclass(frozen=True)
class Overlap:
    """One pass of many: how long it takes, and what of that is waiting for bytes, or a disk that rests."""

    pass_s: float
    stall_s: float
    disk_idle_s: float


def overlap(steps: Sequence[Step], *, depth: int) -> Overlap:
    """Simulate passes over `steps`, in order and again and again, with `depth` units read ahead."""
    streamed = sum(step.is_streamed for step in steps)
    ring = _Ring(min(depth, streamed))
    began_s = 0.0
    for number in range(_WARM_UP + _MEASURED):
        if number == _WARM_UP:
            began_s = ring.now_s
        for step in steps:
            ring.run(step)
    pass_s = (ring.now_s - began_s) / _MEASURED
    work_s, read_s = sum(step.work_s for step in steps), sum(step.read_s for step in steps)
    return Overlap(pass_s, max(0.0, pass_s - work_s), max(0.0, pass_s - read_s))


class _Ring:
    def __init__(self, depth: int) -> None:
        self.now_s = 0.0
        self._depth = depth
        self._disk_free_s = 0.0
        self._link_free_s = 0.0
        self._released_s: list[float] = []
        self._copied_s: list[float] = []

    def run(self, step: Step) -> None:
        """Wait for the step's bytes, if it has to, and do its work."""
        if not step.is_streamed:
            self.now_s += step.work_s
            return
        here_s = self._copy(step) if step.copy_s else self._read(step, self._slot_free_s())
        self.now_s = max(self.now_s, here_s) + step.work_s
        self._released_s.append(self.now_s)

    def _read(self, step: Step, room_s: float) -> float:
        """When it has been read, to memory that is free from `room_s` on."""
        self._disk_free_s = max(self._disk_free_s, room_s) + step.read_s
        return self._disk_free_s

    def _copy(self, step: Step) -> float:
        """When it is on the device. What is read for that goes to host memory, which has room of its own."""
        read_s = self._read(step, self._host_free_s()) if step.read_s else 0.0
        self._link_free_s = max(self._link_free_s, read_s, self._slot_free_s()) + step.copy_s
        if step.read_s:
            self._copied_s.append(self._link_free_s)
        return self._link_free_s

    def _slot_free_s(self) -> float:
        """When there is room for the next unit where it is used; with nothing read ahead, when it is asked
        for."""
        return _freed_s(self._released_s, self._depth + 1) if self._depth else self.now_s

    def _host_free_s(self) -> float:
        """The same in the host memory in front of a device."""
        return _freed_s(self._copied_s, self._depth + _COPYING) if self._depth else self.now_s


def _freed_s(ends_s: Sequence[float], room: int) -> float:
    """When a ring with room for so many has room again, of which so many have been given back."""
    return ends_s[-room] if len(ends_s) >= room else 0.0

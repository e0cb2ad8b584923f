"""What a run moved and where its time went, per token and in total."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from endor.loaders import Accelerator, Copied, Event
from endor.runtime.device_times import DeviceTimes
from endor.runtime.trace import Trace

__all__ = ["KEPT_FORWARDS", "RunStats", "StatsRecorder", "anonymous_bytes"]

KEPT_FORWARDS = 4096
"""Forwards whose own record is kept: a server that runs for months must not fill its memory with them."""


@dataclass(frozen=True)
class RunStats:
    """Totals over some forwards; subtract two for what lies between them.

    `read_s` and `copy_s` (to a device with its own memory) run in the background, beside the others; decode,
    compute and stall add up to the wall time. On a device they are its time, not that of the thread in front.
    """

    forwards: int = 0
    wall_s: float = 0.0
    read_s: float = 0.0
    copy_s: float = 0.0
    decode_s: float = 0.0
    stall_s: float = 0.0
    disk_bytes: int = 0
    host_bytes: int = 0
    device_bytes: int = 0

    @property
    def compute_s(self) -> float:
        """Wall time that is neither decode nor stall."""
        return max(0.0, self.wall_s - self.decode_s - self.stall_s)

    def __sub__(self, earlier: RunStats) -> RunStats:
        return RunStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def bytes_by_tier(self) -> dict[str, int]:
        """Compressed bytes used from each tier."""
        return {"disk": self.disk_bytes, "host": self.host_bytes, "device": self.device_bytes}

    def seconds_by_part(self) -> dict[str, float]:
        """Seconds spent on each part of the work."""
        return {
            "read": self.read_s,
            "copy": self.copy_s,
            "decode": self.decode_s,
            "compute": self.compute_s,
            "stall": self.stall_s,
        }


class StatsRecorder:
    """Counts while a model runs; `snapshot` gives the totals. Owned by one runtime, used by one thread at a
    time.

    With an accelerator, times are those of the device, which `snapshot` waits for.

    Args:
        trace: where everything is noted as it happens.
        accelerator: that computes; None for the CPU.
    """

    def __init__(self, trace: Trace | None = None, *, accelerator: Accelerator | None = None) -> None:
        self.trace = trace
        self.forwards = 0
        self.wall_s = 0.0
        self.read_s = 0.0
        self.on_demand_read_s = 0.0
        self.copy_s = 0.0
        self.decode_s = 0.0
        self.stall_s = 0.0
        self.disk_bytes = 0
        self.host_bytes = 0
        self.device_bytes = 0
        self.peak_anonymous_bytes = 0
        self.per_forward: deque[RunStats] = deque(maxlen=KEPT_FORWARDS)
        note = self.note if trace is not None else None
        self._device = DeviceTimes(accelerator, note) if accelerator is not None else None
        self._began_s = 0.0
        self._began: Event | None = None
        self._before = RunStats()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Count the time inside as decode time."""
        with self._spent("decode", "decode"):
            yield

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the time inside as a wait for `name`."""
        with self._spent("stall", name):
            yield

    def copied(self, name: str, copied: Copied | None) -> None:
        """Count a copy to the device, which goes on beside everything else."""
        if copied is not None and self._device is not None:
            self._device.add("copy", name, copied.began, copied.ended)

    def note(self, track: str, name: str, began_s: float, ended_s: float) -> None:
        """Add an event to the trace, if there is one."""
        if self.trace is not None:
            self.trace.add(track, name, began_s, ended_s)

    def begin_forward(self) -> None:
        if self._device is None:
            self._before = self.snapshot()
            self._began_s = perf_counter()
            return
        self._before = self._totals()
        self._began = self._device.mark()

    def end_forward(self) -> None:
        """Count a forward that has begun; with one that was refused before that there is nothing to do."""
        name = f"forward {self.forwards + 1}"
        if self._device is None:
            self.forwards += 1
            ended = perf_counter()
            self.wall_s += ended - self._began_s
            self.note("forward", name, self._began_s, ended)
            self.per_forward.append(self._totals() - self._before)
        elif self._began is not None:
            self.forwards += 1
            counted = self._totals() - self._before
            end = partial(self._close_forward, counted)
            began, self._began = self._began, None
            self._device.add("forward", name, began, self._device.mark(), then=end)
            self._device.settle(wait=False)  # while the device is busy, not before it gets more to do
        self.sample_memory()

    def sample_memory(self) -> None:
        """Remember the process's anonymous memory if it is the most so far."""
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes())

    def snapshot(self) -> RunStats:
        """Totals. Waits for the device."""
        if self._device is not None:
            self._device.settle(wait=True)
        return self._totals()

    def forget_device(self) -> None:
        """Stop looking at a device that is about to lose its memory."""
        if self._device is not None:
            self._device.forget()

    @contextmanager
    def _spent(self, kind: str, name: str) -> Iterator[None]:
        if self._device is not None:
            mark = self._device.mark()
            try:
                yield
            finally:
                self._device.add(kind, name, mark, self._device.mark())
            return
        began = perf_counter()
        try:
            yield
        finally:
            ended = perf_counter()
            vars(self)[f"{kind}_s"] += ended - began
            self.note(kind, name, began, ended)

    def _close_forward(self, counted: RunStats, seconds: dict[str, float]) -> None:
        """Add up a forward that the device is done with."""
        wall_s, copy_s = seconds["forward"], seconds.get("copy", 0.0)
        decode_s, stall_s = seconds.get("decode", 0.0), seconds.get("stall", 0.0)
        self.wall_s += wall_s
        self.copy_s += copy_s
        self.decode_s += decode_s
        self.stall_s += stall_s
        self.per_forward.append(
            replace(counted, wall_s=wall_s, copy_s=copy_s, decode_s=decode_s, stall_s=stall_s)
        )

    def _totals(self) -> RunStats:
        return RunStats(
            forwards=self.forwards,
            wall_s=self.wall_s,
            read_s=self.read_s + self.on_demand_read_s,
            copy_s=self.copy_s,
            decode_s=self.decode_s,
            stall_s=self.stall_s,
            disk_bytes=self.disk_bytes,
            host_bytes=self.host_bytes,
            device_bytes=self.device_bytes,
        )


def anonymous_bytes() -> int:
    """Anonymous memory of this process now (RssAnon): what it allocated, without mapped files. 0 where
    unknown."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0

"""What a run moved and where its time went, per token and in total."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter

from endor.runtime.trace import Trace

__all__ = ["KEPT_FORWARDS", "RunStats", "StatsRecorder", "anonymous_bytes"]

KEPT_FORWARDS = 4096
"""Forwards whose own record is kept: a server that runs for months must not fill its memory with them."""


@dataclass(frozen=True)
class RunStats:
    """Totals over some forwards; subtract two for what lies between them.

    `read_s` runs in the background, beside the others; decode, compute and stall add up to the wall time.
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
        """Wall time that is neither decode, copy nor stall."""
        return max(0.0, self.wall_s - self.decode_s - self.copy_s - self.stall_s)

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

    Args:
        trace: where everything is noted as it happens.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self.forwards = 0
        self.wall_s = 0.0
        self.read_s = 0.0
        self.on_demand_read_s = 0.0
        self.decode_s = 0.0
        self.stall_s = 0.0
        self.disk_bytes = 0
        self.host_bytes = 0
        self.peak_anonymous_bytes = 0
        self.per_forward: deque[RunStats] = deque(maxlen=KEPT_FORWARDS)
        self._began_s = 0.0
        self._before = RunStats()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Count the time inside as decode time."""
        began = perf_counter()
        try:
            yield
        finally:
            ended = perf_counter()
            self.decode_s += ended - began
            self.note("decode", "decode", began, ended)

    def stalled(self, name: str, stall_s: float) -> None:
        """Count a wait for `name` that has just ended."""
        self.stall_s += stall_s
        if self.trace is not None:
            now = perf_counter()
            self.note("stall", name, now - stall_s, now)

    def note(self, track: str, name: str, began_s: float, ended_s: float) -> None:
        """Add an event to the trace, if there is one."""
        if self.trace is not None:
            self.trace.add(track, name, began_s, ended_s)

    def begin_forward(self) -> None:
        self._before = self.snapshot()
        self._began_s = perf_counter()

    def end_forward(self) -> None:
        self.forwards += 1
        ended = perf_counter()
        self.wall_s += ended - self._began_s
        self.note("forward", f"forward {self.forwards}", self._began_s, ended)
        self.per_forward.append(self.snapshot() - self._before)
        self.sample_memory()

    def sample_memory(self) -> None:
        """Remember the process's anonymous memory if it is the most so far."""
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes())

    def snapshot(self) -> RunStats:
        return RunStats(
            forwards=self.forwards,
            wall_s=self.wall_s,
            read_s=self.read_s + self.on_demand_read_s,
            decode_s=self.decode_s,
            stall_s=self.stall_s,
            disk_bytes=self.disk_bytes,
            host_bytes=self.host_bytes,
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

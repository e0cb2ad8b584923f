"""Progress of a conversion: a bar on a terminal, a line every few seconds elsewhere, nothing if asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from endor.cli.options import format_size, say

if TYPE_CHECKING:
    from endor.convert import Progress

__all__ = ["progress_display"]

_LINE_EVERY_S = 5.0

Show = Callable[["Progress"], None]


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[Show]:
    """Something to call with each Progress; writes to stderr."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines()


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield lambda p: bars.update(task, description=p.stage, completed=p.done_bytes, total=p.total_bytes)


class _Lines:
    """One line now and then, for logs."""

    def __init__(self) -> None:
        self._next = self._started = time.monotonic()
        self._stage = ""

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LINE_EVERY_S
        say(self._line(progress, now - self._started))

    def _line(self, progress: Progress, seconds: float) -> str:
        done = progress.done_bytes - progress.resumed_bytes
        line = f"{progress.stage}: {format_size(progress.done_bytes)} of {format_size(progress.total_bytes)}"
        if not done or not seconds:
            return line
        left = (progress.total_bytes - progress.done_bytes) * seconds / done
        return f"{line}, {format_size(done / seconds)}/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

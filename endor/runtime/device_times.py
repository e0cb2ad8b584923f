"""Where the time of a device goes, by events that it passes: known only after it has passed them.

The thread that runs a model is ahead of the device by as much as it likes, so what its clock says is not what
a token costs. Spans are noted as pairs of events and added up when both are done, in order.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from endor.loaders import Accelerator, Event

__all__ = ["DeviceTimes"]

_MANY: Final = 4096
Note = Callable[[str, str, float, float], None]
"""Track, name, and two values of `time.perf_counter`."""


@dataclass(frozen=True)
class _Span:
    kind: str
    name: str
    began: Event
    ended: Event
    then: Callable[[dict[str, float]], None] | None = None


class DeviceTimes:
    """Spans of one device's time. One thread adds them; any may have them added up.

    Args:
        accelerator: of the device.
        note: gets each span when it is over, in the host's time; None where nobody wants to know.
    """

    def __init__(self, accelerator: Accelerator, note: Note | None) -> None:
        self._accelerator = accelerator
        self._note = note
        self._settling = threading.RLock()
        self._open: deque[_Span] = deque()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._anchor = accelerator.mark()
        self._anchor.wait()
        self._anchor_s = perf_counter()

    def mark(self) -> Event:
        """An event behind the work of this thread so far."""
        return self._accelerator.mark()

    def add(
        self,
        kind: str,
        name: str,
        began: Event,
        ended: Event,
        *,
        then: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Note a span.

        Args:
            kind: what its seconds are added to.
            name: for a trace.
            began, ended: may be in the future.
            then: gets the seconds of each kind since the last span that had a `then`, this one's included.
        """
        self._open.append(_Span(kind, name, began, ended, then))
        if len(self._open) % _MANY == 0:  # layers are called without the model, whose forwards settle
            self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Add up the spans that are over; with `wait` all of them."""
        with self._settling:
            while self._open:
                span = self._open[0]
                if wait:
                    span.ended.wait()
                elif not span.ended.is_done:
                    return
                self._open.popleft()
                self._close(span)

    def forget(self) -> None:
        """Drop what is not over: when the device's memory goes."""
        with self._settling:
            self._open.clear()

    def _close(self, span: _Span) -> None:
        seconds = span.ended.seconds_since(span.began)
        self._seconds[span.kind] += seconds
        if self._note is not None:
            ended_s = self._anchor_s + span.ended.seconds_since(self._anchor)
            self._note(span.kind, span.name, ended_s - seconds, ended_s)
        if span.then is not None:
            collected, self._seconds = dict(self._seconds), defaultdict(float)
            span.then(collected)

"""Where the time of a device goes, by events that it passes: known only after it has passed them.

The thread that runs a model is ahead of the device by as much as it likes, so what its clock says is not what
a token costs. Spans are noted as pairs of events and added up when both are done, in order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from endor.loaders import Accelerator, Event

__all__ = ["DeviceTimes"]

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
    """Spans of one device's time.

    Args:
        accelerator: of the device.
        note: gets each span when it is over, in the host's time.
    """

    def __init__(self, accelerator: Accelerator, note: Note) -> None:
        self._accelerator = accelerator
        self._note = note
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

    def settle(self, *, wait: bool) -> None:
        """Add up the spans that are over; with `wait` all of them."""
        while self._open:
            span = self._open[0]
            if wait:
                span.ended.wait()
            elif not span.ended.is_done:
                return
            self._open.popleft()
            began_s = self._anchor_s + span.began.seconds_since(self._anchor)
            ended_s = self._anchor_s + span.ended.seconds_since(self._anchor)
            self._note(span.kind, span.name, began_s, ended_s)
            self._seconds[span.kind] += ended_s - began_s
            if span.then is not None:
                seconds, self._seconds = dict(self._seconds), defaultdict(float)
                span.then(seconds)

    def forget(self) -> None:
        """Drop what is not over: after an interrupt, or when the device's memory goes."""
        self._open.clear()

"""An accelerator without hardware, which does what it is told as late as it may, and watches for races.

Its memory is host memory. A copy is done when somebody waits for it and not before, so whoever forgot to wait
reads old bytes. And every access to a slot, or to the host memory in front of it, is compared with all
earlier ones: two of which one writes must be in an order that events, waits and the order of a stream
enforce. That is kept as vector clocks: one component for the copies, one for each thread's stream, and one
for the host. Threads of the host are one: what one of them saw done on the device has happened for all.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from endor.loaders import Buffer, Copied, Event, Reader, ReadOp, SlotBuffer, StagingBuffer

__all__ = ["CheckedAccelerator", "watch_slots"]

Clock = dict[str, int]


def _join(*clocks: Clock) -> Clock:
    joined: Clock = {}
    for clock in clocks:
        for line, at in clock.items():
            joined[line] = max(joined.get(line, 0), at)
    return joined


@dataclass
class _Access:
    """Something reads or writes addresses from `begin` on, a point in all timelines, until `end` on one."""

    start: int
    stop: int
    writes: bool
    begin: Clock
    line: str
    end: int
    what: str

    def is_before(self, other: _Access) -> bool:
        return other.begin.get(self.line, 0) >= self.end


@dataclass
class CheckedEvent:
    owner: CheckedAccelerator
    clock: Clock
    at_s: float
    copies: int
    """How many copies have to be made for it to be done."""

    @property
    def is_done(self) -> bool:
        with self.owner.lock:
            if not self.owner.late and self.owner.made >= self.copies:
                self.owner.learn(self.clock)
            return self.owner.knows(self.clock)

    def wait(self) -> None:
        with self.owner.lock:
            self.owner.waits[threading.get_ident()] += 1
            self.owner.make_copies(self.copies)
            self.owner.learn(self.clock)

    def seconds_since(self, earlier: Any) -> float:
        return self.at_s - float(earlier.at_s)


_ALIVE: weakref.WeakSet[CheckedAccelerator] = weakref.WeakSet()


@dataclass(eq=False)
class CheckedAccelerator:
    """See the module's docstring.

    Args:
        total_bytes: memory of the device.
        late: copies and work are done when somebody waits for them; otherwise at once.
    """

    total_bytes: int = 1 << 30
    late: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    name: str = "checked"
    races: list[str] = field(default_factory=list)
    copied_bytes: int = 0
    settled: int = 0
    pinned: int = 0
    made: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.waits: Counter[int] = Counter()
        """How often each thread waited for an event."""
        self._clocks: dict[str, Clock] = {}
        self._queue: deque[Callable[[], object]] = deque()
        self._queued = 0
        self._now_s = 0.0
        self._taken: list[tuple[int, torch.Tensor]] = []
        self._accesses: list[_Access] = []
        self._pinned_ranges: list[tuple[int, int]] = []
        _ALIVE.add(self)

    # As an accelerator.

    def empty(self, nbytes: int) -> torch.Tensor:
        from endor.errors import PlanError

        if nbytes > self.free_bytes():
            raise PlanError(f"{nbytes} bytes are needed, {self.free_bytes()} are free")
        memory = torch.full((nbytes + 4096,), 0xA5, dtype=torch.uint8)
        at = memory.narrow(0, -memory.data_ptr() % 4096, nbytes)
        self._taken.append((nbytes, at))
        return at

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        self.pinned += memory.numel()
        bounds = (memory.data_ptr(), memory.data_ptr() + memory.numel())
        self._pinned_ranges.append(bounds)

        def unpin() -> None:
            self.pinned -= memory.numel()
            self._pinned_ranges.remove(bounds)

        return unpin

    def has(self, memory: torch.Tensor) -> bool:
        """Whether it is the device's, or pinned for it."""
        ranges = [*self._pinned_ranges, *((t.data_ptr(), t.data_ptr() + n) for n, t in self._taken)]
        return any(start <= memory.data_ptr() < stop for start, stop in ranges)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, after: Sequence[Event]) -> Copied:
        with self.lock:
            clock = self._line("copies")
            joined = _join(clock, self._host(), *(self._clock_of(event) for event in after))
            clock.update(joined)
            began = self._event(clock)
            for target, source in pairs:
                self._access(source, writes=False, begin=joined, line="copies", what="a copy reads")
                self._access(target, writes=True, begin=joined, line="copies", what="a copy writes")
                self._queue.append(partial(target.copy_, source))
                self._queued += 1
                self.copied_bytes += target.numel()
            self._now_s += 1e-3
            clock["copies"] = clock.get("copies", 0) + 1
            if not self.late:
                self.make_copies(self._queued)
            return Copied(began, self._event(clock, copies=self._queued))

    def mark(self) -> CheckedEvent:
        with self.lock:
            work = self._work()
            work[self._work_name()] = work.get(self._work_name(), 0) + 1
            return self._event(_join(work, self._host()))

    def follow(self, event: Event) -> None:
        with self.lock:
            assert isinstance(event, CheckedEvent)
            self.make_copies(event.copies)  # the work that comes is done at once, so its copies are
            self._work().update(_join(self._work(), self._host(), event.clock))

    def settle(self) -> None:
        with self.lock:
            self.settled += 1
            self.make_copies(self._queued)
            self.learn(_join(*self._clocks.values()))

    def free_bytes(self) -> int:
        return self.total_bytes - sum(nbytes for nbytes, _ in self._taken)

    def peak_bytes(self) -> int:
        return sum(nbytes for nbytes, _ in self._taken)

    def give_back(self) -> None:
        """Forget what was taken: the runtime that had it is closed."""
        self._taken.clear()

    # Time and copies.

    def make_copies(self, count: int) -> None:
        while self.made < count:
            self._queue.popleft()()
            self.made += 1

    def learn(self, clock: Clock) -> None:
        """The host knows from now on that everything before `clock` has happened."""
        self._host().update(_join(self._host(), clock))

    def knows(self, clock: Clock) -> bool:
        """Whether the host knows that everything before `clock` has happened."""
        host = self._host()
        return all(host.get(line, 0) >= at for line, at in clock.items())

    def _line(self, name: str) -> Clock:
        return self._clocks.setdefault(name, {})

    def _host(self) -> Clock:
        return self._line("host")

    def _work_name(self) -> str:
        return f"work {threading.get_ident()}"

    def _work(self) -> Clock:
        return self._line(self._work_name())

    def _event(self, clock: Clock, *, copies: int = 0) -> CheckedEvent:
        self._now_s += 1e-6
        return CheckedEvent(self, dict(clock), self._now_s, copies)

    @staticmethod
    def _clock_of(event: Event) -> Clock:
        assert isinstance(event, CheckedEvent)
        return event.clock

    # Races.

    def uses(self, memory: torch.Tensor, begin: Clock) -> None:
        """This thread's work has read `memory` since `begin`, and does not any more."""
        with self.lock:
            work = self._work()
            work[self._work_name()] = work.get(self._work_name(), 0) + 1
            self._access(memory, writes=False, begin=begin, line=self._work_name(), what="work reads", end=0)

    def arrived(self) -> Clock:
        """From now on this thread's work may read."""
        with self.lock:
            return _join(self._work(), self._host())

    def writes(self, memory: torch.Tensor) -> None:
        """A thread, or a reader for it, writes to `memory` from now on and is done when it goes on."""
        with self.lock:
            host = self._host()
            begin = dict(host)
            host["host"] = host.get("host", 0) + 1
            self._access(memory, writes=True, begin=begin, line="host", what="a reader writes", end=0)

    def _access(
        self, memory: torch.Tensor, *, writes: bool, begin: Clock, line: str, what: str, end: int = 1
    ) -> None:
        start = memory.data_ptr()
        stamp = self._line(line).get(line, 0) + end
        new = _Access(start, start + memory.numel(), writes, dict(begin), line, stamp, what)
        for old in self._accesses:
            overlap = old.start < new.stop and new.start < old.stop
            if overlap and (old.writes or new.writes) and old.line != new.line and not old.is_before(new):
                self.races.append(f"{old.what}, and {new.what} before that is over")
        self._accesses.append(new)


@contextmanager
def watch_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tell the accelerator of each slot what readers and the model's work do with it."""
    watch = _Watch()
    for kind, names in (
        (SlotBuffer, ("__init__", "arrive", "release", "reuse", "submit")),
        (StagingBuffer, ("submit",)),
    ):
        for name in names:
            monkeypatch.setattr(kind, name, watch.around(kind, name))
    yield


class _Watch:
    def __init__(self) -> None:
        self._begun: dict[int, Clock] = {}

    def around(self, kind: type[Buffer], name: str) -> Callable[..., Any]:
        """The method `name`, and what is to be noted of it."""
        method = getattr(kind, name)
        note = getattr(self, "_make" if name == "__init__" else f"_{name}")
        first = name != "arrive"

        def watched(buffer: Any, *arguments: Any) -> Any:
            if first:
                note(buffer, *arguments)
            result = method(buffer, *arguments)
            if not first:
                note(buffer, *arguments)
            return result

        return watched

    def _make(self, slot: SlotBuffer, *_: object) -> None:
        self._begun.pop(id(slot), None)  # of one that is no more

    def _arrive(self, slot: SlotBuffer) -> None:
        accelerator = slot._pool.accelerator
        if isinstance(accelerator, CheckedAccelerator):
            self._begun.setdefault(id(slot), accelerator.arrived())

    def _release(self, slot: SlotBuffer) -> None:
        begin, accelerator = self._begun.pop(id(slot), None), slot._pool.accelerator
        if begin is not None and not slot.released and not slot._pool.closed:
            assert isinstance(accelerator, CheckedAccelerator)
            accelerator.uses(slot.tensor(), begin)

    _reuse = _release

    def _submit(self, buffer: Buffer, _: Reader, op: ReadOp, offset_bytes: int) -> None:
        memory = buffer.tensor()[offset_bytes : offset_bytes + op.length_bytes]
        for accelerator in _ALIVE:
            if accelerator.has(memory):
                accelerator.writes(memory)

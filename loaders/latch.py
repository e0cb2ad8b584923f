"""A one-shot event that Ctrl-C cannot corrupt.

`threading.Event` takes its inner lock in Python code, so a signal that lands inside `wait` can leave that
lock held and the setter blocked for ever. A latch is one C-level lock, entered only through `with`, which the
interpreter never interrupts half way.
"""

from __future__ import annotations

import threading

__all__ = ["Latch"]


class Latch:
    """Starts closed; `set` opens it once and for all; `wait` returns when it is open."""

    __slots__ = ("_gate", "_open")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self._open = False

    @property
    def is_set(self) -> bool:
        return self._open

    def set(self) -> None:
        """Open the latch; called exactly once, by whoever finished the work."""
        self._open = True
        self._gate.release()

    def wait(self) -> None:
        if not self._open:
            with self._gate:
                pass

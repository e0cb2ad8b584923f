"""One thread at a time: the weights of a streamed block are in one place, and only one forward can have
them."""

from __future__ import annotations

import threading

__all__ = ["ThreadTurn"]

_LOOK_AGAIN_S = 0.5


class ThreadTurn:
    """A re-entrant lock that survives what its holder does not: Ctrl-C in a forward, or a thread's end.

    torch runs no hooks for KeyboardInterrupt, so a holder may never say that it has left. Its own next
    `begin` starts anew, and a thread that waits takes over from a holder that is no longer alive.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None
        self._entered = 0

    def begin(self) -> None:
        """Wait for the turn and enter it once, whatever this thread left open before."""
        self.enter(anew=True)

    def enter(self, *, anew: bool = False) -> None:
        """Wait for the turn, or enter it again."""
        me = threading.current_thread()
        with self._changed:
            while self._holder is not None and self._holder is not me and self._holder.is_alive():
                self._changed.wait(_LOOK_AGAIN_S)
            if anew or self._holder is not me:
                self._entered = 0
            self._holder = me
            self._entered += 1

    def leave(self) -> None:
        """Undo one `enter`; the last one lets the next thread in."""
        with self._changed:
            if self._holder is not threading.current_thread():
                return
            self._entered -= 1
            if self._entered <= 0:
                self._holder = None
                self._changed.notify()

"""Run jobs ahead of where their results are used, in order and within a memory budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Job", "run_in_order"]

T = TypeVar("T")


@dataclass(frozen=True)
class Job(Generic[T]):
    """Work for another thread, and the memory it takes from its start until its result has been used."""

    run: Callable[[], T]
    memory_bytes: int


def run_in_order(jobs: Iterable[Job[T]], *, workers: int, memory_bytes: int) -> Generator[T, None, None]:
    """Results of `jobs` in their order, computed ahead by `workers` threads.

    Jobs wait while those under way, and the result last given out, would exceed `memory_bytes` with them;
    one job always runs. `jobs` is only asked for the next one when it may start. An exception of a job is
    raised where its result would have come; jobs not yet started are then dropped, and those running are
    waited for.
    """
    pending: deque[tuple[Future[T], int]] = deque()
    source = iter(jobs)
    waiting: Job[T] | None = next(source, None)
    used = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="endor-convert")
    try:
        while waiting is not None or pending:
            while (
                waiting is not None
                and len(pending) <= workers
                and (used == 0 or used + waiting.memory_bytes <= memory_bytes)
            ):
                pending.append((pool.submit(waiting.run), waiting.memory_bytes))
                used += waiting.memory_bytes
                waiting = next(source, None)
            future, cost = pending.popleft()
            yield future.result()
            del future
            used -= cost
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

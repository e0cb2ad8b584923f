"""Whatever the sizes, the depth, the order and the leases held: the bytes lent are those of the file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings, strategies as st

from endor.errors import PlanError
from endor.loaders import PAGE_BYTES, Lease, LoadPlan, PosixReader, Prefetcher, ReadOp, StagingPool, Unit

pytestmark = pytest.mark.timeout(120)

FILE_PAGES = 2048
MAX_PAGES = 400  # five of these do not fit into 2 MiB, so that the ring's capacity matters


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(FILE_PAGES * PAGE_BYTES)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    path = tmp_path_factory.mktemp("prefetch") / "model.safetensors"
    path.write_bytes(content)
    return path


@st.composite
def unit_ranges(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Units as (offset, length) reads: mostly whole pages, sometimes ragged, sometimes several reads."""
    pages = st.tuples(st.integers(0, FILE_PAGES - MAX_PAGES), st.integers(1, MAX_PAGES)).map(
        lambda pair: (pair[0] * PAGE_BYTES, pair[1] * PAGE_BYTES)
    )
    ragged = st.tuples(st.integers(0, (FILE_PAGES - 4) * PAGE_BYTES), st.integers(1, 3 * PAGE_BYTES))
    unit = st.lists(pages, min_size=1, max_size=1) | st.lists(ragged | pages, min_size=1, max_size=3)
    return draw(st.lists(unit, min_size=1, max_size=7))


def check(lease: Lease, content: bytes) -> None:
    for number, op in enumerate(lease.unit.ops):
        assert lease.op_tensor(number).numpy().tobytes() == content[op.offset_bytes : op.end_bytes]


def make_plan(path: Path, ranges: list[list[tuple[int, int]]], depth: int) -> LoadPlan:
    return LoadPlan(
        tuple(
            Unit(f"unit {index}", tuple(ReadOp(path, offset, length) for offset, length in reads))
            for index, reads in enumerate(ranges)
        ),
        depth,
    )


@settings(max_examples=40)
@given(
    ranges=unit_ranges(),
    depth=st.integers(0, 4),
    steps=st.lists(
        st.tuples(st.sampled_from(["next", "next", "next", "jump", "release"]), st.integers(0, 6)),
        max_size=30,
    ),
    tight=st.booleans(),
)
def test_any_walk_lends_the_bytes_of_the_file(
    path: Path,
    content: bytes,
    *,
    ranges: list[list[tuple[int, int]]],
    depth: int,
    steps: list[tuple[str, int]],
    tight: bool,
) -> None:
    plan = make_plan(path, ranges, depth)
    pool = StagingPool(plan.largest_unit_bytes) if tight else None
    with PosixReader(chunk_bytes=64 * PAGE_BYTES) as reader, Prefetcher(plan, reader, pool) as prefetcher:
        held: list[Lease] = []
        position = 0
        for step, number in steps:
            if step == "release" and held:
                held.pop(number % len(held)).release()
                continue
            position = (position + 1 if step == "next" else number) % len(plan.units)
            try:
                held.append(prefetcher.acquire(position))
            except PlanError:
                assert held, "with nothing leased every unit fits"
                held.pop(0).release()
            for lease in held:
                check(lease, content)
            while len(held) > 2:
                held.pop(0).release()
        for lease in held:
            lease.release()


class Interrupt(BaseException):
    """What a signal handler raises, at whatever bytecode the main thread is at."""


def interrupted(work: Callable[[], None], *, after_s: float) -> None:
    """Run `work` and raise Interrupt in it once, `after_s` after its start if it still runs then."""
    armed = False
    begun, over = threading.Event(), threading.Event()
    main = threading.get_ident()

    def send() -> None:
        begun.wait()
        if not over.wait(after_s):
            signal.pthread_kill(main, signal.SIGUSR1)

    def handler(number: int, frame: FrameType | None) -> None:
        if armed:
            raise Interrupt

    sender = threading.Thread(target=send)
    before = signal.signal(signal.SIGUSR1, handler)
    sender.start()
    try:
        try:
            armed = True
            begun.set()
            work()
        finally:
            armed = False
    except Interrupt:
        pass
    over.set()
    sender.join()
    signal.signal(signal.SIGUSR1, before)


# An interrupt can drop a lease, and can land in the method that reports it.
@pytest.mark.filterwarnings("ignore:lease of unit .* was never released:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_interrupt_at_any_moment_leaves_a_prefetcher_that_works(
    path: Path, content: bytes, depth: int
) -> None:
    ranges = [[(index * 100 * PAGE_BYTES, (40 + 10 * index) * PAGE_BYTES)] for index in range(5)]
    plan = make_plan(path, ranges, depth)
    with PosixReader(chunk_bytes=8 * PAGE_BYTES) as reader, Prefetcher(plan, reader) as prefetcher:
        for attempt in range(200):

            def walk(start: int = attempt) -> None:
                for step in range(50):
                    with prefetcher.acquire((start + step * (1 if start % 3 else 2)) % 5):
                        pass

            interrupted(walk, after_s=attempt * 10e-6)
            with prefetcher.acquire(attempt % 5) as lease:
                check(lease, content)


def test_interrupt_while_waiting_gives_the_lease_back(path: Path, content: bytes) -> None:
    gate = threading.Event()
    plan = make_plan(path, [[(0, 300 * PAGE_BYTES)], [(0, 300 * PAGE_BYTES)]], 0)

    def stay(index: int, memory: memoryview) -> None:
        gate.wait(30)

    with PosixReader() as reader, Prefetcher(plan, reader, on_read=stay) as prefetcher:
        began_s = time.monotonic()
        interrupted(lambda: prefetcher.acquire(0).release(), after_s=0.05)
        assert 0.04 < time.monotonic() - began_s < 10
        gate.set()
        with prefetcher.acquire(1) as lease:  # the ring has room for one unit: the other's came back
            check(lease, content)

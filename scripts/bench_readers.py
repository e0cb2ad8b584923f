#!/usr/bin/env python3
"""Reading speed of the loaders against the disk: a plain O_DIRECT pread loop in the same rounds is the bound.

    python scripts/bench_readers.py --directory /path/on/the/disk

Three tables: cold bandwidth (the file dropped from the page cache before each pass) and warm bandwidth of
each way to read, and how well reads overlap with work: the time of a pass of the prefetcher against max(read,
work), both measured in the same round. Methods take turns, because shared disks drift. Bandwidths are
medians; the overlap table compares the best of each, because on a shared machine the median of anything that
computes is somebody else's load.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from endor.loaders import (
    KvikioReader,
    LoadPlan,
    MmapReader,
    PosixReader,
    Prefetcher,
    Reader,
    ReadOp,
    StagingPool,
    Ticket,
    Unit,
    drop_from_page_cache,
    probe_kvikio,
)

MIB = 1 << 20
PLAIN = "plain O_DIRECT pread, 1 thread x 128M"

Action = Callable[[], float]


def make_file(directory: Path, size_bytes: int) -> Path:
    handle, name = tempfile.mkstemp(dir=directory, suffix=".bench")
    with os.fdopen(handle, "wb") as file:
        for _ in range(size_bytes // (16 * MIB)):
            file.write(os.urandom(16 * MIB))
        os.fsync(file.fileno())
    return Path(name)


def take_turns(
    actions: dict[str, Action], *, rounds: int, before: Callable[[], None]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = defaultdict(list)
    names = list(actions)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            seconds[name].append(actions[name]())
    return {name: seconds[name] for name in names}


def read_plain(path: Path, pool: StagingPool) -> float:
    """Seconds of one thread's sequential direct reads: what the disk gives."""
    request_bytes = 128 * MIB
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with pool.allocate(request_bytes) as buffer:
            began = perf_counter()
            for offset in range(0, path.stat().st_size, request_bytes):
                os.preadv(descriptor, [buffer.memory], offset)
            return perf_counter() - began
    finally:
        os.close(descriptor)


def read_units(units: tuple[Unit, ...], reader: Reader, pool: StagingPool) -> float:
    """Seconds of one pass over the units through two buffers, with nothing done to the bytes."""
    tickets: list[Ticket] = []
    began = perf_counter()
    with pool.allocate(units[0].span_bytes) as even, pool.allocate(units[0].span_bytes) as odd:
        for index, unit in enumerate(units):
            if index >= 2:
                reader.wait(tickets[index - 2])
            memory = (odd if index % 2 else even).memory[: unit.total_bytes]
            tickets.append(reader.submit(unit.ops[0], memory))
        for ticket in tickets[-2:]:
            reader.wait(ticket)
        return perf_counter() - began


def read_mapped(units: tuple[Unit, ...], pool: StagingPool) -> float:
    """As `read_units`; the mapping must be gone after it, because mapped pages cannot be dropped."""
    with MmapReader() as reader:
        return read_units(units, reader, pool)


def bench_bandwidth(path: Path, units: tuple[Unit, ...], *, rounds: int, cold: bool) -> None:
    readers: dict[str, Reader] = {
        "posix, auto": PosixReader(),
        "posix, buffered": PosixReader(direct=False),
    }
    for threads, chunk in ((1, 128), (2, 4), (2, 8), (2, 16), (2, 32), (4, 8)):
        label = f"posix, direct, {threads} threads x {chunk}M"
        readers[label] = PosixReader(direct=True, threads=threads, chunk_bytes=chunk * MIB)
    for threads, chunk in ((1, 128), (2, 4), (2, 16), (4, 8)) if probe_kvikio().serves_host else ():
        label = f"kvikio, direct, {threads} threads x {chunk}M"
        readers[label] = KvikioReader(direct=True, threads=threads, chunk_bytes=chunk * MIB)
    with StagingPool(max(128 * MIB, 2 * units[0].span_bytes)) as pool:
        actions: dict[str, Action] = {PLAIN: lambda: read_plain(path, pool)}
        for label, reader in readers.items():
            actions[label] = partial(read_units, units, reader, pool)
        actions["mmap"] = lambda: read_mapped(units, pool)
        seconds = take_turns(
            actions, rounds=rounds, before=lambda: drop_from_page_cache(path) if cold else warm_up(path)
        )
    for reader in readers.values():
        reader.close()
    size = path.stat().st_size
    bound = statistics.median(seconds[PLAIN])
    print(f"\n{'cold' if cold else 'warm'}: {size / 1e9:.2f} GB in units of {units[0].total_bytes >> 20} MiB")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(f"  {name:40} {size / middle / 1e9:6.2f} GB/s   {bound / middle:5.2f} of plain")


def warm_up(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        scratch = bytearray(8 * MIB)
        while file.readinto(scratch):
            pass


class Work:
    """Memory-bound torch arithmetic on all torch threads, in small steps as a model's."""

    def __init__(self) -> None:
        self.source, self.target = torch.zeros(MIB), torch.zeros(MIB)
        self.run(500)
        self.step_s = min(self.timed(200) for _ in range(10)) / 200

    def timed(self, steps: int) -> float:
        began = perf_counter()
        self.run(steps)
        return perf_counter() - began

    def run(self, steps: int) -> None:
        for _ in range(steps):
            torch.add(self.source, 1.0, out=self.target)


def bench_overlap(units: tuple[Unit, ...], *, rounds: int) -> None:
    work = Work()

    def read_pass(prefetcher: Prefetcher, steps: int) -> float:
        began = 0.0
        for index in (*range(len(units)), *range(4)):
            if index == 4:  # not before: what was read ahead while others had their turn is no achievement
                began = perf_counter()
            with prefetcher.acquire(index):
                work.run(steps)
        return perf_counter() - began

    print(f"\noverlap on {torch.get_num_threads()} torch threads: max(read, work) / time of a pass")
    with PosixReader(direct=True) as reader:
        prefetchers = {depth: Prefetcher(LoadPlan(units, depth), reader) for depth in (0, 1, 2, 3)}
        once = min(read_pass(prefetchers[2], 0) for _ in range(3))
        for share in (0.5, 1.0, 2.0):
            steps = max(1, round(share * once / len(units) / work.step_s))
            actions: dict[str, Action] = {
                "read": partial(read_pass, prefetchers[2], 0),
                "work": partial(work.timed, steps * len(units)),
            }
            for depth, prefetcher in prefetchers.items():
                actions[f"depth {depth}"] = partial(read_pass, prefetcher, steps)
            seconds = {
                name: min(taken)
                for name, taken in take_turns(actions, rounds=rounds, before=lambda: None).items()
            }
            bound = max(seconds["read"], seconds["work"])
            cells = "   ".join(
                f"{name} {bound / taken:4.2f}" for name, taken in seconds.items() if name.startswith("depth")
            )
            print(f"  read {seconds['read']:5.2f} s, work {seconds['work']:5.2f} s:   {cells}")
        for prefetcher in prefetchers.values():
            prefetcher.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, default=Path.cwd(), help="where to put the file (default: here)"
    )
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the file; a multiple of 128")
    parser.add_argument(
        "--unit-mib", type=int, default=32, help="size of a unit; divides the size of the file"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--overlap-only", action="store_true")
    arguments = parser.parse_args()
    print(f"kvikio: {probe_kvikio().reason}")
    path = make_file(arguments.directory, arguments.size_mib * MIB)
    try:
        length = arguments.unit_mib * MIB
        units = tuple(
            Unit(f"unit {offset // length}", (ReadOp(path, offset, length),))
            for offset in range(0, arguments.size_mib * MIB, length)
        )
        for cold in () if arguments.overlap_only else (True, False):
            bench_bandwidth(path, units, rounds=arguments.rounds, cold=cold)
        bench_overlap(units, rounds=arguments.rounds)
    finally:
        path.unlink()


if __name__ == "__main__":
    main()

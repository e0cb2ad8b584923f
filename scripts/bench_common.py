"""What the benchmarks share: where they ran, turns, memory and disk as the kernel counts them, tables.

A number from a benchmark is worth what it says about its conditions, so each script prints
`environment_line()`, lets its contenders take turns in one run (`rotated`, `take_turns`), shows medians, and
measures its bound in the same run.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import itertools
import json
import math
import mmap
import os
import platform
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from endor.formats.packed import PackedTensor
from endor.loaders import StagingPool, cached_fraction, drop_from_page_cache

MIB = 1 << 20
CACHE_BYTES = 160_000_000
"""More than any cache of a processor core: what takes turns and is larger together is in no cache."""

__all__ = [
    "LLAMA_1B",
    "LLAMA_TINY",
    "MIB",
    "CpuMeter",
    "DiskProbe",
    "LlamaShape",
    "MemorySampler",
    "Timing",
    "anonymous_bytes",
    "as_bytes",
    "build_random_llama",
    "cached_share",
    "clock_of",
    "clones",
    "copies_beyond_cache",
    "drop_cache",
    "environment",
    "environment_line",
    "files_of",
    "forget_mappings",
    "greedy_from_disk",
    "hush_transformers",
    "median",
    "print_table",
    "quiet_median_s",
    "random_pruned",
    "read_from_disk_bytes",
    "rotated",
    "save_whole",
    "take_turn",
    "take_turns",
    "wait_for_quiet",
    "warm_cache",
    "write_json",
]


# ── where it ran ────────────────────────────────────────────────────────────────────────────────────────────


def environment() -> dict[str, Any]:
    """The machine and the software, as far as they decide speed."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def environment_line() -> str:
    """`environment` for people, in one line."""
    e = environment()
    return (
        f"{e['cpu']}, {e['cores']} cores, {e['memory_bytes'] / 2**30:.0f} GiB, {e['system']},"
        f" torch {e['torch']} ({e['threads']} threads), load average {e['load_average']}, {e['date']}"
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


# ── memory and disk as the kernel counts them ───────────────────────────────────────────────────────────────


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous memory (RssAnon) of a process: what it allocated, without mapped files."""
    return _kernel_count(f"/proc/{pid}/status", "RssAnon") * 1024


def read_from_disk_bytes() -> int:
    """Bytes that this process has had read from disks so far; what the page cache served does not count."""
    return _kernel_count("/proc/self/io", "read_bytes")


def _kernel_count(path: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+)", Path(path).read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


class MemorySampler:
    """The most anonymous memory another process has had inside the `with`; sampling costs it nothing."""

    def __init__(self, pid: int, *, period_s: float = 0.01) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self.peak_bytes = max(self.peak_bytes, anonymous_bytes(self._pid))
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class CpuMeter:
    """How much of the machine's processor time goes to others than this process."""

    def __init__(self) -> None:
        self._before = self._now()

    def foreign_share(self) -> float:
        """Share of all processor time since the meter was made that somebody else used, 0 to 1."""
        busy, everything, ours = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - ours) / max(everything, 1)

    def _now(self) -> tuple[int, int, int]:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        return sum(fields) - idle, sum(fields), _own_ticks()


def _own_ticks() -> int:
    words = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


def wait_for_quiet(patience_s: float, *, busy_share: float = 0.1) -> float:
    """Return when others leave the processors alone, or patience is over; the seconds it took."""
    began = perf_counter()
    while perf_counter() - began < patience_s:
        meter = CpuMeter()
        time.sleep(1.0)
        if meter.foreign_share() < busy_share:
            break
    return perf_counter() - began


# ── turns of functions that take microseconds to milliseconds ───────────────────────────────────────────────


def random_pruned(
    shape: tuple[int, int], *, dtype: torch.dtype, density: float = 0.5, seed: int = 0
) -> torch.Tensor:
    """Normally distributed weights of which a random share is kept."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    # Not by multiplication: that would leave -0.0, which is a value and kept.
    return torch.where(keep, torch.randn(shape, generator=generator), torch.zeros(())).to(dtype)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, so that every NaN and every zero equals itself alone."""
    return tensor.view(torch.uint8)


def copies_beyond_cache(nbytes: int) -> int:
    """How many things of this size must take turns, so that none is in a cache when its turn comes."""
    return max(3, math.ceil(CACHE_BYTES / nbytes))


def clones(packed: PackedTensor, copies: int) -> list[PackedTensor]:
    """Copies that take turns, each in memory of its own."""
    sections = packed.sections.items()
    return [PackedTensor(packed.layout, {k: v.clone() for k, v in sections}) for _ in range(copies)]


@dataclass(frozen=True)
class Timing:
    """One turn of a contender: seconds per call, and the share of the machine that others used meanwhile."""

    call_s: float
    others: float


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time of the thread if there is one, which other processes disturb less; with more, wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def take_turn(run: Callable[[], object], *, turn_s: float, threads: int) -> Timing:
    """Call `run` until the turn's time is over. The first call, with cold address caches, does not count."""
    clock = clock_of(threads)
    run()
    calls, busy, own, wall = 0, _busy_s(), time.process_time(), perf_counter()
    began = clock()
    while calls == 0 or perf_counter() - wall < turn_s:
        run()
        calls += 1
    taken = clock() - began
    others = _busy_s() - busy - (time.process_time() - own)
    return Timing(taken / calls, max(0.0, others / (perf_counter() - wall) / (os.cpu_count() or 1)))


def take_turns(
    runs: Mapping[str, Callable[[int], object]], *, copies: int, rounds: int, turn_s: float, threads: int
) -> dict[str, list[Timing]]:
    """One turn of each contender per round, in changing order.

    A call gets the number of the copy whose turn it is.
    """
    torch.set_num_threads(threads)
    numbers = itertools.cycle(range(copies))
    timings: dict[str, list[Timing]] = {name: [] for name in runs}
    for round_number in range(rounds):
        for name in rotated(list(runs), round_number):
            timings[name].append(
                take_turn(partial(_call_next, runs[name], numbers), turn_s=turn_s, threads=threads)
            )
    return timings


def _call_next(run: Callable[[int], object], numbers: Iterator[int]) -> None:
    run(next(numbers))


def _busy_s() -> float:
    """CPU time of the whole machine so far."""
    user, nice, system, _idle, _iowait, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def quiet_median_s(timings: Sequence[Timing]) -> float:
    """Seconds per call, median over the quieter half of the turns."""
    quiet = sorted(timings, key=lambda timing: timing.others)[: -(-len(timings) // 2)]
    return median(timing.call_s for timing in quiet)


# ── page cache ──────────────────────────────────────────────────────────────────────────────────────────────


def files_of(directory: Path, *suffixes: str) -> list[Path]:
    """The files of a directory with these suffixes, in the order of their names."""
    return sorted(path for path in directory.iterdir() if path.suffix in suffixes)


def drop_cache(files: Iterable[Path]) -> None:
    """Drop files from the page cache, also what this process maps: mapped pages would stay otherwise."""
    paths = list(files)
    forget_mappings(paths)
    for path in paths:
        drop_from_page_cache(path)


def greedy_from_disk(
    model: Any, prompt: torch.Tensor, files: Sequence[Path], *, tokens: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens and the seconds each took, its files dropped from the page cache before each.

    Args:
        model: a causal language model of transformers.
        prompt: int64 [tokens]; the first of the new tokens reads it.
        files: the model's.
        tokens: how many to make.
    """
    ids, cache, found, seconds = prompt.unsqueeze(0), None, [], []
    with torch.inference_mode():
        for _ in range(tokens):
            drop_cache(files)
            began = perf_counter()
            out = model(ids, past_key_values=cache, use_cache=True)
            seconds.append(perf_counter() - began)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
    return found, seconds


def forget_mappings(files: Iterable[Path]) -> None:
    """Give up the pages of this process's private mappings of files; a touch brings them back."""
    paths = {str(path.resolve()) for path in files}
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0] in paths:
            start, end = (int(part, 16) for part in place.split("-"))
            if libc.madvise(start, end - start, mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"the mapping of {name[0]} cannot be dropped")


def warm_cache(files: Iterable[Path]) -> None:
    """Read files once, so that the page cache holds them."""
    scratch = bytearray(8 * MIB)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(scratch):
                pass


def cached_share(files: Iterable[Path]) -> float:
    """Share of the files' bytes that the page cache holds, 0 to 1."""
    cached = total = 0.0
    for path in files:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            cached += size * cached_fraction(file.fileno(), 0, size)
            total += size
    return cached / total if total else 0.0


class DiskProbe:
    """Sequential direct reads of some files: what the disk gives now, the bound of everything streamed.

    One thread with 128 MiB requests into huge pages that are allocated once: no other way tried was faster.
    """

    def __init__(self, files: Sequence[Path], *, request_bytes: int = 128 * MIB) -> None:
        self._files = tuple(files)
        self._pool = StagingPool(min(request_bytes, max(path.stat().st_size for path in files)))
        self._buffer = self._pool.allocate(self._pool.capacity_bytes)

    def bytes_per_s(self) -> float:
        """Bandwidth of one pass over all files."""
        drop_cache(self._files)
        began = perf_counter()
        done = sum(self._read(path) for path in self._files)
        return done / (perf_counter() - began)

    def _read(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        try:
            done = 0
            while got := os.preadv(descriptor, [self._buffer.memory], done):
                done += got
                if got < len(self._buffer.memory):
                    break
            return done
        finally:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffer.release()
        self._pool.close()


# ── order, medians, output ──────────────────────────────────────────────────────────────────────────────────


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """The names in a different order each round, so that none always runs after the same one."""
    shift = round_number % len(names)
    return [*names[shift:], *names[:shift]]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table, padded so that it also reads in a terminal; ready for docs/benchmarks.md."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the report to a file, or to standard output without one."""
    text = json.dumps(report, indent=2)
    if path is None:
        print(text)
    else:
        path.write_text(text + "\n")


def hush_transformers() -> None:
    """No progress bars and advice between the lines of a benchmark."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


# ── a model of a given shape ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """What decides the size and speed of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    key_value_heads: int


LLAMA_1B = LlamaShape(
    hidden=2048, layers=22, intermediate=5632, vocabulary=32_000, heads=32, key_value_heads=4
)
LLAMA_TINY = LlamaShape(hidden=256, layers=5, intermediate=704, vocabulary=1_000, heads=8, key_value_heads=4)


def build_random_llama(directory: Path, shape: LlamaShape, *, shard_size: str = "500MB") -> None:
    """Save a Llama with random bf16 weights as transformers does; `directory` appears when it is complete."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    save_whole(model, directory, shard_size=shard_size)


def save_whole(model: Any, directory: Path, *, shard_size: str) -> None:
    """`save_pretrained` into a directory that appears under its name only when it is complete."""
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, max_shard_size=shard_size)
    part.rename(directory)

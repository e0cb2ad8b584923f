"""What this machine's links give, in bytes per second: measured once, remembered per machine and disk.

The planner predicts tokens/s from these numbers; `endor doctor` shows them. Measuring takes about two
seconds, so results are kept in the user's cache folder until somebody asks for a new measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch

from endor.errors import LoadError
from endor.loaders import (
    Accelerator,
    PosixReader,
    ReadOp,
    ReadReport,
    StagingPool,
    Ticket,
    drop_from_page_cache,
)

__all__ = [
    "Bandwidth",
    "Bandwidths",
    "cached_bandwidths",
    "machine_bandwidths",
    "measure_bandwidths",
    "measure_device",
]

_CACHE_VERSION: Final = 1
_MIB: Final = 1 << 20
_PIECE_BYTES: Final = 64 * _MIB
_COPIED_BYTES: Final = 128 * _MIB  # 64 MiB still gain from caches of 32 MiB: 53 GB/s against 41 from here on
_SMALLEST_FILE_BYTES: Final = 32 * _MIB
_OWN_FILE_BYTES: Final = 256 * _MIB
_DISK_S: Final = 1.0
_MEMORY_S: Final = 0.1
_LEAST_COPIES: Final = 3
_SHORTEST_S: Final = 1e-6
"""What an event of a device tells apart; so many bytes take longer than that anywhere."""


@dataclass(frozen=True)
class Bandwidth:
    """One link: its rate, how it was reached and when it was measured."""

    bytes_per_s: float
    path: str
    """`direct` (around the page cache) or `buffered` for a disk, `copy` for memory, `pinned copy` for a
    link."""
    measured: str
    """Time in UTC, ISO 8601."""

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ValueError(f"a bandwidth is more than 0 bytes/s, found {self.bytes_per_s!r}")


@dataclass(frozen=True)
class Bandwidths:
    """The links that blocks cross.

    Attributes:
        disk: reading.
        memory: copying in host memory; bytes count once, though they are read and written.
        link: from pinned host memory to a device with its own; None without one.
        device: copying within that, counted as for `memory`.
    """

    disk: Bandwidth
    memory: Bandwidth
    link: Bandwidth | None = None
    device: Bandwidth | None = None


def machine_bandwidths(
    where: Path,
    *,
    measure: bool = False,
    cache: Path | None = None,
    accelerator: Accelerator | None = None,
) -> Bandwidths:
    """The links of this machine and of the disk that holds `where`: remembered, or measured now.

    Args:
        where: a file or folder on the disk in question.
        measure: measure even if there is a remembered result.
        cache: the file that results are kept in; one in the user's cache folder by default.
        accelerator: of a device with its own memory, to which the link is measured as well.

    Raises:
        LoadError: there is no such file or folder, or nothing on it can be read.
        PlanError: the device has no memory for that, or none can be pinned; disk and memory are remembered.
    """
    cache = _cache_file() if cache is None else cache
    known = None if measure else cached_bandwidths(where, cache=cache, accelerator=accelerator)
    if known is None:
        known = measure_bandwidths(where)
        _remember(cache, _disk_of(where), known)
    if accelerator is not None and known.link is None:
        link, device = measure_device(accelerator)
        known = replace(known, link=link, device=device)
        _remember(cache, _disk_of(where), known, _device_of(accelerator))
    return known


def measure_bandwidths(where: Path) -> Bandwidths:
    """Measure now: reading one file in order as the posix reader does, and copying memory."""
    return Bandwidths(disk=_measure_disk(where), memory=_measure_memory())


def measure_device(accelerator: Accelerator) -> tuple[Bandwidth, Bandwidth]:
    """Measure the link to a device, and copying within it, in the order of copies that blocks go through.

    Raises PlanError where the device has no memory for that, or none of the host's can be pinned.
    """
    with StagingPool(_COPIED_BYTES) as pool:
        source = pool.allocate(_COPIED_BYTES).tensor()
        unpin = accelerator.pin(source)
        try:
            target, other = (accelerator.empty(_COPIED_BYTES) for _ in range(2))
            link = _measure_copies(accelerator, target, source, "pinned copy")
            return link, _measure_copies(accelerator, other, target, "copy")
        finally:
            accelerator.settle()
            unpin()


def _measure_copies(
    accelerator: Accelerator, target: torch.Tensor, source: torch.Tensor, path: str
) -> Bandwidth:
    """The fastest of some copies, by the device's clock."""
    taken_s: list[float] = []
    ends_s = perf_counter() + _MEMORY_S
    while len(taken_s) < _LEAST_COPIES or perf_counter() < ends_s:
        copied = accelerator.copy([(target, source)], after=[])
        copied.ended.wait()
        taken_s.append(copied.ended.seconds_since(copied.began))
    return Bandwidth(_COPIED_BYTES / max(min(taken_s), _SHORTEST_S), path, _now())


def _measure_disk(where: Path) -> Bandwidth:
    with _file_to_read(where) as file, StagingPool(2 * _PIECE_BYTES) as pool:
        with contextlib.suppress(OSError):  # where the disk is only read
            drop_from_page_cache(file)
        buffers = [pool.allocate(_PIECE_BYTES).memory for _ in range(2)]
        with PosixReader(direct=True) as reader:
            began = perf_counter()
            report = _read_in_order(reader, file, buffers, until_s=began + _DISK_S)
            taken_s = perf_counter() - began
    path = "direct" if report.bytes_direct > report.bytes_buffered else "buffered"
    return Bandwidth(report.bytes_read / taken_s, path, _now())


def _read_in_order(
    reader: PosixReader, file: Path, buffers: list[memoryview], *, until_s: float
) -> ReadReport:
    """Read the file in order, as many pieces at a time as there are buffers, until its end or time is up."""
    report = ReadReport()
    flying: deque[Ticket] = deque()
    size = file.stat().st_size
    for number, offset in enumerate(range(0, size, _PIECE_BYTES)):
        if number and perf_counter() > until_s:
            break
        if len(flying) == len(buffers):
            report += reader.wait(flying.popleft())
        length = min(_PIECE_BYTES, size - offset)
        memory = buffers[number % len(buffers)][:length]
        flying.append(reader.submit(ReadOp(file, offset, length), memory))
    return sum((reader.wait(ticket) for ticket in flying), report)


@contextmanager
def _file_to_read(where: Path) -> Iterator[Path]:
    """A file on the disk of `where` that is large enough to tell: one that is there, or one made for this."""
    try:
        files = [where] if where.is_file() else [path for path in where.iterdir() if path.is_file()]
        sizes = {path: path.stat().st_size for path in files}
    except OSError as error:
        raise LoadError(f"{where}: cannot be measured: {error.strerror}", errno=error.errno) from error
    largest = max(sizes, key=sizes.__getitem__, default=None)
    if largest is not None and sizes[largest] >= _SMALLEST_FILE_BYTES:
        yield largest
        return
    folder = where.parent if where.is_file() else where
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".endor-bandwidth-") as own:
            for _ in range(_OWN_FILE_BYTES // (8 * _MIB)):
                own.write(os.urandom(8 * _MIB))
            own.flush()
            os.fsync(own.fileno())
            yield Path(own.name)
    except OSError as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(
            f"{folder}: no file of {_SMALLEST_FILE_BYTES} bytes is there to be read, and one cannot be"
            f" written: {error.strerror}; name a large file on that disk",
            errno=error.errno,
        ) from error


def _measure_memory() -> Bandwidth:
    with StagingPool(2 * _COPIED_BYTES) as pool:
        source, target = (pool.allocate(_COPIED_BYTES).tensor() for _ in range(2))
        fastest_s = float("inf")
        ends_s = perf_counter() + _MEMORY_S
        while perf_counter() < ends_s:
            began_s = perf_counter()
            target.copy_(source)
            fastest_s = min(fastest_s, perf_counter() - began_s)
    return Bandwidth(_COPIED_BYTES / fastest_s, "copy", _now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# What is remembered, by fingerprint of the machine, number of the disk and name of the GPU:
# {"version": 1, "machines": {...: {"memory": ..., "disks": {...: ...}, "gpus": {...: {"link": ...,
# "device": ...}}}}}.
# "gpus" came later: a file without it is read, and kept by versions that do not know it.


def cached_bandwidths(
    where: Path, *, cache: Path | None = None, accelerator: Accelerator | None = None
) -> Bandwidths | None:
    """What was measured before on this machine and the disk of `where`; None if nothing was.

    With an `accelerator`, `link` and `device` are those of its device, or None if that was not measured.
    """
    machine = _remembered(_cache_file() if cache is None else cache).get(_machine(), {})
    try:
        disk = machine["disks"][_disk_of(where)]
        found = Bandwidths(disk=Bandwidth(**disk), memory=Bandwidth(**machine["memory"]))
    except (KeyError, TypeError, ValueError):  # nothing, or not what we wrote: measure again
        return None
    if accelerator is None:
        return found
    try:
        gpu = machine["gpus"][_device_of(accelerator)]
        return replace(found, link=Bandwidth(**gpu["link"]), device=Bandwidth(**gpu["device"]))
    except (KeyError, TypeError, ValueError):
        return found


def _remembered(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("version") != _CACHE_VERSION:
        return {}
    machines = found.get("machines")
    return machines if isinstance(machines, dict) else {}


def _remember(cache: Path, disk: str, found: Bandwidths, gpu: str | None = None) -> None:
    """Add a result, by replacing the file as a whole; without a place to keep it, it is measured again."""
    machines = _remembered(cache)
    machine = machines.setdefault(_machine(), {})
    machine["memory"] = asdict(found.memory)
    machine.setdefault("disks", {})[disk] = asdict(found.disk)
    if gpu is not None and found.link and found.device:
        machine.setdefault("gpus", {})[gpu] = {"link": asdict(found.link), "device": asdict(found.device)}
    text = json.dumps({"version": _CACHE_VERSION, "machines": machines}, indent=1)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(cache)


def _cache_file() -> Path:
    """As the XDG base directory specification has it: a relative path in the variable does not count."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "endor" / "bandwidth.json"


def _machine() -> str:
    """A name for this machine that a moved disk or home folder does not carry to another one."""
    parts = [platform.node(), platform.machine(), str(os.cpu_count())]
    for source in ("/etc/machine-id", "/proc/cpuinfo"):
        with contextlib.suppress(OSError):
            lines = Path(source).read_text(encoding="utf-8").splitlines()
            parts += [line for line in lines if source != "/proc/cpuinfo" or line.startswith("model name")][
                :1
            ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _disk_of(where: Path) -> str:
    try:
        device = where.stat().st_dev
    except OSError as error:
        raise LoadError(f"{where}: {error.strerror}", errno=error.errno) from error
    return f"{os.major(device)}:{os.minor(device)}"


def _device_of(accelerator: Accelerator) -> str:
    """A model's name and its place: the same GPU in another slot may have another link."""
    return f"{accelerator.name} as {accelerator.device}"

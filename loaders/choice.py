"""Which reader serves: by name, or for `auto` by what this machine was found to be able to do; and why."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from endor.errors import PlanError
from endor.loaders.kvikio_reader import KvikioReader
from endor.loaders.mapped import MmapReader
from endor.loaders.posix import PosixReader
from endor.loaders.reader import Reader

__all__ = ["READER_NAMES", "KvikioProbe", "ReaderChoice", "choose_reader", "probe_kvikio"]

READER_NAMES: Final = ("auto", "posix", "kvikio", "mmap")
_PROBE: Final = Path(__file__).with_name("kvikio_probe.py")
_PROBE_TIMEOUT_S: Final = 20.0  # a first import of kvikio from a cold disk takes 1 s, a GPU context 1 to 3 s
_OLDEST: Final = (26, 10)


@dataclass(frozen=True)
class KvikioProbe:
    """What kvikio was found to do in a process of its own, and why not more."""

    serves_host: bool
    serves_device: bool
    serves_gds: bool
    reason: str
    version: str | None = None

    @property
    def path(self) -> str:
        """How bytes would get to a GPU: `GDS`, `compatibility mode` or `none`."""
        if not self.serves_device:
            return "none"
        return "GDS" if self.serves_gds else "compatibility mode"


class ReaderChoice(NamedTuple):
    """An open reader, its user's to close, and one sentence on why it is this one."""

    reader: Reader
    reason: str


def choose_reader(
    name: str = "auto", *, device_memory: bool = False, file: Path | None = None
) -> ReaderChoice:
    """Open the reader called `name`; `auto` takes the fastest one known to work here.

    Args:
        name: one of `READER_NAMES`.
        device_memory: whether blocks are to be read into GPU memory.
        file: one of the files to be read, because GPUDirect Storage depends on the file system.

    Raises:
        PlanError: there is no such reader, or it cannot serve here; the message says why.
    """
    if name == "auto":
        return _choose_automatically(device_memory=device_memory, file=file)
    if name == "posix":
        return ReaderChoice(PosixReader(), "asked for")
    if name == "mmap":
        return ReaderChoice(MmapReader(), "asked for; posix was measured faster")
    if name == "kvikio":
        found = probe_kvikio(file)
        if not found.serves_host or (device_memory and not found.serves_device):
            raise PlanError(f"reader kvikio cannot serve here: {found.reason}; use auto or posix")
        return ReaderChoice(KvikioReader(gds=found.serves_gds), f"asked for; {found.reason}")
    raise PlanError(f"reader {name!r} is unknown; use {', '.join(READER_NAMES)}")


def _choose_automatically(*, device_memory: bool, file: Path | None) -> ReaderChoice:
    if not device_memory:  # the probe would cost every start half a second to learn what changes nothing
        return ReaderChoice(PosixReader(), "into host memory kvikio is no faster")
    found = probe_kvikio(file)
    if found.serves_gds:
        return ReaderChoice(KvikioReader(gds=True), found.reason)
    return ReaderChoice(PosixReader(), f"kvikio has no direct way to the GPU here: {found.reason}")


@functools.cache
def probe_kvikio(file: Path | None = None, *, timeout_s: float = _PROBE_TIMEOUT_S) -> KvikioProbe:
    """What kvikio can do on this machine with `file`; asked once per process.

    In a process of its own and with a time limit, because `CuFile()` spins for ever on kernels without
    /proc/modules and a driver that fails blocks the first read for good.
    """
    if importlib.util.find_spec("kvikio") is None:
        return _cannot("it is not installed (pip install 'endor-offload[kvikio]')")
    command = [sys.executable, "-P", str(_PROBE), str(file or sys.executable)]
    with tempfile.TemporaryDirectory() as folder:  # cuFile leaves a log in the working directory
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as expired:
            return _cannot(f"it hung for {timeout_s:.0f} s while {_last_step(expired.stdout)}")
        except OSError as error:
            return _cannot(f"it could not be tried: {error}")
    if done.returncode:
        return _cannot(f"it died with exit code {done.returncode} while {_last_step(done.stdout)}")
    return _judge(json.loads(_last_step(done.stdout)))


def _judge(found: dict[str, object]) -> KvikioProbe:
    if "error" in found:
        return _cannot(re.sub(r"KvikIO failure at: \S+: ", "", str(found["error"])))
    version = str(found["version"])
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        return _cannot(
            f"version {version} is older than 26.10, whose failed reads end before they are reported"
        )
    if not found["host"]:
        return _cannot("the bytes it read were wrong")
    if found["gds"]:
        reason = "it reads from disk into GPU memory by GPUDirect Storage"
    elif found["device"]:
        reason = "compatibility mode: it reads into GPU memory over a host buffer"
    else:
        reason = "it reads into host memory; no GPU was found"
    return KvikioProbe(True, bool(found["device"]), bool(found["gds"]), reason, version)


def _cannot(reason: str) -> KvikioProbe:
    return KvikioProbe(serves_host=False, serves_device=False, serves_gds=False, reason=reason)


def _last_step(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return (text.splitlines() or ["starting"])[-1]

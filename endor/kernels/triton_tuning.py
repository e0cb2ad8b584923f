"""Which way of multiplying is fastest for a kind of weight: timed once per GPU, remembered on disk.

A way is a tile of the matmul kernel, or decoding first and then `F.linear`. Which one wins depends on the
GPU's bandwidth, its instructions per second and the shape; it is not worth a model of all that, because
timing every way takes a few milliseconds (and compiling, the first time on a machine, a few seconds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Final, Literal

import torch
import triton
from torch import Tensor

from endor.formats.packed import PackedTensor
from endor.kernels.triton_operand import Operand
from endor.kernels.user_cache import cache_file, read_versioned, write_versioned

__all__ = [
    "DECODE_FIRST",
    "Choices",
    "EventClock",
    "Tile",
    "TimeS",
    "Way",
    "fastest",
    "kind_of",
    "scratch_of",
]

_FILE_VERSION: Final = 1
_REPETITIONS: Final = 5
_HELD_BACK_CYCLES: Final = 1 << 20  # of a clock of 1 to 2 GHz: half a millisecond or more

DECODE_FIRST: Final = "decode first"
"""The way that does without the matmul kernel."""


@dataclass(frozen=True)
class Tile:
    """What a program works on at once: `blocks` row blocks side by side, `words` mask words of each."""

    blocks: int
    words: int
    warps: int


Way = Tile | Literal["decode first"]
TimeS = Callable[[Callable[[], object]], float]
"""Runs a function and tells how many seconds it takes on the device."""


def fastest(ways: Mapping[Way, Callable[[], object]], time_s: TimeS) -> Way:
    """Time every way, in order; the first of the fastest."""
    times = {way: time_s(run) for way, run in ways.items()}
    return min(times, key=lambda way: times[way])


class Choices:
    """What was found to be fastest, by kind of weight: in this process, and in a file that outlives it.

    Args:
        file: where to remember; `endor/gpu-tiles.json` in the user's cache folder by default.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, Way] = {}

    @property
    def file(self) -> Path:
        return cache_file("gpu-tiles.json") if self._file is None else self._file

    def get(self, kind: str) -> Way | None:
        """What this process knows; None if nothing."""
        return self._known.get(kind)

    def recall(self, kind: str, possible: Collection[Way]) -> Way | None:
        """What this process or the file knows, if it is one of the ways that there are."""
        known = self._known.get(kind) or _way_of(read_versioned(self.file, _FILE_VERSION).get(kind))
        if known is None or known not in possible:
            return None
        self._known[kind] = known
        return known

    def use(self, kind: str, way: Way) -> None:
        """Take this way from now on, in this process."""
        self._known[kind] = way

    def remember(self, kind: str, way: Way) -> None:
        """Take this way from now on, in later processes too."""
        self.use(kind, way)
        content = read_versioned(self.file, _FILE_VERSION)
        content[kind] = list(astuple(way)) if isinstance(way, Tile) else way
        write_versioned(self.file, _FILE_VERSION, content)


def _way_of(stored: object) -> Way | None:
    """None for anything that `remember` does not write."""
    if stored == DECODE_FIRST:
        return DECODE_FIRST
    if isinstance(stored, list) and len(stored) == 3 and all(type(number) is int for number in stored):
        return Tile(*stored)
    return None


def kind_of(operand: Operand, x_rows: int) -> str:
    """A name for everything that the fastest way depends on."""
    layout = operand.layout
    params = (f"{name}={n}" for name, n in sorted(layout.params.items()) if name != "exponent_bytes")
    parts = [
        torch.cuda.get_device_name(operand.device) if operand.device.type == "cuda" else "interpreter",
        f"triton {triton.__version__}",
        f"kernels {_fingerprint()}",
        "x".join(map(str, layout.shape)),
        str(layout.dtype).removeprefix("torch."),
        layout.mask,
        " ".join([layout.codec, *params]),
        "1 row" if x_rows == 1 else "several rows",
    ]
    return ", ".join(parts)


@cache
def _fingerprint() -> str:
    """Changes with the kernels' source: what another version measured says nothing of this one."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "triton_kernels").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class EventClock:
    """Seconds on the device, by CUDA events on the current stream: the median of a few repetitions.

    Before each repetition `flushed` is overwritten, so that operands are not in a cache, and the device is
    held back long enough for Python to have put all launches into the queue.
    """

    def __init__(self, flushed: Tensor | None) -> None:
        self._flushed = flushed

    def __call__(self, run: Callable[[], object]) -> float:
        run()  # compiles
        return median(self._turn_s(run) for _ in range(_REPETITIONS))

    def _turn_s(self, run: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self._flushed is not None:
            self._flushed.zero_()
        torch.cuda._sleep(_HELD_BACK_CYCLES)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def scratch_of(packed: PackedTensor) -> Tensor | None:
    """uint8 memory for the dense weight, at least as large as the device's cache; None if there is none."""
    nbytes = packed.layout.dense_bytes
    if packed.device.type == "cuda":
        nbytes = max(nbytes, torch.cuda.get_device_properties(packed.device).L2_cache_size)
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=packed.device)
    except torch.OutOfMemoryError:
        return None

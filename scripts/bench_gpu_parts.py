"""The parts of `bench_gpu.py`: what each is told, its clock, and processes that cannot harm one another.

On a GPU each part is a process of its own. An illegal address ends every later call of the process that made
it, a kernel that hangs cannot be interrupted, and pinned memory goes back to the system only with the
process: so a part that fails, hangs or takes too much costs its own lines and no others. A part writes its
lines to a file as it finds them, so those it had found before it failed count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Deadline", "Outcome", "Part", "Running", "Settings", "main_of_part", "read_task", "run_here"]

_POLL_S = 0.05
_GRACE_S = 6.0
"""After its deadline a process may take so long to notice, and to say where it is."""


@dataclass(frozen=True)
class Settings:
    """What every part is told.

    Attributes:
        device: `cuda`, or `cpu` in a dry run.
        dry_run: tiny sizes.
        folder: for what parts leave each other, and for models that may lie in memory.
        disk: for models that must lie on a disk.
        layers: of the model that is streamed from host memory.
        disk_layers: of the one that is streamed from disk.
        codecs: those that passed the gate (all of them, for the gate).
    """

    device: str
    dry_run: bool
    folder: str
    disk: str
    layers: int
    disk_layers: int
    codecs: tuple[str, ...]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


class Deadline:
    """When a part has to end, and what it left out for that.

    Args:
        at: of `time.time`, which processes share.
    """

    def __init__(self, at: float = float("inf")) -> None:
        self.at = at
        self.skipped: list[str] = []

    @property
    def left_s(self) -> float:
        return self.at - time.time()

    def allows(self, needs_s: float, what: str) -> bool:
        """Whether so many seconds are left; if not, `what` is remembered as skipped."""
        if self.left_s >= needs_s:
            return True
        self.skipped.append(f"{what}: {needs_s:.0f} s needed, {max(self.left_s, 0):.0f} s left")
        return False


@dataclass(frozen=True)
class Part:
    """One thing that is measured.

    Attributes:
        run: yields lines, each of which JSON can hold.
        needs_s: with less left it is not begun.
        limit_s: after so many it is ended.
        codec: that has to have passed the gate, both its kernels and, if `streams`, its model.
        streams: whether Endor streams a model in it.
    """

    name: str
    run: Callable[[Settings, Deadline], Iterable[dict[str, Any]]]
    needs_s: float
    limit_s: float
    codec: str | None = None
    streams: bool = False


@dataclass
class Outcome:
    """What a part found.

    Attributes:
        lines: in order; all that it had found before it failed.
        skipped: what there was no time for.
        error: why it failed.
        trace: where.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    error: str | None = None
    trace: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_here(part: Part, settings: Settings, deadline: Deadline, file: Path | None = None) -> Outcome:
    """Run a part in this process, whatever goes wrong in it.

    Args:
        file: where the outcome so far is kept after each line.
    """
    outcome, began = Outcome(skipped=deadline.skipped), time.time()
    try:
        for line in part.run(settings, deadline):
            outcome.lines.append(line)
            outcome.seconds = time.time() - began
            _write(file, outcome)
    except Exception as error:  # noqa: BLE001 - one part's failure must not cost the others
        outcome.error = _first_line(f"{type(error).__name__}: {error}")
        outcome.trace = traceback.format_exc().splitlines()
    outcome.seconds = time.time() - began
    _write(file, outcome)
    return outcome


def _write(file: Path | None, outcome: Outcome) -> None:
    if file is not None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(outcome)))
        part.replace(file)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


class Running:
    """A part in a process of its own. `outcome` waits for it; `close` ends it.

    Args:
        command: runs the part; gets `--part NAME --task FILE` (settings and deadline) `--result FILE`.
        log: gets what it prints.
    """

    def __init__(
        self, part: Part, settings: Settings, at: float, *, command: Sequence[str], folder: Path
    ) -> None:
        self.part = part
        self._began = time.time()
        self._at = min(at, self._began + part.limit_s)
        self._result = folder / f"{part.name}.json"
        self._log = folder / f"{part.name}.log"
        task = folder / f"{part.name}.task"
        task.write_text(json.dumps({"settings": asdict(settings), "at": self._at}))
        arguments = ["--part", part.name, "--task", str(task), "--result", str(self._result)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)

    def outcome(self) -> Outcome:
        """What the part found, once it has ended or its time is over."""
        while self._process.poll() is None and time.time() < self._at + _GRACE_S:
            time.sleep(_POLL_S)
        status = self._process.returncode
        self.close()
        found = Outcome()
        with contextlib.suppress(FileNotFoundError):
            found = Outcome(**json.loads(self._result.read_text()))
        found.seconds = time.time() - self._began
        if status is None or (status and not found.error):
            found.trace = self._log.read_text(errors="replace").splitlines()[-40:]
        if status is None:
            found.error = f"it did not end, and was ended after {found.seconds:.0f} s"
        elif status and not found.error:
            found.error = f"its process ended with {status}"
        return found

    def close(self) -> None:
        """End the process if it still runs. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def read_task(file: Path) -> tuple[Settings, Deadline]:
    """What `Running` wrote for its process."""
    task = json.loads(file.read_text())
    settings = task["settings"] | {"codecs": tuple(task["settings"]["codecs"])}
    return Settings(**settings), Deadline(task["at"])


def main_of_part(part: Part, task: Path, result: Path) -> int:
    """The life of a part's process; its exit status."""
    settings, deadline = read_task(task)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(deadline.left_s, 1) + _GRACE_S / 2)
    outcome = run_here(part, settings, deadline, result)
    return 1 if outcome.error else 0

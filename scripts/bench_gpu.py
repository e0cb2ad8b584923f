"""Speed on a GPU in one run of under eight minutes: kernels, and a 13 B model streamed against accelerate.

    python scripts/bench_gpu.py [--json FILE] [--parts stream,decode] [--dry-run]

Needs a CUDA device, Triton, transformers and accelerate. Runs from a checkout, installs and downloads
nothing.

First the gate, per codec: every kernel gives the reference's bits, every product is float32 sums rounded
once; a small model, streamed from host memory and from disk, makes the tokens and logits of the same model
resident on the device, and the tokens of the dense one. A codec that fails gets no speed. Then, in this
order:

- bounds: copying within the device (bytes read plus written), and from pinned memory to it; each part
  measures its own bound again;
- stream: a Llama of 13 B parameters with random weights (as many of its layers as memory holds), 25 % of the
  compressed bytes on the device, the rest in pinned memory: tokens/s against accelerate's `cpu_offload` of
  the dense model, and what the link allows. One layer's weights stand under all names, each in memory of its
  own;
- decode: GB/s read plus written of a matrix, and of a whole layer in a `DecodeGroup`;
- matmul: straight from packed weights and by decoding first, against dense cuBLAS, 1, 4 and 16 rows of x;
- ring: layers copied to two slots and decoded there, without a model;
- disk: fewer layers, nothing in host memory, the page cache emptied before each token, against accelerate's
  `disk_offload`.

Each part is a process of its own, so that none can harm another. What there is no time or room for is skipped
and said to be. Temporary files go to /dev/shm where memory is ample, those of `disk` to the temporary folder;
`--directory` puts all of them elsewhere. They are removed at the end, after Ctrl-C and SIGTERM too.

`--dry-run` goes through all of it with tiny models, on the CPU if TRITON_INTERPRET=1: it shows that the
script works, and its times mean nothing. Exits with 1 if a part failed or the gate was red, with 2 where it
cannot run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import bench_gpu_path
import torch
from bench_gpu_kernels import (
    CODECS,
    bench_bounds,
    bench_decode,
    bench_matmul,
    bench_ring,
    gate_kernels,
)
from bench_gpu_models import dense_bytes, packed_bytes
from bench_gpu_parts import Deadline, Outcome, Part, Running, Settings, main_of_part, run_here
from bench_gpu_report import as_json, compare_logits, figures, show
from bench_gpu_stream import LLAMA_13B, bench_accelerate, bench_endor, gate_model, without_interpreter

from bench_common import environment, environment_line, write_json
from endor.kernels.triton_mode import is_interpreted
from endor.loaders import available_bytes

GROUPS = ("bounds", "stream", "decode", "matmul", "ring", "disk")
DISK_LAYERS = 8
"""Of the model that is streamed from disk: accelerate reads two thirds of a GB for each, for every token."""
_SLACK_BYTES = 6 << 30
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder in memory, and one of our own is made in it


def _gate(settings: Settings, _: Deadline, *, codec: str) -> Iterator[dict[str, Any]]:
    yield from gate_kernels(settings, codec)
    with without_interpreter():
        yield from gate_model(settings, codec)


def _model(
    settings: Settings, deadline: Deadline, *, run: Callable[..., Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    with without_interpreter():
        yield from run(settings, deadline)


def _endor(codec: str, tier: str, tokens: int) -> Part:
    run = partial(_model, run=partial(bench_endor, codec=codec, tier=tier, tokens=tokens))
    group = "stream" if tier == "host" else tier
    return Part(f"{group}-{codec}", run, needs_s=30, limit_s=90, codec=codec, streams=True)


def _accelerate(tier: str, tokens: int) -> Part:
    run = partial(_model, run=partial(bench_accelerate, tier=tier, tokens=tokens))
    return Part(f"{'stream' if tier == 'host' else tier}-accelerate", run, needs_s=45, limit_s=90)


GATES = tuple(Part(f"gate-{c}", partial(_gate, codec=c), needs_s=0, limit_s=170, codec=c) for c in CODECS)
PARTS = (
    Part("bounds", bench_bounds, needs_s=10, limit_s=40),
    _endor("exponent", "host", 26),
    _accelerate("host", 6),
    _endor("raw", "host", 26),
    Part("decode", bench_decode, needs_s=15, limit_s=45),
    Part("matmul", bench_matmul, needs_s=20, limit_s=75),
    Part("ring", bench_ring, needs_s=15, limit_s=45),
    _endor("exponent", "disk", 8),
    _accelerate("disk", 5),
    _endor("int4", "host", 26),
    _endor("raw", "disk", 8),
)


# ── room ────────────────────────────────────────────────────────────────────────────────────────────────────


def fitting_layers(*, memory_bytes: int, folder_bytes: int, in_memory: bool) -> int:
    """Layers of the 13 B model, at most all, that the host holds for every contender.

    Args:
        memory_bytes: that are free.
        folder_bytes: that are free where the checkpoint is written.
        in_memory: whether that is in memory too.
    """

    def fits(layers: int) -> bool:
        packed = packed_bytes(LLAMA_13B, layers, "raw")
        needed = max(dense_bytes(LLAMA_13B, layers), packed * (2 if in_memory else 1)) + _SLACK_BYTES
        return needed <= 0.9 * memory_bytes and packed <= 0.95 * folder_bytes

    return next((layers for layers in range(LLAMA_13B.layers, 0, -1) if fits(layers)), 0)


def fitting_disk_layers(folder_bytes: int) -> int:
    """Layers of the model that is streamed from disk, at most `DISK_LAYERS`."""
    fitting = (n for n in range(DISK_LAYERS, 0, -1) if dense_bytes(LLAMA_13B, n) <= 0.95 * folder_bytes)
    return next(fitting, 0)


def folders(stack: ExitStack, directory: Path | None) -> tuple[Path, Path]:
    """For models in host memory, and for those on disk; both are removed with the stack."""
    disk = directory or _temporary_folder()
    memory = disk
    if directory is None and _SHARED_MEMORY.is_dir() and not _is_in_memory(disk):
        free = min(shutil.disk_usage(_SHARED_MEMORY).free, available_bytes() or 0)
        if free > 2 * packed_bytes(LLAMA_13B, LLAMA_13B.layers, "raw") + _SLACK_BYTES:
            memory = _SHARED_MEMORY
    made = [Path(tempfile.mkdtemp(prefix="endor-bench-gpu-", dir=parent)) for parent in (memory, disk)]
    for folder in made:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return made[0], made[1]


def _temporary_folder() -> Path:
    """Python's, or another one if that is in memory."""
    usual = Path(tempfile.gettempdir())
    others = [Path("/var/tmp"), Path.home(), Path.cwd()]  # noqa: S108 - as above
    on_disk = (f for f in (usual, *others) if f.is_dir() and os.access(f, os.W_OK) and not _is_in_memory(f))
    return next(on_disk, usual)


def _is_in_memory(folder: Path) -> bool:
    """Whether a folder lies on a file system without a disk."""
    real, found = str(folder.resolve()), ("", "")
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, place, kind, *_ = line.split()
        if (real + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1] in {"tmpfs", "ramfs"}


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Run:
    """The parts, one after the other; `outcomes` has all of them, also those that were not begun.

    Attributes:
        settings: for the gate; for the parts, without the codecs that do not pass it.
        isolated: each part in a process of its own.
        deadline: of everything.
    """

    settings: Settings
    isolated: bool
    deadline: float
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def gate(self) -> None:
        """All codecs side by side: it takes long for what is compiled, and nothing is timed."""
        gates = [part for part in GATES if part.codec in self.settings.codecs]
        if not self.isolated:
            for part in gates:
                self._note(part, run_here(part, self.settings, Deadline(self.deadline)))
            return
        with ExitStack() as stack:
            running = [stack.enter_context(closing(self._start(part))) for part in gates]
            for each in running:
                self._note(each.part, each.outcome())

    def measure(self, part: Part, missing: str | None) -> None:
        """One part, unless something is missing for it, the gate is red for it or its time is over."""
        reason = missing or self._withheld(part)
        left_s = self.deadline - time.time()
        if reason is None and left_s < part.needs_s:
            reason = f"it needs {part.needs_s:.0f} s, {max(left_s, 0):.0f} s of the time for all are left"
        if reason is not None:
            self._note(part, Outcome(skipped=[f"all of it: {reason}"]))
            return
        settings = replace(self.settings, codecs=tuple(c for c in CODECS if self.passed(c, "kernels")))
        if not self.isolated:
            self._note(part, run_here(part, settings, Deadline(self.deadline)))
            return
        with closing(self._start(part, settings)) as running:
            self._note(part, running.outcome())

    def passed(self, codec: str, step: str) -> bool:
        """Whether the gate's step, `kernels` or `model`, is green for a codec."""
        outcome = self.outcomes.get(f"gate-{codec}", Outcome())
        return any(line["step"] == step for line in outcome.lines)

    def lines(self, group: str) -> list[dict[str, Any]]:
        """Of all parts of a group, in order."""
        names = [name for name in self.outcomes if name.partition("-")[0] == group]
        return [line for name in names for line in self.outcomes[name].lines]

    def _withheld(self, part: Part) -> str | None:
        step = "model" if part.streams else "kernels"
        if part.codec is not None and not self.passed(part.codec, step):
            return f"withheld, the gate is red for {part.codec}"
        kernels = part.name in {"decode", "matmul", "ring"}
        if kernels and not any(self.passed(codec, "kernels") for codec in CODECS):
            return "withheld, the gate is red for every codec"
        return None

    def _start(self, part: Part, settings: Settings | None = None) -> Running:
        command = [sys.executable, __file__]
        # A process needs some time to say how far it came.
        at, folder = self.deadline - 8, Path(self.settings.folder)
        return Running(part, settings or self.settings, at, command=command, folder=folder)

    def _note(self, part: Part, outcome: Outcome) -> None:
        self.outcomes[part.name] = outcome
        state = outcome.error or ("; ".join(outcome.skipped) if outcome.skipped else "done")
        print(f"{part.name}: {outcome.seconds:.0f} s, {state}"[:160], file=sys.stderr, flush=True)


def missing_for(part: Part, settings: Settings) -> str | None:
    """Why this machine has no room for a part."""
    group = part.name.partition("-")[0]
    if group == "stream" and not settings.dry_run and settings.layers < 1:
        return "memory or disk hold not one layer of the model; --directory names another folder"
    if group == "disk" and not settings.dry_run and settings.disk_layers < 1:
        return "the disk holds not one layer of the model; --directory names another folder"
    if group == "disk" and not settings.dry_run and _is_in_memory(Path(settings.disk)):
        return f"{settings.disk} lies in memory; --directory names a folder on a disk"
    return None


def report_of(run: Run, notes: Iterable[str]) -> dict[str, Any]:
    """Everything, as it goes into the JSON file."""
    settings, device = run.settings, run.settings.torch_device
    report: dict[str, Any] = {
        "environment": environment(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dry_run": settings.dry_run,
        "layers": {"stream": settings.layers, "disk": settings.disk_layers},
        "notes": list(notes),
        "parts": {
            name: {"seconds": o.seconds, "skipped": o.skipped, "error": o.error, "trace": o.trace}
            for name, o in run.outcomes.items()
        },
        **{group: run.lines(group) for group in ("gate", *GROUPS)},
    }
    for tier in ("stream", "disk"):
        report[tier] = compare_logits(report[tier])
    report["figures"] = as_json(figures(report))
    return report


def has_failed(report: dict[str, Any]) -> bool:
    """Whether a part failed, the gate's among them, or a model's logits were wrong."""
    lines = [*report["stream"], *report["disk"]]
    return any(part["error"] for part in report["parts"].values()) or any("error" in line for line in lines)


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────


def lacking(*, dry_run: bool) -> str | None:
    """Why this machine cannot run the benchmark."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch's CUDA build brings it"
    if torch.cuda.is_available() or (dry_run and is_interpreted()):
        return None
    if dry_run:
        return "no CUDA device; TRITON_INTERPRET=1 runs --dry-run on the CPU"
    return "no CUDA device; --dry-run with TRITON_INTERPRET=1 checks the script itself"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default=",".join(GROUPS), help=f"some of {', '.join(GROUPS)}; the gate is always first")
    add("--codecs", default=",".join(CODECS), help=f"some of {', '.join(CODECS)}")
    add("--minutes", type=float, default=7.5, help="in all; what does not fit is skipped")
    add("--directory", type=Path, help="for temporary files")
    add("--layers", type=int, help="of the streamed model (default: all 40, or what memory and disk hold)")
    add("--dry-run", action="store_true", help="tiny models: whether the script works")
    add("--isolate", action="store_true", help="a process for each part in a dry run too")
    add("--json", type=Path, metavar="FILE", help="write the results to this file")
    for name in ("--task", "--result"):  # for processes of its own
        add(name, type=Path, help=argparse.SUPPRESS)
    add("--part", choices=[part.name for part in (*GATES, *PARTS)], help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    for what, known in (("parts", GROUPS), ("codecs", CODECS)):
        chosen = tuple(getattr(arguments, what).split(","))
        setattr(arguments, what, chosen)
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown {what}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return arguments


def settings_for(arguments: argparse.Namespace, memory: Path, disk: Path) -> tuple[Settings, list[str]]:
    """What the parts are told, and what has to be said about it."""
    fits = fitting_layers(
        memory_bytes=available_bytes() or 0,
        folder_bytes=shutil.disk_usage(memory).free,
        in_memory=_is_in_memory(memory),
    )
    layers = fits if arguments.layers is None else arguments.layers
    disk_layers = fitting_disk_layers(shutil.disk_usage(disk).free)
    notes = [f"models in {memory.parent}, on disk in {disk.parent}"]
    if not arguments.dry_run:
        notes.append("one layer's random weights stand under the names of all layers")
        notes.append(f"from disk, {disk_layers} of 40 layers")
        if layers < LLAMA_13B.layers:
            notes.append(f"from pinned memory, only {layers} of 40 layers: memory and disk hold no more")
    device = "cpu" if is_interpreted() else "cuda"
    settings = Settings(
        device, arguments.dry_run, str(memory), str(disk), layers, disk_layers, arguments.codecs
    )
    return settings, notes


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The gate, the parts that were chosen, the report; leaves no files."""
    began = time.time()
    with ExitStack() as stack:
        settings, notes = settings_for(arguments, *folders(stack, arguments.directory))
        # Tiles that were found fastest in another run, or that are in this one, are nobody else's business.
        os.environ["XDG_CACHE_HOME"] = str(Path(settings.folder) / "cache")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        isolated = arguments.isolate or not arguments.dry_run
        run = Run(settings, isolated, deadline=began + 60 * arguments.minutes)
        run.gate()
        for part in PARTS:
            is_wanted = part.codec is None or part.codec in arguments.codecs
            if is_wanted and part.name.partition("-")[0] in arguments.parts:
                run.measure(part, missing_for(part, settings))
                _save(run, notes, arguments.json)  # whatever ends this process: what was found is there
        report = report_of(run, notes)
    return report | {"seconds": time.time() - began}


def _save(run: Run, notes: Iterable[str], file: Path | None) -> None:
    if file is not None:
        write_json(file, report_of(run, notes))


def _on_sigterm(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(143)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if arguments.part:
        part = next(part for part in (*GATES, *PARTS) if part.name == arguments.part)
        return main_of_part(part, arguments.task, arguments.result)
    reason = lacking(dry_run=arguments.dry_run)
    if reason is not None:
        print(f"bench_gpu: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _on_sigterm)  # leaves `with`, as Ctrl-C does
    print(environment_line(), flush=True)
    report = run_all(arguments)
    if arguments.json:
        write_json(arguments.json, report)
    show(report)
    where = report["gpu"] or "dry run on the CPU: these times mean nothing"
    print(f"\n{where}, {report['seconds']:.0f} s in all; endor from {bench_gpu_path.CHECKOUT}")
    return 1 if has_failed(report) else 0


if __name__ == "__main__":
    raise SystemExit(main())

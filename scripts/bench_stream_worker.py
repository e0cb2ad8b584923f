"""One contender of `bench_stream.py` in a process of its own: loads the model once, generates when told to.

A contender is a way to run the same weights with the same greedy loop. Its process is fresh, so its memory is
its own, and it is idle while another one's turn lasts. All get the same treatment before each token:

- `warm`: its files are in the page cache.
- `disk`: its files are dropped from the page cache, mappings included, and that they are gone is checked. The
  time this takes is not counted for contenders that read only inside a forward. Endor reads ahead between
  forwards, too, so for it that time is counted.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from bench_common import (
    CpuMeter,
    MemorySampler,
    anonymous_bytes,
    cached_share,
    drop_cache,
    files_of,
    forget_mappings,
    hush_transformers,
    read_from_disk_bytes,
    warm_cache,
)

__all__ = ["CONTENDERS", "DISTURBED", "Contender", "Loaded", "Models", "Turn", "Worker"]

MODES = ("disk", "warm")
PROMPT_TOKENS = 32
_STILL_CACHED = 0.01


@dataclass(frozen=True, kw_only=True)
class Models:
    """Where the same weights lie, once per format."""

    dense: Path
    endor: Path
    offload: Path
    """What `disk_offload` writes for itself."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to load the model.

    Attributes:
        title: for people.
        load: makes the model.
        files: those that a forward reads.
        reads_ahead: whether it also reads between forwards.
    """

    title: str
    load: Callable[[Models], Any]
    files: Callable[[Models], list[Path]]
    reads_ahead: bool = False


def _dense_files(models: Models) -> list[Path]:
    return files_of(models.dense, ".safetensors")


def _load_mapped(models: Models) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.dense, dtype="auto")


def _load_transformers_disk(models: Models) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.dense, dtype="auto", device_map={"": "disk"})


def _load_disk_offload(models: Models) -> Any:
    from accelerate import disk_offload

    return disk_offload(_load_mapped(models), models.offload)


def _endor(title: str, **options: Any) -> Contender:
    def load(models: Models) -> Any:
        import endor

        return endor.load(models.endor, **options)

    return Contender(
        title=title, load=load, files=lambda models: files_of(models.endor, ".safetensors"), reads_ahead=True
    )


CONTENDERS = {
    "accelerate": Contender(
        title="accelerate disk_offload",
        load=_load_disk_offload,
        files=lambda models: files_of(models.offload, ".dat"),
    ),
    "transformers": Contender(
        title="transformers device_map disk", load=_load_transformers_disk, files=_dense_files
    ),
    "mapped": Contender(title="plain from_pretrained, mapped", load=_load_mapped, files=_dense_files),
    "endor": _endor("Endor, depth 2", host_memory=0, depth=2),
    "endor-depth1": _endor("Endor, depth 1", host_memory=0, depth=1),
    "endor-depth0": _endor("Endor, depth 0", host_memory=0, depth=0),
    "endor-resident": _endor("Endor, all resident", host_memory=None),
}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading cost. `planned_bytes`: what Endor says it holds (ring, scratch, resident, dense)."""

    library_bytes: int
    load_s: float
    planned_bytes: dict[str, int] = field(default_factory=dict)
    streamed_bytes: int = 0


DISTURBED = 0.1
"""Share of the processors from which on others disturb a measurement."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One generation: token ids; for each token seconds, bytes from disk, Endor's split of the time.

    `foreign_share` is the share of the processors that other processes used during each token.
    """

    token_ids: tuple[int, ...]
    logits_digest: str
    token_s: tuple[float, ...]
    read_bytes: tuple[int, ...]
    foreign_share: tuple[float, ...]
    parts_s: tuple[dict[str, float], ...] = ()

    @property
    def counted(self) -> list[int]:
        """The tokens that count: not the first, which reads the prompt, and if possible only undisturbed."""
        later = range(1, len(self.token_s))
        return [i for i in later if self.foreign_share[i] < DISTURBED] or list(later)

    @property
    def is_clean(self) -> bool:
        """Whether at least half of the tokens after the first were undisturbed."""
        clean = sum(share < DISTURBED for share in self.foreign_share[1:])
        return 2 * clean >= len(self.token_s) - 1

    @property
    def tokens_per_s(self) -> float:
        """Over the tokens that count."""
        return len(self.counted) / sum(self.token_s[i] for i in self.counted)


class Worker:
    """The parent's handle of a contender's process. A context manager; leaving it ends the process."""

    def __init__(self, name: str, models: Models, *, threads: int) -> None:
        self.name = name
        self.peak_load_bytes = 0
        self.peak_run_bytes = 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, models, threads), daemon=True)
        self._process.start()
        theirs.close()
        with self._sampling() as sampler:
            self.loaded: Loaded = self._receive()
        self.peak_load_bytes = sampler.peak_bytes

    def run(self, mode: str, tokens: int) -> Turn:
        """One turn: generate, in this mode, so many tokens."""
        self._pipe.send((mode, tokens))
        with self._sampling() as sampler:
            turn: Turn = self._receive()
        self.peak_run_bytes = max(self.peak_run_bytes, sampler.peak_bytes)
        return turn

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _sampling(self) -> MemorySampler:
        return MemorySampler(self._pid)

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"the process of {self.name!r} has failed; its message is above") from None

    def close(self) -> None:
        """End the process. Idempotent."""
        self._pipe.close()  # ends the loop of `_serve`
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(pipe: Connection, name: str, models: Models, threads: int) -> None:
    """The process's life: load, report, then one turn per message until the pipe closes."""
    if threads:
        torch.set_num_threads(threads)
    _import_libraries()
    contender = CONTENDERS[name]
    library_bytes = anonymous_bytes()
    began = perf_counter()
    model = contender.load(models)
    load_s = perf_counter() - began
    pipe.send(_loaded(model, library_bytes=library_bytes, load_s=load_s))
    files = contender.files(models)
    while True:
        try:
            mode, tokens = pipe.recv()
        except EOFError:
            return
        pipe.send(_generate(model, files, mode=mode, tokens=tokens, reads_ahead=contender.reads_ahead))


def _import_libraries() -> None:
    """Import before memory is measured what every contender needs."""
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import endor.runtime  # noqa: F401

    hush_transformers()


def _loaded(model: Any, *, library_bytes: int, load_s: float) -> Loaded:
    if not hasattr(model, "endor_runtime"):
        return Loaded(library_bytes=library_bytes, load_s=load_s)
    from endor import BitmapTensor
    from endor.runtime import runtime_of

    runtime = runtime_of(model)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    dense = sum(t.nbytes for t in tensors if not isinstance(t, BitmapTensor))
    planned = {
        "ring": runtime.ring_bytes,
        "scratch": runtime.scratch_bytes,
        "resident": runtime.resident_bytes,
        "dense": dense,
    }
    streamed = runtime.streamed_bytes
    return Loaded(library_bytes=library_bytes, load_s=load_s, planned_bytes=planned, streamed_bytes=streamed)


def _generate(model: Any, files: list[Path], *, mode: str, tokens: int, reads_ahead: bool) -> Turn:
    """Greedy decoding of a fixed prompt, one timed forward per token."""
    if mode == "warm":
        warm_cache(files)
    forwards_before = len(_per_forward(model))
    ids = torch.arange(1, PROMPT_TOKENS + 1)[None] % model.config.vocab_size
    cache, found, token_s, read_bytes, foreign = None, [], [], [], []
    logits = torch.empty(0)
    for _ in range(tokens):
        meter, read_before, began = CpuMeter(), read_from_disk_bytes(), perf_counter()
        if mode == "disk":
            _drop(files)
            if not reads_ahead:
                began = perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[:, -1], out.past_key_values
        ids = logits.argmax(-1, keepdim=True)
        found.append(int(ids))
        token_s.append(perf_counter() - began)
        read_bytes.append(read_from_disk_bytes() - read_before)
        foreign.append(meter.foreign_share())
    forget_mappings(files)  # what this process maps would stay in the page cache for the others
    return Turn(
        token_ids=tuple(found),
        logits_digest=hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()[:16],
        token_s=tuple(token_s),
        read_bytes=tuple(read_bytes),
        foreign_share=tuple(foreign),
        parts_s=tuple(forward.seconds_by_part() for forward in _per_forward(model)[forwards_before:]),
    )


def _drop(files: list[Path]) -> None:
    for _ in range(5):
        drop_cache(files)
        if cached_share(files) < _STILL_CACHED:
            return
        time.sleep(0.05)  # pages in flight cannot be dropped
    raise SystemExit(f"{files[0].parent}: the files stay in the page cache: does another process map them?")


def _per_forward(model: Any) -> tuple[Any, ...]:
    if not hasattr(model, "endor_runtime"):
        return ()
    from endor.runtime import runtime_of

    return runtime_of(model).per_forward()

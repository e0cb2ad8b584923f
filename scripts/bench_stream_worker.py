"""One contender of `bench_stream.py` in a process of its own: loads the model once, generates when told to.

A contender is a way to run weights with the same loop. Its process is fresh, so its memory is its own, and
it is idle while another one's turn lasts. All get the same treatment before each token:

- `warm`: its files are in the page cache.
- `disk`: its files are dropped from the page cache, mappings included, and that they are gone is checked. The
  time this takes is not counted for contenders that read only inside a forward. Endor reads ahead between
  forwards, too, so for it that time is counted.
- `resident`: nothing; all weights are in the process's own memory.
"""

from __future__ import annotations

import mmap
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
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
from endor.formats import CODECS

__all__ = [
    "CONTENDERS",
    "DISTURBED",
    "MODES",
    "VALUES",
    "Contender",
    "Loaded",
    "Models",
    "Turn",
    "Worker",
    "decoded",
]

VALUES = ("auto", *CODECS)
LOSSY = tuple(name for name, codec in CODECS.items() if not codec.lossless)

MODES = ("disk", "warm", "resident")
PROMPT_TOKENS = 32
_STILL_CACHED = 0.01


@dataclass(frozen=True, kw_only=True)
class Models:
    """Where the pruned weights lie: plain, as `disk_offload` writes them for itself, packed by Endor."""

    dense: Path
    offload: Path
    packed: Mapping[str, Path]
    """By `--values`."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to load the model.

    Attributes:
        title: for people.
        load: makes the model.
        files: those that a forward reads.
        values: how the weights are packed; None where they are dense.
        reference: the contender that has the same weights and whose results are right.
        is_exact: whether its logits are the reference's, so that every token must be.
        is_dispatched: whether Endor's dispatch moves its weights.
    """

    title: str
    load: Callable[[Models], Any]
    files: Callable[[Models], list[Path]]
    values: str | None = None
    reference: str = "mapped"
    is_exact: bool = True
    is_dispatched: bool = False

    @property
    def reads_ahead(self) -> bool:
        """Whether it also reads between forwards."""
        return self.is_dispatched or self.values is not None


def _dense_files(models: Models) -> list[Path]:
    return files_of(models.dense, ".safetensors")


def _no_files(_models: Models) -> list[Path]:
    return []


def _load_mapped(models: Models) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.dense, dtype="auto")


def _load_transformers_disk(models: Models) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.dense, dtype="auto", device_map={"": "disk"})


def _load_disk_offload(models: Models) -> Any:
    from accelerate import disk_offload

    return disk_offload(_load_mapped(models), models.offload)


def _load_our_disk_offload(models: Models) -> Any:
    from endor import disk_offload

    return disk_offload(_load_mapped(models), models.offload.with_name("offload-endor"))


def _load_dense(models: Models, *, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Without the copy, the weights would stay pages of the file."""
    model = _load_mapped(models)
    for parameter in model.parameters():
        parameter.data = copy(parameter.data)
    return model


def _huge_pages_copy(tensor: torch.Tensor) -> torch.Tensor:
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def decoded(checkpoint: Path) -> Any:
    """The checkpoint's weights, decoded, in a plain transformers model: what Endor must agree with."""
    from transformers import AutoConfig, LlamaForCausalLM

    import endor

    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = LlamaForCausalLM._from_config(config, dtype=config.dtype)
    with endor.open(checkpoint) as opened:
        for name, parameter in model.named_parameters():
            parameter.data = opened.read_dense(name)
    return model


def _endor(values: str, place: str, product: str) -> Contender:
    """Endor with weights packed so, streamed or resident, products from packed weights or decoded first."""
    resident = place == "resident"
    options: dict[str, Any] = (
        {"host_memory": None} if resident else {"host_memory": 0, "depth": int(place[-1])}
    )
    if product:
        options["matmul"] = product

    def load(models: Models) -> Any:
        import endor

        return endor.load(models.packed[values], **options)

    where = "all resident" if resident else f"depth {options['depth']}"
    return Contender(
        title=f"Endor {values}, {where}{', decoded first' if product else ''}",
        load=load,
        files=lambda models: files_of(models.packed[values], ".safetensors"),
        values=values,
        reference="mapped" if values not in LOSSY else f"decoded-{values}",
        is_exact=product == "decode",
    )


def _decoded(values: str) -> Contender:
    return Contender(
        title=f"decoded {values} weights, in memory",
        load=lambda models: decoded(models.packed[values]),
        files=_no_files,
        reference=f"decoded-{values}",
    )


def _endor_contenders() -> Iterator[tuple[str, Contender]]:
    for values in VALUES:
        for place in ("", "depth0", "depth1", "depth2", "resident"):
            for product in ("", "decode"):
                name = "-".join(filter(None, ("endor", values, place, product)))
                yield name, _endor(values, place or "depth2", product)


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
    "dense": Contender(
        title="dense, in memory", load=partial(_load_dense, copy=torch.Tensor.clone), files=_no_files
    ),
    "dense-huge": Contender(
        title="dense, in memory, huge pages",
        load=partial(_load_dense, copy=_huge_pages_copy),
        files=_no_files,
    ),
    "dispatch": Contender(
        title="endor.disk_offload, dense",
        load=_load_our_disk_offload,
        files=_dense_files,
        is_dispatched=True,
    ),
    **{f"decoded-{values}": _decoded(values) for values in LOSSY},
    **dict(_endor_contenders()),
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
    """One generation. For each token: the likeliest one, seconds, bytes from disk, Endor's split of the time.

    `foreign_share` is the share of the processors that other processes used during each token; `logits` is
    float32 [tokens, vocabulary], where asked for.
    """

    token_ids: tuple[int, ...]
    token_s: tuple[float, ...]
    read_bytes: tuple[int, ...]
    foreign_share: tuple[float, ...]
    parts_s: tuple[dict[str, float], ...] = ()
    logits: npt.NDArray[np.float32] | None = None

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

    def run(self, mode: str, tokens: int, *, follow: tuple[int, ...] = (), keep_logits: bool = False) -> Turn:
        """One turn in this mode: so many tokens after the prompt, those to follow or else its own."""
        self._pipe.send({"mode": mode, "tokens": tokens, "follow": follow, "keep_logits": keep_logits})
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
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(_generate(model, files, reads_ahead=contender.reads_ahead, **request))


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


def _generate(
    model: Any,
    files: list[Path],
    *,
    mode: str,
    tokens: int,
    follow: tuple[int, ...],
    keep_logits: bool,
    reads_ahead: bool,
) -> Turn:
    """A fixed prompt and greedy decoding, or the tokens to follow; one timed forward per token."""
    if mode == "warm":
        warm_cache(files)
    forwards_before = len(_per_forward(model))
    ids = torch.arange(1, PROMPT_TOKENS + 1)[None] % model.config.vocab_size
    cache, found, token_s, read_bytes, foreign, logits = None, [], [], [], [], []
    for number in range(tokens):
        meter, read_before, began = CpuMeter(), read_from_disk_bytes(), perf_counter()
        if mode == "disk":
            _drop(files)
            if not reads_ahead:
                began = perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        found.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([[follow[number] if follow else found[-1]]])
        token_s.append(perf_counter() - began)
        read_bytes.append(read_from_disk_bytes() - read_before)
        foreign.append(meter.foreign_share())
        logits += [out.logits[0, -1].float().numpy()] if keep_logits else []
    forget_mappings(files)  # what this process maps would stay in the page cache for the others
    return Turn(
        token_ids=tuple(found),
        token_s=tuple(token_s),
        read_bytes=tuple(read_bytes),
        foreign_share=tuple(foreign),
        parts_s=tuple(forward.seconds_by_part() for forward in _per_forward(model)[forwards_before:]),
        logits=np.stack(logits) if keep_logits else None,
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

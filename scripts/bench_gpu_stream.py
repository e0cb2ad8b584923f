"""Parts of `bench_gpu.py` that run a model: their gate, and tokens per second against accelerate.

The model is a Llama of 13 B parameters, or as many of its layers as memory and disk hold. Endor has a quarter
of the compressed bytes on the device. Every contender makes greedy tokens in the same loop, which takes each
token to the host before the next forward, as anything does that shows them. The first two forwards do not
count: one reads the prompt, one is the first with a single row.
"""

from __future__ import annotations

import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gpu_kernels import Bounds, Clock
from bench_gpu_models import Recipe, dense_on, skeleton, write_endor, write_offload
from bench_gpu_parts import Deadline, Settings

from bench_common import DiskProbe, LlamaShape, cached_share, drop_cache, files_of, hush_transformers, median

__all__ = [
    "LLAMA_13B",
    "bench_accelerate",
    "bench_endor",
    "gate_model",
    "stream_shape",
    "without_interpreter",
]

LLAMA_13B = LlamaShape(
    hidden=5120, layers=40, intermediate=13824, vocabulary=32_000, heads=40, key_value_heads=40
)
LLAMA_GATE = LlamaShape(
    hidden=1024, layers=6, intermediate=2816, vocabulary=2_000, heads=8, key_value_heads=4
)
LLAMA_TINY = LlamaShape(hidden=64, layers=3, intermediate=104, vocabulary=100, heads=2, key_value_heads=1)
DEVICE_SHARE = 0.25
"""Of the compressed bytes, that may stay on the device."""
PROMPT_TOKENS = 32
SETTLING = 2
"""Forwards that do not count."""
GATE_TOKENS = 12
DRY_TOKENS = 4
TOLERANCES = {"decode": 0.005, "auto": 0.05}
"""Of the norm of the dense model's logits. Decoded first they should have the same bits, unless cuBLAS takes
another kernel for the same matrix elsewhere; products in another order: see bench_stream.py."""
_LINK_BYTES = 1 << 30


def stream_shape(settings: Settings, tier: str) -> LlamaShape:
    """Of the model that is streamed from this tier, `host` or `disk`."""
    if settings.dry_run:
        return LLAMA_TINY
    return replace(LLAMA_13B, layers=settings.layers if tier == "host" else settings.disk_layers)


@contextmanager
def without_interpreter() -> Iterator[None]:
    """In Triton's interpreter a product takes a second: a dry run's models use the CPU's own kernels."""
    found = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if found is not None:
            os.environ["TRITON_INTERPRET"] = found


# ── one loop for all ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Turn:
    """One generation.

    Attributes:
        ids: greedy tokens.
        seconds: of each.
        logits: float32 [vocabulary] after the prompt, on the host.
        before, after: Endor's totals around the tokens that count.
    """

    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    before: Any = None
    after: Any = None

    @property
    def counted_s(self) -> list[float]:
        return self.seconds[SETTLING:]

    @property
    def tokens_per_s(self) -> float:
        return len(self.counted_s) / sum(self.counted_s)


def generate(
    model: Any,
    device: torch.device,
    tokens: int,
    *,
    prepare: Callable[[], object] | None = None,
    counts_preparing: bool = False,
    deadline: Deadline | None = None,
) -> Turn:
    """Greedy tokens after a fixed prompt.

    Args:
        prepare: called before each forward, to empty caches.
        counts_preparing: for contenders that read ahead between forwards, which this then pays for.
        deadline: no more tokens once it is near, but one that counts.
    """
    from transformers import DynamicCache

    turn, cache = Turn(), {_cache_name(model): DynamicCache(config=model.config)}
    ids = torch.arange(1, PROMPT_TOKENS + 1, device=device)[None] % model.config.vocab_size
    for number in range(tokens):
        if number == SETTLING:
            turn.before = _stats(model)
        began = time.perf_counter()
        if prepare is not None:
            prepare()
        if not counts_preparing:
            began = time.perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
        ids = out.logits[:, -1:].argmax(-1).to(device)
        turn.ids.append(int(ids))
        turn.seconds.append(time.perf_counter() - began)
        if number == 0:
            turn.logits = out.logits[0, -1].float().cpu()
        if deadline and number >= SETTLING and deadline.left_s < 2 * turn.seconds[-1]:
            deadline.skipped.append(f"{tokens - number - 1} of {tokens} tokens, for lack of time")
            break
    turn.after = _stats(model)
    return turn


def _cache_name(model: Any) -> str:
    """What this version of transformers calls the argument for keys and values."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _stats(model: Any) -> Any:
    if not hasattr(model, "endor_runtime"):
        return None
    from endor.runtime import runtime_of

    return runtime_of(model).stats()


def load(directory: Path, settings: Settings, tier: str, **options: Any) -> Any:
    """`endor.load` with the weights in this tier: `device` (all of them), `host` or `disk`.

    A dry run on a CPU takes it for a device with memory of its own, so that it goes the same way.
    """
    import endor
    from endor.loaders import BlockingAccelerator

    device = settings.torch_device
    with endor.open(directory) as checkpoint:
        nbytes = sum(block.nbytes for block in checkpoint.blocks)
    return endor.load(
        directory,
        device=device if device.type == "cuda" else BlockingAccelerator(device),
        device_memory=None if tier == "device" else int(DEVICE_SHARE * nbytes),
        host_memory=0 if tier == "disk" else None,
        **options,
    )


def close(model: Any) -> None:
    from endor.runtime import runtime_of

    runtime_of(model).close()


# ── correctness ─────────────────────────────────────────────────────────────────────────────────────────────


def gate_model(settings: Settings, codec: str) -> Iterator[dict[str, Any]]:
    """One line, or AssertionError: a small model, streamed, says what it says resident and dense."""
    hush_transformers()
    _no_tuning()
    device = settings.torch_device
    shape, tokens = (LLAMA_TINY, DRY_TOKENS) if settings.dry_run else (LLAMA_GATE, GATE_TOKENS)
    recipe = Recipe(shape, distinct=1 if settings.dry_run else shape.layers)
    directory = Path(settings.folder) / f"gate-{codec}"
    write_endor(directory, recipe, codec, device)
    dense = generate(dense_on(recipe, device, made_on=device, codec=codec), device, tokens)
    turns = {}
    for tier, matmul in (("device", "decode"), ("host", "decode"), ("disk", "decode"), ("host", "auto")):
        model = load(directory, settings, tier, matmul=matmul)
        turns[tier, matmul] = turn = generate(model, device, tokens)
        _assert_streams(turn, tier, codec)
        close(model)
    resident = turns["device", "decode"]
    for tier in ("host", "disk"):
        _assert_same(turns[tier, "decode"], resident, f"{codec} from {tier}", "resident")
    errors = {matmul: _error(turns["host", matmul], dense) for matmul in TOLERANCES}
    for matmul, error in errors.items():
        within = error <= TOLERANCES[matmul]
        assert within, f"{codec}, matmul={matmul}: logits {error:.2%} from the dense model's"
    shutil.rmtree(directory)
    yield {
        "step": "model",
        "codec": codec,
        "tokens": tokens,
        "logits_error": errors["decode"],
        "same_tokens": _agreeing(resident.ids, dense.ids),
        "auto_logits_error": errors["auto"],
        "auto_same_tokens": _agreeing(turns["host", "auto"].ids, dense.ids),
    }


def _assert_streams(turn: Turn, tier: str, codec: str) -> None:
    """A model that fits would prove nothing about streaming, nor one that streams about being resident."""
    crossed = turn.after.disk_bytes + turn.after.host_bytes
    if tier != "device":
        assert crossed > 0, f"{codec}, {tier}: nothing was streamed"
    else:
        assert crossed == 0, f"{codec}: {crossed} bytes were streamed of what should be resident"


def _no_tuning() -> None:
    """What is fastest is not to be found out, and remembered, while others use the device."""
    from endor.kernels import triton_matmul

    triton_matmul.set_tuning(allowed=False)


def _assert_same(turn: Turn, other: Turn, what: str, against: str) -> None:
    assert turn.ids == other.ids, f"{what}: tokens {turn.ids}, {against} {other.ids}"
    assert torch.equal(turn.logits, other.logits), f"{what}: the logits are not the bits of {against}"


def _error(turn: Turn, other: Turn) -> float:
    """How far the logits after the prompt are apart, relative to their norm."""
    return float((turn.logits - other.logits).norm() / other.logits.norm())


def _agreeing(ids: list[int], others: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(ids), len(others)))


# ── contenders ──────────────────────────────────────────────────────────────────────────────────────────────


def bench_endor(
    settings: Settings, deadline: Deadline, *, codec: str, tier: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """One line: Endor with this codec, streaming from `host` or `disk`."""
    hush_transformers()
    device, shape = settings.torch_device, stream_shape(settings, tier)
    tokens = min(tokens, DRY_TOKENS) if settings.dry_run else tokens
    directory = _room(settings, tier) / f"{tier}-{codec}"
    try:
        began = time.perf_counter()
        nbytes = write_endor(directory, Recipe(shape, distinct=1), codec, device)
        written_s = time.perf_counter() - began
        bounds = Bounds.measured(Clock(device, 5), 1 << 16 if settings.dry_run else _LINK_BYTES)
        began = time.perf_counter()
        model = load(directory, settings, tier)
        loaded_s = time.perf_counter() - began
        options, disk = _from_disk(files_of(directory, ".safetensors"), tier)
        turn = generate(model, device, tokens, counts_preparing=True, deadline=deadline, **options)
        yield {
            **_line(settings, shape, turn, tier, f"endor {codec}"),
            **_endor_figures(turn, bounds.link if disk is None else disk),
            "compressed_bytes": nbytes,
            "link_bytes_per_s": bounds.link,
            "disk_bytes_per_s": disk,
            "write_s": written_s,
            "load_s": loaded_s,
            "codec": codec,
        }
        close(model)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def bench_accelerate(
    settings: Settings, deadline: Deadline, *, tier: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """One line: accelerate's `cpu_offload` or `disk_offload` with the dense weights of the same model."""
    import accelerate

    hush_transformers()
    device, shape = settings.torch_device, stream_shape(settings, tier)
    recipe = Recipe(shape, distinct=1)
    if tier == "host":
        model = dense_on(recipe, torch.device("cpu"), made_on=device)
        accelerate.cpu_offload(model, execution_device=device)
        turn = generate(model, device, tokens, deadline=deadline)
        yield _line(settings, shape, turn, tier, "accelerate cpu_offload")
        return
    directory = _room(settings, tier) / f"{tier}-accelerate"
    try:
        write_offload(directory, recipe, device)
        model = skeleton(shape)
        accelerate.disk_offload(model, str(directory), execution_device=device)
        options, disk = _from_disk(files_of(directory, ".dat"), tier, probe=False)
        turn = generate(model, device, tokens, deadline=deadline, **options)
        yield _line(settings, shape, turn, tier, "accelerate disk_offload") | {"disk_bytes_per_s": disk}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _room(settings: Settings, tier: str) -> Path:
    return Path(settings.disk if tier == "disk" else settings.folder)


def _from_disk(files: list[Path], tier: str, *, probe: bool = True) -> tuple[dict[str, Any], float | None]:
    """How to generate from these files, and what the disk gives at most, in bytes per second."""
    if tier != "disk":
        return {}, None
    rate = None
    if probe:
        with DiskProbe(files) as probed:
            rate = median(probed.bytes_per_s() for _ in range(2))
    os.sync()  # what waits to be written cannot be dropped
    drop_cache(files)
    share = cached_share(files)
    assert share < 0.02, f"{files[0].parent}: {share:.0%} of the files stay in the page cache"
    return {"prepare": partial(drop_cache, files)}, rate


def _line(settings: Settings, shape: LlamaShape, turn: Turn, tier: str, title: str) -> dict[str, Any]:
    file = Path(settings.folder) / f"{tier}-{title.replace(' ', '-')}.logits.pt"
    torch.save(turn.logits, file)
    return {
        "tier": tier,
        "title": title,
        "layers": shape.layers,
        "tokens_per_s": turn.tokens_per_s,
        "tokens": len(turn.counted_s),
        "prompt_s": turn.seconds[0],
        "token_s": turn.counted_s,
        "ids": turn.ids,
        "logits": str(file),
    }


def _endor_figures(turn: Turn, bound: float) -> dict[str, Any]:
    """What Endor counted over the tokens that count, beside what crosses a link of `bound` bytes/s."""
    spent, tokens = turn.after - turn.before, len(turn.counted_s)
    crossed = (spent.disk_bytes + spent.host_bytes) / tokens
    return {
        "crossed_bytes": crossed,
        "disk_share": spent.disk_bytes / tokens / crossed if crossed else 0.0,
        "bytes_by_tier": {name: count / tokens for name, count in spent.bytes_by_tier().items()},
        "seconds_by_part": {name: s / tokens for name, s in spent.seconds_by_part().items()},
        "bound_tokens_per_s": bound / crossed if crossed else None,
        "of_bound": crossed * turn.tokens_per_s / bound,
        "stall_share": spent.stall_s / sum(turn.counted_s),
    }

"""Parts of `bench_gpu.py` about kernels: their gate, the bounds, decoding, products, a ring without a model.

Times are medians of CUDA events, with the second-level cache overwritten before each. Everything is encoded
on the device by the reference backend: nothing needs the native extension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from bench_gpu_parts import Deadline, Settings

from bench_common import median
from endor.formats.layout import SECTION_ALIGNMENT_BYTES, align_up
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode

if TYPE_CHECKING:
    from endor.kernels.triton_launch import DecodeGroup

__all__ = [
    "CODECS",
    "LOSSLESS",
    "Bounds",
    "Clock",
    "bench_bounds",
    "bench_decode",
    "bench_matmul",
    "bench_ring",
    "gate_kernels",
    "pinned",
    "pruned",
    "same_bits",
]

CODECS = ("raw", "exponent", "int8", "int4")
LOSSLESS = ("raw", "exponent")
LLAMA_13B_BLOCK = (*((5120, 5120),) * 4, (13824, 5120), (13824, 5120), (5120, 13824))
Shape = tuple[int, int]


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        decode_shape, matmul_shapes: of the matrices that are measured.
        block: the matrices of a decoder layer.
        gate_rows: of the matrices in which every kernel is checked, as wide as those that are measured.
        gate_tiles: of each kind whose products are checked there.
        x_rows: of the other factor.
        copy_bytes: for the bounds.
        blocks: that go through the ring.
        turns: of which the median counts.
    """

    decode_shape: Shape = (4096, 11008)
    matmul_shapes: tuple[Shape, ...] = ((4096, 11008), (8192, 28672))
    block: tuple[Shape, ...] = LLAMA_13B_BLOCK
    gate_rows: int = 512
    gate_tiles: int = 16
    x_rows: tuple[int, ...] = (1, 4, 16)
    copy_bytes: int = 2 << 30
    blocks: int = 24
    turns: int = 15

    @classmethod
    def of(cls, settings: Settings) -> Scale:
        if not settings.dry_run:
            return cls()
        return cls((2, 300), ((2, 300),), ((2, 300), (2, 300)), 2, 1, (1, 2), 1 << 16, 2, 1)


@dataclass(frozen=True)
class Clock:
    """Times work on one device."""

    device: torch.device
    turns: int
    _flush: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, run: Callable[[], object]) -> float:
        """Median seconds of `run`, whose operands are in no cache."""
        run()
        return median(self._turn(run) for _ in range(self.turns))

    def _turn(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        if not self._flush:
            self._flush.append(torch.empty(256 << 20, dtype=torch.uint8, device=self.device))
        self._flush[0].zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def pruned(shape: Shape, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normally distributed bf16, the smaller half of each row zeroed."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, device=device) * 0.02
    limit = weight.abs().median(dim=1, keepdim=True).values
    return torch.where(weight.abs() >= limit, weight, 0.0).bfloat16()


def pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed host memory that the device can copy from by itself."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two bf16 tensors have the same bits."""
    return a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


# ── correctness ─────────────────────────────────────────────────────────────────────────────────────────────


def gate_kernels(settings: Settings, codec: str) -> Iterator[dict[str, Any]]:
    """One line, or AssertionError: all kernels of a codec, at all widths that are measured.

    This also compiles them, for the parts that follow.
    """
    from endor.kernels import triton_matmul

    triton_matmul.set_tuning(allowed=False)  # others use the device now: what is fastest shows later
    scale, device = Scale.of(settings), settings.torch_device
    shapes = {scale.block[-1], *((scale.gate_rows, cols) for _, cols in _all_shapes(scale))}
    checked = 0
    for shape in sorted(shapes):
        weight = pruned(shape, device)
        for mask in ("bitmap", "dense")[: 1 if codec == "raw" else 2]:
            packed = encode(weight, values=codec, mask=mask, backend="reference")
            expected = decode(packed, backend="reference")
            where = f"{codec}, mask {mask}, {shape[0]}x{shape[1]}"
            assert same_bits(decode(packed, backend="triton"), expected), f"{where}: wrong bits"
            assert codec not in LOSSLESS or same_bits(expected, weight), f"{where}: not lossless"
            checked += 1
            if mask == "bitmap":
                checked += _check_products(packed, expected, scale, where)
    _check_group(scale, codec, device)
    yield {"step": "kernels", "codec": codec, "checked": checked + 1}


def _all_shapes(scale: Scale) -> tuple[Shape, ...]:
    return (scale.decode_shape, *scale.matmul_shapes, *scale.block)


def _check_products(packed: PackedTensor, dense: torch.Tensor, scale: Scale, where: str) -> int:
    """Raise AssertionError unless every tile's product is float32 sums, rounded to bf16 once."""
    from endor.kernels import triton_matmul

    checked = 0
    for rows in scale.x_rows:
        x = torch.randn(rows, dense.shape[1], device=dense.device).bfloat16()
        exact = x.double() @ dense.double().T
        size = (x.double().square() @ dense.double().square().T).sqrt()
        bound = 8 * 2**-23 * x.shape[1] ** 0.5 * size + 2**-8 * exact.abs()
        for tile in triton_matmul.tiles(rows)[: scale.gate_tiles]:
            y = triton_matmul.linear(x, packed, tile=tile)
            assert y is not None, f"{where}: no product with {rows} rows"
            is_right = ((y.double() - exact).abs() <= bound).all()
            assert is_right, f"{where}: the product with {rows} rows and {tile} is wrong"
            checked += 1
    return checked


def _check_group(scale: Scale, codec: str, device: torch.device) -> None:
    """Raise AssertionError unless a grouped launch decodes matrices as wide as a layer's to their bits."""
    from endor.kernels.triton_launch import DecodeGroup

    weights = [pruned((scale.gate_rows, cols), device, i) for i, (_, cols) in enumerate(scale.block)]
    packed = [encode(weight, values=codec, backend="reference") for weight in weights]
    jobs = [(p, torch.full_like(w, float("nan"))) for p, w in zip(packed, weights, strict=True)]
    group = DecodeGroup(jobs)
    group.launch()
    group.raise_for()
    for p, out in jobs:
        assert same_bits(out, decode(p, backend="reference")), f"{codec}: wrong bits from a grouped launch"


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Bounds:
    """What the machine can do; bytes per second.

    Attributes:
        copy: within the device, bytes read plus bytes written.
        link: from pinned memory to the device.
    """

    copy: float
    link: float

    @classmethod
    def measured(cls, clock: Clock, copy_bytes: int) -> Bounds:
        source = torch.zeros(copy_bytes, dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        copy_s = clock(partial(target.copy_, source))
        host = pinned(copy_bytes, clock.device)
        link_s = clock(partial(target.copy_, host, non_blocking=True))
        return cls(2 * copy_bytes / copy_s, copy_bytes / link_s)


def _clock(settings: Settings) -> tuple[Clock, Scale, Bounds]:
    scale = Scale.of(settings)
    clock = Clock(settings.torch_device, scale.turns)
    return clock, scale, Bounds.measured(clock, scale.copy_bytes)


def bench_bounds(settings: Settings, _: Deadline) -> Iterator[dict[str, Any]]:
    """One line."""
    bounds = _clock(settings)[2]
    yield {"copy": bounds.copy, "link": bounds.link}


# ── decode ──────────────────────────────────────────────────────────────────────────────────────────────────


def bench_decode(settings: Settings, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """One line per codec and mask for a matrix alone, then one per codec for a layer in a `DecodeGroup`."""
    from endor.kernels.triton_launch import launch_decode, new_status

    clock, scale, bounds = _clock(settings)
    weight = pruned(scale.decode_shape, clock.device)
    out, status = torch.empty_like(weight), new_status(clock.device)
    for codec, mask in ((c, m) for m in ("bitmap", "dense") for c in settings.codecs):
        if (codec, mask) == ("raw", "dense") or not deadline.allows(2, f"a matrix, {codec}, mask {mask}"):
            continue
        packed = encode(weight, values=codec, mask=mask, backend="reference")
        taken = clock(partial(launch_decode, packed, 0, packed.layout.geometry.row_blocks, out, status))
        moved = packed.layout.nbytes + packed.layout.dense_bytes
        yield _decode_line("matrix", codec, mask, moved / taken, bounds) | {"ms": 1e3 * taken}
    for codec in settings.codecs:
        if not deadline.allows(4, f"a layer, {codec}"):
            continue
        ring = Ring(scale, codec, clock.device)
        taken = clock(ring.groups[0].launch)
        ring.groups[0].raise_for()
        moved = sum(p.layout.nbytes + p.layout.dense_bytes for p in ring.packed)
        yield _decode_line("layer", codec, "bitmap", moved / taken, bounds) | {"ms": 1e3 * taken}


def _decode_line(what: str, codec: str, mask: str, rate: float, bounds: Bounds) -> dict[str, Any]:
    return {"what": what, "codec": codec, "mask": mask, "bytes_per_s": rate, "of_copy": rate / bounds.copy}


# ── matmul ──────────────────────────────────────────────────────────────────────────────────────────────────


def bench_matmul(settings: Settings, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """One line per shape, number of rows and contender; `ms` and how many times as fast as dense cuBLAS."""
    from endor.kernels import triton_matmul
    from endor.kernels.triton_launch import new_status

    scale = Scale.of(settings)
    clock = Clock(settings.torch_device, scale.turns)
    status = new_status(clock.device)
    for shape in scale.matmul_shapes:
        weight = pruned(shape, clock.device)
        first = partial(_decode_first, torch.empty_like(weight), status)
        dense_s = {}
        for rows in scale.x_rows:
            x = _ones(rows, shape, clock)
            dense_s[rows] = clock(partial(F.linear, x, weight))
            yield _matmul_line(shape, rows, "dense", dense_s[rows], dense_s[rows])
        for codec in settings.codecs:
            if not deadline.allows(6, f"{shape[0]}x{shape[1]}, {codec}"):
                continue
            packed = encode(weight, values=codec, mask="bitmap", backend="reference")
            for rows in scale.x_rows:
                x = _ones(rows, shape, clock)
                tile = triton_matmul.tune(packed, rows, clock)
                fused = partial(triton_matmul.linear, x, packed, status=status, tile=tile)
                first_s, fused_s = clock(partial(first, packed, x)), clock(fused)
                yield _matmul_line(shape, rows, f"decode {codec}", first_s, dense_s[rows])
                yield _matmul_line(shape, rows, codec, fused_s, dense_s[rows]) | {"tile": str(tile)}


def _ones(rows: int, shape: Shape, clock: Clock) -> torch.Tensor:
    return torch.ones(rows, shape[1], device=clock.device, dtype=torch.bfloat16)


def _decode_first(
    scratch: torch.Tensor, status: torch.Tensor, packed: PackedTensor, x: torch.Tensor
) -> torch.Tensor:
    """What a product costs without a kernel of its own."""
    from endor.kernels.triton_launch import launch_decode

    launch_decode(packed, 0, packed.layout.geometry.row_blocks, scratch, status)
    return F.linear(x, scratch)


def _matmul_line(shape: Shape, rows: int, what: str, taken: float, dense_s: float) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "rows": rows,
        "what": what,
        "ms": 1e3 * taken,
        "times_dense": dense_s / taken,
    }


# ── a ring without a model ──────────────────────────────────────────────────────────────────────────────────


class Ring:
    """A packed block in pinned memory, and two slots on the device that it is copied to and decoded from."""

    def __init__(self, scale: Scale, codec: str, device: torch.device) -> None:
        self.device = device
        self.packed = [
            encode(pruned(shape, device, seed), values=codec, mask="bitmap", backend="reference")
            for seed, shape in enumerate(scale.block)
        ]
        self.nbytes = sum(
            align_up(section.nbytes, SECTION_ALIGNMENT_BYTES)
            for packed in self.packed
            for section in packed.sections.values()
        )
        self.host = pinned(self.nbytes, device)
        self.slots = [torch.zeros(self.nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.out = [torch.empty(p.layout.shape, dtype=p.layout.dtype, device=device) for p in self.packed]
        for source, target in zip(self.packed, self.placed(self.host), strict=True):
            for name, section in source.sections.items():
                target.sections[name].copy_(section)
        for slot in self.slots:
            slot.copy_(self.host)

    def placed(self, arena: torch.Tensor) -> list[PackedTensor]:
        """The block's tensors with their sections in `arena`, one behind the other."""
        placed, at = [], 0
        for packed in self.packed:
            sections = {}
            for name, section in packed.sections.items():
                memory = arena[at : at + section.nbytes]
                sections[name] = memory.view(section.dtype).view(section.shape)
                at += align_up(section.nbytes, SECTION_ALIGNMENT_BYTES)
            placed.append(PackedTensor(packed.layout, sections))
        return placed

    @cached_property
    def groups(self) -> list[DecodeGroup]:
        """Decoding from each slot, to the same memory: who used a block is done when the next one comes."""
        from endor.kernels.triton_launch import DecodeGroup

        return [DecodeGroup(list(zip(self.placed(slot), self.out, strict=True))) for slot in self.slots]

    def run(self, blocks: int) -> None:
        """Stream the block so many times: copies on a stream of their own, a slot guarded by two events."""
        if self.device.type != "cuda":
            for number in range(blocks):
                self.slots[number % 2].copy_(self.host)
                self.groups[number % 2].launch()
            return
        copies, decodes = torch.cuda.Stream(), torch.cuda.current_stream()
        copies.wait_stream(decodes)
        freed: list[Any] = [None, None]
        for number in range(blocks):
            slot = number % 2
            with torch.cuda.stream(copies):
                if freed[slot] is not None:
                    copies.wait_event(freed[slot])
                self.slots[slot].copy_(self.host, non_blocking=True)
                arrived = copies.record_event()
            decodes.wait_event(arrived)
            self.groups[slot].launch()
            freed[slot] = decodes.record_event()


def bench_ring(settings: Settings, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """One line per codec: ms per layer, and those that the link and decoding would take alone."""
    clock, scale, bounds = _clock(settings)
    for codec in settings.codecs:
        if not deadline.allows(6, codec):
            continue
        ring = Ring(scale, codec, clock.device)
        decode_s = clock(ring.groups[0].launch)
        taken = clock(partial(ring.run, scale.blocks)) / scale.blocks
        for group, placed in zip(ring.groups, map(ring.placed, ring.slots), strict=True):
            group.raise_for()
            for packed, out in zip(placed, ring.out, strict=True):
                assert same_bits(out, decode(packed, backend="reference")), f"{codec}: wrong bits in a slot"
        link_s = ring.nbytes / bounds.link
        yield {
            "codec": codec,
            "launches": ring.groups[0].launches,
            "block_bytes": ring.nbytes,
            "ms": 1e3 * taken,
            "link_ms": 1e3 * link_s,
            "decode_ms": 1e3 * decode_s,
            "of_link": link_s / taken,
            "decode_share": decode_s / taken,
        }

"""Speed of the GPU kernels in one run: decoding, products from packed weights, and streaming over the link.

    python scripts/bench_gpu.py [--json FILE] [--dry-run]

Needs a CUDA device and Triton, takes a few minutes, installs and downloads nothing. First everything is
checked against the reference; a wrong bit ends the run before any speed is shown. Bounds are measured in the
same run: copying within the device (bytes read plus bytes written), and copying from pinned memory to it.
Times are medians of CUDA events, with the second-level cache overwritten before each.

- decode: GB/s read plus written, and its share of the copy bandwidth; one matrix alone, and a whole block of
  a 13 B Llama in a `DecodeGroup`;
- matmul: milliseconds of `F.linear` with the dense weight (cuBLAS), of decoding first, and straight from the
  sections, for 1, 4 and 16 rows of x;
- stream: blocks of that Llama, packed in pinned memory, copied to two slots on a stream of their own and
  decoded from there; seconds per block beside those that the link alone needs, and decoding's share.

`--dry-run` goes through all of it with tiny matrices, on the CPU if TRITON_INTERPRET=1: it shows that the
script works, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from bench_common import environment, environment_line, median, print_table, write_json
from endor.formats.layout import SECTION_ALIGNMENT_BYTES, align_up
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode
from endor.kernels.triton_backend import is_interpreted

if TYPE_CHECKING:
    from endor.kernels.triton_launch import DecodeGroup

CODECS = ("raw", "exponent", "int8", "int4")
LLAMA_13B_BLOCK = (*((5120, 5120),) * 4, (13824, 5120), (13824, 5120), (5120, 13824))
GB = 1e9


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    decode_shape: tuple[int, int] = (4096, 11008)
    matmul_shapes: tuple[tuple[int, int], ...] = ((4096, 11008), (8192, 28672))
    block: tuple[tuple[int, int], ...] = LLAMA_13B_BLOCK
    x_rows: tuple[int, ...] = (1, 4, 16)
    copy_bytes: int = 2 << 30
    blocks: int = 24
    turns: int = 15


TINY = Scale((2, 300), ((2, 300),), ((2, 300), (1, 300)), (1, 2), 1 << 16, 3, 1)


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


def pruned(shape: tuple[int, int], device: torch.device, seed: int = 0) -> torch.Tensor:
    """Normally distributed bf16, the smaller half of each row zeroed."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, device=device) * 0.02
    limit = weight.abs().median(dim=1, keepdim=True).values
    return torch.where(weight.abs() >= limit, weight, 0.0).bfloat16()


# ── correctness ─────────────────────────────────────────────────────────────────────────────────────────────


def check(device: torch.device, scale: Scale) -> None:
    """Raises AssertionError unless every codec decodes to the reference's bits and multiplies well."""
    weight = pruned(scale.block[-1], device)
    for codec in CODECS:
        packed = encode(weight, values=codec, mask="bitmap", backend="reference")
        expected = decode(packed, backend="reference")
        assert _same_bits(decode(packed, backend="triton"), expected), f"{codec}: wrong bits"
        if codec in {"raw", "exponent"}:
            assert _same_bits(expected, weight), f"{codec}: not lossless"
        for rows in scale.x_rows:
            check_product(packed, expected, rows)


def check_product(packed: PackedTensor, dense: torch.Tensor, rows: int) -> None:
    """Raises AssertionError unless a product is float32 sums, rounded to bf16 once."""
    from endor.kernels import triton_matmul

    x = torch.randn(rows, dense.shape[1], device=dense.device).bfloat16()
    y = triton_matmul.linear(x, packed)
    assert y is not None, f"{packed.layout.codec}: no product"
    exact = x.double() @ dense.double().T
    size = (x.double().square() @ dense.double().square().T).sqrt()
    bound = 8 * 2**-23 * x.shape[1] ** 0.5 * size + 2**-8 * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all(), f"{packed.layout.codec}: a product is wrong"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Bounds:
    """What the machine can do; bytes per second."""

    copy: float
    link: float

    @classmethod
    def measured(cls, clock: Clock, scale: Scale) -> Bounds:
        source = torch.zeros(scale.copy_bytes, dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        copy_s = clock(partial(target.copy_, source))
        host = pinned(scale.copy_bytes, clock.device)
        link_s = clock(partial(target.copy_, host, non_blocking=True))
        return cls(2 * scale.copy_bytes / copy_s, scale.copy_bytes / link_s)


def pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed host memory that the device can copy from by itself."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


# ── decode ──────────────────────────────────────────────────────────────────────────────────────────────────


def bench_decode(clock: Clock, scale: Scale, bounds: Bounds) -> Iterator[dict[str, Any]]:
    """One line per codec and mask for a matrix alone, then for a block."""
    from endor.kernels.triton_launch import launch_decode, new_status

    weight = pruned(scale.decode_shape, clock.device)
    out, status = torch.empty_like(weight), new_status(clock.device)
    for codec, mask in ((c, m) for m in ("bitmap", "dense") for c in CODECS if (c, m) != ("raw", "dense")):
        packed = encode(weight, values=codec, mask=mask, backend="reference")
        taken = clock(partial(launch_decode, packed, 0, packed.layout.geometry.row_blocks, out, status))
        moved = packed.layout.nbytes + packed.layout.dense_bytes
        yield _decode_line("matrix", codec, mask, moved, taken, bounds)
    for codec in CODECS:
        ring = Ring(scale, codec, clock.device)
        taken = clock(ring.groups[0].launch)
        ring.groups[0].raise_for()
        moved = sum(p.layout.nbytes + p.layout.dense_bytes for p in ring.packed)
        yield _decode_line("block", codec, "bitmap", moved, taken, bounds)


def _decode_line(  # noqa: PLR0917 - one call per line of a table
    what: str, codec: str, mask: str, moved: int, taken: float, bounds: Bounds
) -> dict[str, Any]:
    rate = moved / taken
    return {
        "what": what,
        "codec": codec,
        "mask": mask,
        "ms": 1e3 * taken,
        "bytes_per_s": rate,
        "of_copy": rate / bounds.copy,
    }


# ── matmul ──────────────────────────────────────────────────────────────────────────────────────────────────


def bench_matmul(clock: Clock, scale: Scale) -> Iterator[dict[str, Any]]:
    """One line per shape, number of rows and contender."""
    from endor.kernels import triton_matmul
    from endor.kernels.triton_launch import new_status

    status = new_status(clock.device)
    for shape in scale.matmul_shapes:
        weight = pruned(shape, clock.device)
        first = partial(decode_first, torch.empty_like(weight), status)
        weights = {c: encode(weight, values=c, mask="bitmap", backend="reference") for c in CODECS}
        for rows in scale.x_rows:
            x = torch.randn(rows, shape[1], device=clock.device).bfloat16()
            dense_s = clock(partial(F.linear, x, weight))
            yield _matmul_line(shape, rows, "dense", dense_s, dense_s)
            for codec, packed in weights.items():
                tile = triton_matmul.tune(packed, rows, clock)
                fused = partial(triton_matmul.linear, x, packed, status=status)
                yield _matmul_line(shape, rows, f"decode {codec}", clock(partial(first, packed, x)), dense_s)
                yield _matmul_line(shape, rows, codec, clock(fused), dense_s) | {"tile": str(tile)}


def decode_first(
    scratch: torch.Tensor, status: torch.Tensor, packed: PackedTensor, x: torch.Tensor
) -> torch.Tensor:
    """What a product costs without a kernel of its own."""
    from endor.kernels.triton_launch import launch_decode

    launch_decode(packed, 0, packed.layout.geometry.row_blocks, scratch, status)
    return F.linear(x, scratch)


def _matmul_line(
    shape: tuple[int, int], rows: int, what: str, taken: float, dense_s: float
) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "rows": rows,
        "what": what,
        "ms": 1e3 * taken,
        "times_dense": dense_s / taken,
    }


# ── stream ──────────────────────────────────────────────────────────────────────────────────────────────────


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


def bench_stream(clock: Clock, scale: Scale, bounds: Bounds) -> Iterator[dict[str, Any]]:
    """One line per codec: seconds per block, and those that the link and decoding would take alone."""
    for codec in CODECS:
        ring = Ring(scale, codec, clock.device)
        decode_s = clock(ring.groups[0].launch)
        taken = clock(partial(ring.run, scale.blocks)) / scale.blocks
        for group, placed in zip(ring.groups, map(ring.placed, ring.slots), strict=True):
            group.raise_for()
            for packed, out in zip(placed, ring.out, strict=True):
                assert _same_bits(out, decode(packed, backend="reference")), f"{codec}: wrong bits in a slot"
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


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────


def show(report: dict[str, Any]) -> None:
    bounds = report["bounds"]
    print(
        f"device copy {bounds['copy'] / GB:.0f} GB/s read plus written, link {bounds['link'] / GB:.1f} GB/s\n"
    )
    print_table(
        ["decode", "codec", "mask", "ms", "GB/s", "of copy"],
        [
            (
                r["what"],
                r["codec"],
                r["mask"],
                f"{r['ms']:.3f}",
                f"{r['bytes_per_s'] / GB:.0f}",
                f"{r['of_copy']:.2f}",
            )
            for r in report["decode"]
        ],
    )
    print()
    print_table(
        ["matmul", "rows", "shape", "ms", "times dense"],
        [
            (
                r["what"],
                str(r["rows"]),
                "x".join(map(str, r["shape"])),
                f"{r['ms']:.3f}",
                f"{r['times_dense']:.2f}",
            )
            for r in report["matmul"]
        ],
    )
    print()
    print_table(
        ["stream", "MB per block", "ms per block", "link alone", "of link", "decode share", "launches"],
        [
            (
                r["codec"],
                f"{r['block_bytes'] / 1e6:.0f}",
                f"{r['ms']:.2f}",
                f"{r['link_ms']:.2f}",
                f"{r['of_link']:.1%}",
                f"{r['decode_share']:.1%}",
                str(r["launches"]),
            )
            for r in report["stream"]
        ],
    )


def lacking(*, dry_run: bool) -> str | None:
    """Why this machine cannot run the benchmark."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch's CUDA build brings it"
    if torch.cuda.is_available() or (dry_run and is_interpreted()):
        return None
    if dry_run:
        return "no CUDA device; TRITON_INTERPRET=1 runs --dry-run on the CPU"
    return "no CUDA device; --dry-run with TRITON_INTERPRET=1 checks the script itself"


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Everything, or AssertionError before the first speed."""
    check(device, scale)
    clock = Clock(device, scale.turns)
    bounds = Bounds.measured(clock, scale)
    return {
        "environment": environment(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "bounds": vars(bounds),
        "decode": list(bench_decode(clock, scale, bounds)),
        "matmul": list(bench_matmul(clock, scale)),
        "stream": list(bench_stream(clock, scale, bounds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny matrices: whether the script works")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    reason = lacking(dry_run=args.dry_run)
    if reason is not None:
        print(f"bench_gpu: {reason}", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cpu" if is_interpreted() else "cuda")
    print(environment_line(), flush=True)
    began = time.perf_counter()
    report = run(device, TINY if args.dry_run else Scale())
    report["seconds"] = time.perf_counter() - began
    show(report)
    where = report["gpu"] or "dry run on the CPU: these times mean nothing"
    print(f"\n{where}, {report['seconds']:.0f} s in all")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()

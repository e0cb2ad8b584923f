"""What `bench_gpu.py` says at its end: tables, and each figure that is wanted beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench_common import print_table

__all__ = ["Figure", "as_json", "compare_logits", "figures", "show"]

GB = 1e9
Lines = list[dict[str, Any]]
TOLERANCE = 0.05
_SHOWN_TRACE_LINES = 6
_GATE_TITLE = """
The gate: checked kernels; a small model, streamed from host and disk, against itself resident on the device;
how far its logits are from the dense model's, decoded first and straight from packed weights; equal tokens
in both cases:
"""


@dataclass(frozen=True)
class Figure:
    """One of those that are wanted.

    Attributes:
        what: it is.
        wanted: in words.
        measured: in words; empty if it was not.
        met: None if it was not measured, or nothing is asked for.
    """

    what: str
    wanted: str
    measured: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        if not self.measured:
            return "not measured"
        return {None: "", True: "met", False: "missed"}[self.met]


def figures(report: dict[str, Any]) -> list[Figure]:
    """All of them, in the order of issue 5."""
    return [
        *_decode_figures(report["decode"]),
        *_matmul_figures(report["matmul"]),
        *_stream_figures(report["stream"]),
        *_share_figures(report["ring"]),
        *_disk_figures(report["disk"]),
    ]


def _decode_figures(lines: Lines) -> Iterator[Figure]:
    for codec, least in (("raw", 0.80), ("exponent", 0.60)):
        for what in ("matrix", "layer"):
            found = [r for r in lines if (r["codec"], r["what"], r["mask"]) == (codec, what, "bitmap")]
            yield _figure(
                f"decode {codec}, one {what}",
                f">= {least:.2f} of device copy",
                [(f"{r['of_copy']:.2f}", r["of_copy"] >= least) for r in found],
            )


def _matmul_figures(lines: Lines) -> Iterator[Figure]:
    times = {(tuple(r["shape"]), r["rows"], r["what"]): r for r in lines}
    shapes = list(dict.fromkeys(shape for shape, _, _ in times))
    for shape in shapes or [()]:
        size = "x".join(map(str, shape)) or "of any shape"
        best = [
            (f"{codec} {r['times_dense']:.2f}x", r["times_dense"] >= 1.4)
            for codec in ("raw", "exponent")
            if (r := times.get((shape, 1, codec)))
        ]
        yield _figure(f"product, 1 row {size}", ">= 1.4x cuBLAS, raw or exponent", best, either=True)
        for codec in ("raw", "exponent"):
            fused, first = (times.get((shape, 16, what)) for what in (codec, f"decode {codec}"))
            pairs = [(fused, first)] if fused and first else []
            yield _figure(
                f"product, 16 rows {size}, {codec}",
                "not slower than decode + cuBLAS",
                [(f"{f['ms']:.3f} against {d['ms']:.3f} ms", f["ms"] <= d["ms"]) for f, d in pairs],
            )


def _stream_figures(lines: Lines) -> Iterator[Figure]:
    endor = {r["codec"]: r for r in lines if "codec" in r}
    for codec in ("exponent", "raw"):
        found = [endor[codec]] if codec in endor else []
        yield _figure(
            f"from pinned memory, {codec}",
            ">= 95 % of the pinned copy bandwidth",
            [(f"{r['of_bound']:.1%}", r["of_bound"] >= 0.95) for r in found],
        )
        yield _figure(
            f"from pinned memory, {codec}, tokens/s",
            ">= 3x accelerate cpu_offload",
            [(f"{r['times_accelerate']:.1f}x", r["times_accelerate"] >= 3) for r in _with_ratio(found)],
        )


def _with_ratio(lines: Iterable[dict[str, Any]]) -> Lines:
    return [line for line in lines if line.get("times_accelerate") is not None]


def _share_figures(lines: Lines) -> Iterator[Figure]:
    for codec in ("exponent", "raw"):
        found = [r for r in lines if r["codec"] == codec]
        yield _figure(
            f"decode and launches, {codec}",
            "<= 5 % of streaming time",
            [(f"{r['decode_share']:.1%}", r["decode_share"] <= 0.05) for r in found],
        )


def _disk_figures(lines: Lines) -> Iterator[Figure]:
    found = _with_ratio(r for r in lines if "codec" in r)
    for r in found:
        measured = f"{r['times_accelerate']:.1f}x, {r['of_bound']:.0%} of the disk"
        yield Figure(
            f"from disk, {r['codec']}, tokens/s", "(nothing asked) accelerate disk_offload", measured
        )


def _figure(what: str, wanted: str, found: Sequence[tuple[str, bool]], *, either: bool = False) -> Figure:
    if not found:
        return Figure(what, wanted)
    judge = any if either else all
    return Figure(what, wanted, ", ".join(text for text, _ in found), judge(met for _, met in found))


def compare_logits(lines: Lines) -> Lines:
    """The lines with `times_accelerate`, and how far Endor's logits after the prompt are from accelerate's.

    A lossless line whose logits are wrong keeps no speed: it gets an `error` in its place.
    """
    others = [line for line in lines if "codec" not in line]
    if not others:
        return lines
    return [_compared(line, others[0]) if "codec" in line else line for line in lines]


def _compared(line: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    mine, theirs = (torch.load(Path(each["logits"])) for each in (line, other))
    error = float((mine - theirs).norm() / theirs.norm())
    if line["codec"] in {"raw", "exponent"} and not error <= TOLERANCE:  # NaN is not
        kept = {name: line[name] for name in ("tier", "title", "layers")}
        return kept | {"error": f"logits are {error:.1%} from accelerate's: no speed is worth showing"}
    ratio = line["tokens_per_s"] / other["tokens_per_s"] if line["layers"] == other["layers"] else None
    pairs = zip(line["ids"], other["ids"], strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(line["ids"]), len(other["ids"])))
    return line | {"times_accelerate": ratio, "logits_error": error, "same_tokens": same}


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────


def show(report: dict[str, Any]) -> None:
    """Print everything, in fewer than 12,000 characters."""
    _show_gate(report)
    for bounds in report["bounds"]:
        copy, link = bounds["copy"] / GB, bounds["link"] / GB
        print(f"device copy {copy:.0f} GB/s read plus written, pinned memory to device {link:.1f} GB/s")
    _show_models(report)
    _show_kernels(report)
    print("\nWanted, measured:\n")
    rows = [(f["what"], f["wanted"], f["measured"], f["verdict"]) for f in report["figures"]]
    print_table(["figure of issue 5", "wanted", "measured", ""], rows)
    for note in (*report["notes"], *_spill_notes(report["stream"])):
        print(f"note: {note}")
    for name, part in report["parts"].items():
        for skipped in part["skipped"]:
            print(f"skipped in {name}: {skipped}"[:200])
        if part["error"]:
            print(f"FAILED {name}: {part['error']}")
            print("".join(f"    {line[:160]}\n" for line in part["trace"][-_SHOWN_TRACE_LINES:]), end="")


def _show_gate(report: dict[str, Any]) -> None:
    """A codec's line says which step it passed."""
    steps: dict[str, dict[str, dict[str, Any]]] = {}
    for line in report["gate"]:
        steps.setdefault(line["codec"], {})[line["step"]] = line
    print(_GATE_TITLE)
    columns = ("gate", "kernels", "streamed = resident", "decoded", "packed", "tokens")
    print_table(columns, [_gate_row(codec, found) for codec, found in steps.items()])
    print()


def _gate_row(codec: str, steps: dict[str, dict[str, Any]]) -> list[str]:
    kernels, model = steps.get("kernels"), steps.get("model")
    return [
        codec,
        f"{kernels['checked']} right" if kernels else "RED",
        *(
            (
                "same bits",
                f"{model['logits_error']:.2%}" if model["logits_error"] else "same bits",
                f"{model['auto_logits_error']:.2%}",
                f"{model['same_tokens']}, {model['auto_same_tokens']} of {model['tokens']}",
            )
            if model
            else ("RED", "", "", "")
        ),
    ]


def _show_models(report: dict[str, Any]) -> None:
    for tier, bound in (("stream", "link"), ("disk", "disk")):
        lines = report[tier]
        if not lines:
            continue
        layers = "/".join(str(n) for n in sorted({line["layers"] for line in lines}))
        print(f"\n{'From pinned memory' if tier == 'stream' else 'From disk'}, {layers} layers:\n")
        columns = (
            "",
            "tokens/s",
            "x accelerate",
            "GB crossing",
            f"{bound} bound",
            "of it",
            "stall",
            "logits",
        )
        print_table(columns, [_model_row(line) for line in lines])


def _spill_notes(lines: Lines) -> Iterator[str]:
    """Of what should have been in pinned memory and was not."""
    for line in lines:
        share = line.get("disk_share", 0)
        if share > 0.01:
            yield f"{line['title']}: memory did not hold {share:.0%} of what crossed; it was read from files"


def _model_row(line: dict[str, Any]) -> list[str]:
    if "error" in line:
        return [line["title"], line["error"], *[""] * 6]
    ratio, bound = line.get("times_accelerate"), line.get("bound_tokens_per_s")
    return [
        line["title"],
        f"{line['tokens_per_s']:.3g}",
        f"{ratio:.1f}" if ratio is not None else "",
        f"{line['crossed_bytes'] / GB:.2f}" if "crossed_bytes" in line else "",
        f"{bound:.3g}" if bound is not None else "",
        f"{line['of_bound']:.1%}" if "of_bound" in line else "",
        f"{line['stall_share']:.0%}" if "stall_share" in line else "",
        f"{line['logits_error']:.2%} off" if "logits_error" in line else "",
    ]


def _show_kernels(report: dict[str, Any]) -> None:
    if report["decode"]:
        print()
        print_table(["decode", "codec", "mask", "ms", "GB/s", "of copy"], map(_decode_row, report["decode"]))
    if report["matmul"]:
        print("\nTimes dense cuBLAS: straight from packed weights (decoding first):\n")
        codecs = [what for what in dict.fromkeys(r["what"] for r in report["matmul"]) if " " not in what][1:]
        print_table(["matmul", "rows", "dense ms", *codecs], _matmul_rows(report["matmul"], codecs))
    if report["ring"]:
        print()
        columns = [
            "ring",
            "MB per layer",
            "ms per layer",
            "link alone",
            "of link",
            "decode share",
            "launches",
        ]
        print_table(columns, map(_ring_row, report["ring"]))


def _decode_row(r: dict[str, Any]) -> list[str]:
    rate = f"{r['bytes_per_s'] / GB:.0f}"
    return [r["what"], r["codec"], r["mask"], f"{r['ms']:.3f}", rate, f"{r['of_copy']:.2f}"]


def _ring_row(r: dict[str, Any]) -> list[str]:
    times = (f"{r['ms']:.2f}", f"{r['link_ms']:.2f}", f"{r['of_link']:.1%}", f"{r['decode_share']:.1%}")
    return [r["codec"], f"{r['block_bytes'] / 1e6:.0f}", *times, str(r["launches"])]


def _matmul_rows(lines: Lines, codecs: Sequence[str]) -> Iterator[list[str]]:
    found = {(tuple(r["shape"]), r["rows"], r["what"]): r for r in lines}
    for shape, rows in dict.fromkeys((shape, rows) for shape, rows, _ in found):
        cells = []
        for codec in codecs:
            fused, first = (found.get((shape, rows, what)) for what in (codec, f"decode {codec}"))
            cells.append(
                f"{fused['times_dense']:.2f} ({first['times_dense']:.2f})" if fused and first else ""
            )
        dense = found[shape, rows, "dense"]
        yield ["x".join(map(str, shape)), str(rows), f"{dense['ms']:.3f}", *cells]


def as_json(found: Iterable[Figure]) -> list[dict[str, Any]]:
    """Figures as they go into the report."""
    return [asdict(figure) | {"verdict": figure.verdict} for figure in found]

"""Draws docs/images/ from the reports of the benchmarks: bits per weight and tokens per second, per codec
and by how much of the model stays in memory.

    python scripts/plot_benchmarks.py REPORT.json... [--out docs/images]

Reports are what `bench_codecs.py`, `bench_stream.py` and `bench_budgets.py` write with `--json`, in any
number: rounds of one contender in several reports count together. Needs matplotlib: `pip install -e
.[bench]`. The background is transparent and the ink a grey that reads on white and on black.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK = "#7a7f87"
OTHERS = "#9aa0a8"
OURS = "#2f81d7"
BOUND = "#e0662f"
DENSE_BITS = 16.0
PANELS = {"disk": "every token from disk", "resident": "everything in memory"}


@dataclass(frozen=True)
class Bar:
    """One bar; `bound` is where a mark for the best that is possible goes."""

    label: str
    value: float
    is_ours: bool
    bound: float | None = None


# ── from reports to bars ────────────────────────────────────────────────────────────────────────────────────


def size_bars(row: Mapping[str, Any], codecs: Sequence[str]) -> list[Bar]:
    """Bits per weight of one line of `bench_codecs.py`, those of the dense weight first."""
    names = [name for name in row if isinstance(row[name], float) and name != "bound"]
    ours = [Bar(name, row[name], is_ours=True) for name in names if name in codecs]
    others = [
        Bar(name, row[name], is_ours=False) for name in names if name not in codecs and "-9" not in name
    ]
    return [Bar("dense", DENSE_BITS, is_ours=False), *others, *ours]


def rate_bars(reports: Iterable[Mapping[str, Any]], mode: str) -> list[Bar]:
    """Tokens per second of all contenders of a mode, over the rounds of all reports; the slowest first."""
    rounds: dict[str, list[float]] = {}
    bounds: dict[str, list[float]] = {}
    ours: dict[str, bool] = {}
    for report in reports:
        for figures in report.get("modes", {}).get(mode, {}).values():
            title = figures["title"]
            rounds.setdefault(title, []).extend(figures["rounds"])
            ours[title] = figures["values"] is not None
            if bound := figures.get("endor", {}).get("link_bound_tokens_per_second"):
                bounds.setdefault(title, []).append(bound)
    bars = [
        Bar(
            title,
            statistics.median(rates),
            is_ours=ours[title],
            bound=statistics.median(bounds[title]) if title in bounds else None,
        )
        for title, rates in rounds.items()
    ]
    return sorted(bars, key=lambda bar: bar.value)


def budget_lines(reports: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Tokens per second by the share of the model in memory, per contender, over all reports."""
    titles = {"results": "Endor auto", "accelerate": "accelerate 1.15, dense weights, same memory"}
    seconds: dict[str, dict[float, list[float]]] = {}
    for report in reports:
        for key, title in titles.items():
            for share, rounds in _by_share(report.get(key)).items():
                found = seconds.setdefault(title, {}).setdefault(float(share), [])
                found += [each["seconds"] for each in rounds]
    return {
        title: [(share, 1 / statistics.median(found)) for share, found in sorted(by_share.items())]
        for title, by_share in seconds.items()
    }


def _by_share(results: Any) -> Mapping[str, Any]:
    return results if isinstance(results, Mapping) else {}


# ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────────


def draw(panels: Mapping[str, tuple[list[Bar], float | None]], *, unit: str, bound: str, path: Path) -> None:
    """Panels of horizontal bars side by side, each with a line, a mark per bar, or no bound."""
    plt = _pyplot()
    height = 1.2 + 0.3 * max(len(bars) for bars, _ in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), height), squeeze=False)
    for axis, (title, (bars, line)) in zip(axes[0], panels.items(), strict=True):
        _draw_bars(axis, bars, bound)
        axis.set_title(title)
        axis.set_xlabel(unit)
        if line is not None:
            axis.axvline(line, color=BOUND, linestyle="--", linewidth=1.4, label=f"{bound}: {line:.2f}")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.9 / height))
    _save(plt, figure, path)


def _pyplot() -> Any:
    importlib.import_module("matplotlib").use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams.update(dict.fromkeys(keys, INK) | {"font.size": 9, "axes.titlesize": 10})
    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, transparent=True)
    plt.close(figure)


def _draw_bars(axis: Any, bars: list[Bar], bound: str) -> None:
    rows = range(len(bars))
    axis.barh(rows, [bar.value for bar in bars], color=[OURS if bar.is_ours else OTHERS for bar in bars])
    axis.set_yticks(rows, [bar.label for bar in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(max(bar.value, bar.bound or 0) for bar in bars))
    axis.spines[["top", "right"]].set_visible(False)
    marked = [(row, bar.bound) for row, bar in enumerate(bars) if bar.bound is not None]
    if marked:
        places, limits = zip(*marked, strict=True)
        axis.scatter(limits, places, marker="|", s=150, linewidths=2, color=BOUND, label=bound, zorder=3)
    longest = max(bar.value for bar in bars)
    for row, bar in enumerate(bars):
        # Inside its bar a number is crossed by no line; a short bar has no room for it.
        inside = not marked and bar.value > longest / 8
        at, shift = (bar.value, -30) if inside else (max(bar.value, bar.bound or 0), 6)
        colour = "white" if inside else INK
        axis.annotate(
            f"{bar.value:.3g}", (at, row), (shift, 0), textcoords="offset points", va="center", color=colour
        )


def plot_budgets(reports: Sequence[Mapping[str, Any]], out: Path) -> Path | None:
    """Tokens per second by how much of the model stays in memory."""
    lines = budget_lines(reports)
    if not lines:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.0))
    for (title, points), colour in zip(lines.items(), (OURS, OTHERS), strict=False):
        shares, rates = zip(*points, strict=True)
        axis.plot([100 * share for share in shares], rates, marker="o", color=colour, label=title)
        for share, rate in points:
            axis.annotate(f"{rate:.3g}", (100 * share, rate), (0, 6), textcoords="offset points", ha="center")
    axis.set_ylim(0, 1.15 * max(rate for points in lines.values() for _, rate in points))
    axis.set_xlabel("memory for weights, % of the compressed model")
    axis.set_ylabel("tokens/s, 1.1 B parameters")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    path = out / "tokens_by_budget.png"
    _save(plt, figure, path)
    return path


def plot_sizes(reports: Sequence[Mapping[str, Any]], out: Path) -> Path | None:
    """Bits per weight of the demo model, pruned by Wanda and not pruned."""
    from endor.formats import CODECS

    rows = {row["kind"]: row for report in reports for row in report.get("demo", [])}
    titles = {"wanda": "50 % pruned by Wanda", "none": "not pruned"}
    panels = {title: rows[kind] for kind, title in titles.items() if kind in rows}
    if not panels:
        return None
    path = out / "bits_per_weight.png"
    bars = {title: (size_bars(row, list(CODECS)), row["bound"]) for title, row in panels.items()}
    draw(bars, unit="bits per weight (bf16)", bound="entropy bound of lossless codes", path=path)
    return path


def plot_rates(reports: Sequence[Mapping[str, Any]], out: Path) -> Path | None:
    """Tokens per second, streamed from disk and with everything in memory."""
    panels = {title: (rate_bars(reports, mode), None) for mode, title in PANELS.items()}
    panels = {title: panel for title, panel in panels.items() if panel[0]}
    if not panels:
        return None
    path = out / "tokens_per_second.png"
    draw(panels, unit="tokens/s, 1.1 B parameters", bound="bound of the disk", path=path)
    return path


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = Path(__file__).resolve().parent.parent / "docs" / "images"
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=images)
    arguments = parser.parse_args(words)
    reports = [json.loads(path.read_text()) for path in arguments.reports]
    paths = [
        path for plot in (plot_sizes, plot_rates, plot_budgets) if (path := plot(reports, arguments.out))
    ]
    if not paths:
        parser.error("the reports hold neither sizes of the demo model nor tokens per second")
    for path in paths:
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""The plots show what the reports say. Drawing itself is tested where matplotlib is installed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def plots(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("plot_benchmarks")


def stream_report(rounds: list[float], bound: float) -> dict[str, Any]:
    endor = {
        "title": "Endor auto, depth 2",
        "values": "auto",
        "rounds": rounds,
        "endor": {"link_bound_tokens_per_second": bound},
    }
    dense = {"title": "plain from_pretrained, mapped", "values": None, "rounds": [0.5]}
    return {"modes": {"disk": {"endor-auto": endor, "mapped": dense}}}


DEMO = {
    "weights": "demo model, wanda",
    "kind": "wanda",
    "dtype": "bf16",
    "bound": 5.8,
    "raw": 9.0,
    "zstd -1": 8.1,
}


BUDGETS = {"results": {"0.0": [{"seconds": 0.2}], "1.0": [{"seconds": 0.1}]}, "accelerate": {}}


def test_rounds_of_several_reports_count_together(plots: ModuleType) -> None:
    reports = [stream_report([1.0, 5.0], 6.0), stream_report([4.0], 8.0)]

    slow, fast = plots.rate_bars(reports, "disk")

    assert (slow.label, slow.value, slow.is_ours, slow.bound) == (
        "plain from_pretrained, mapped",
        0.5,
        False,
        None,
    )
    assert (fast.label, fast.value, fast.is_ours, fast.bound) == ("Endor auto, depth 2", 4.0, True, 7.0)


def test_budgets_are_lines_by_share_over_all_reports(plots: ModuleType) -> None:
    reports = [
        {"results": {"1.0": [{"seconds": 0.1}], "0.0": [{"seconds": s}]}, "accelerate": {}}
        for s in (0.4, 0.6)
    ]

    assert plots.budget_lines(reports) == {"Endor auto": [(0.0, 2.0), (1.0, 10.0)]}


def test_sizes_begin_with_the_dense_weight_and_end_with_ours(plots: ModuleType) -> None:
    bars = plots.size_bars(DEMO, ["raw"])

    assert [(bar.label, bar.value) for bar in bars] == [("dense", 16.0), ("zstd -1", 8.1), ("raw", 9.0)]


def test_reports_without_anything_to_draw_are_refused(
    plots: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"matmul": []}')

    with pytest.raises(SystemExit):
        plots.main([str(report)])
    assert "neither sizes of the demo model nor tokens per second" in capsys.readouterr().err


def test_all_plots_are_drawn_and_small(plots: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install -e .[bench])")
    report = tmp_path / "report.json"
    report.write_text(json.dumps({**stream_report([1.0], 2.0), "demo": [DEMO], **BUDGETS}))

    plots.main([str(report), "--out", str(tmp_path / "images")])

    for name in ("bits_per_weight.png", "tokens_per_second.png", "tokens_by_budget.png"):
        content = (tmp_path / "images" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 60_000

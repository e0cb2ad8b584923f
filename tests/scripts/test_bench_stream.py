"""The streaming benchmark runs on a tiny model, says what it should, and shows no speed on a red gate."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def bench(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("bench_stream")


def turn(
    bench: ModuleType,
    *,
    token_ids: tuple[int, ...] = (1, 2, 3),
    token_s: tuple[float, ...] = (),
    foreign_share: tuple[float, ...] = (),
) -> Any:
    nothing = (0,) * len(token_s)
    return bench.Turn(
        token_ids=token_ids,
        logits_digest="",
        token_s=token_s,
        read_bytes=nothing,
        foreign_share=foreign_share or nothing,
    )


def run_small(repository: Path, workdir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = (str(repository), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, repository / "scripts" / "bench_stream.py", "--small", "--workdir", workdir, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_first_token_is_not_counted_in_the_rate(bench: ModuleType) -> None:
    series = bench.Series(turns=[turn(bench, token_s=(9.0, 0.5, 0.25, 0.25))])

    assert series.rates == [3.0]


def test_tokens_that_others_disturbed_are_not_counted(bench: ModuleType) -> None:
    mixed = turn(bench, token_s=(9.0, 0.5, 8.0, 0.5), foreign_share=(0.9, 0.0, 0.5, 0.05))
    loud = turn(bench, token_s=(9.0, 0.5, 8.0, 0.5), foreign_share=(0.0, 0.9, 0.5, 0.9))

    assert (mixed.is_clean, mixed.tokens_per_s) == (True, 2.0)
    assert (loud.is_clean, loud.tokens_per_s) == (False, 3 / 9)


def test_ratio_compares_turns_of_the_same_round(bench: ModuleType) -> None:
    ours = bench.Series(turns=[turn(bench, token_s=(0.0, 1.0)), turn(bench, token_s=(0.0, 2.0))])
    theirs = bench.Series(turns=[turn(bench, token_s=(0.0, 3.0)), turn(bench, token_s=(0.0, 6.0))])

    assert ours.ratio_to(theirs) == 3.0


def test_bound_is_bandwidth_over_bytes_per_token(bench: ModuleType) -> None:
    series = bench.Series(disk_bytes_per_s=[2e9, 3e9])

    assert series.bounds(1_000_000_000) == [2.0, 3.0]


def test_other_tokens_than_the_reference_are_refused(bench: ModuleType) -> None:
    with pytest.raises(bench.GateError, match=r"endor generated \[1, 2, 4\].*\[1, 2, 3\]"):
        bench.check_tokens(turn(bench), turn(bench, token_ids=(1, 2, 4)), name="endor")


def test_no_speed_is_shown_on_a_red_gate(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def red(arguments: object) -> None:
        raise bench.GateError("endor generated [1]")

    monkeypatch.setattr(bench, "run", red)

    assert bench.main(["--small"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the gate is red: endor generated [1]" in captured.err


def test_a_workdir_with_a_model_of_another_shape_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text('{"hidden": 1}')

    with pytest.raises(SystemExit, match="another shape"):
        bench.build_models(tmp_path, bench.LLAMA_TINY)


@pytest.mark.slow
def test_all_figures_are_reported_for_a_tiny_model(repository: Path, tmp_path: Path) -> None:
    words = ("--contenders", "accelerate,mapped,endor", "--mode", "disk", "--rounds", "1", "--tokens", "3")
    found = run_small(repository, tmp_path, *words, "--json", "-")

    assert found.returncode == 0, found.stderr
    contenders = json.loads(found.stdout)["modes"]["disk"]
    assert list(contenders) == ["accelerate", "mapped", "endor"]
    for figures in contenders.values():
        assert figures["tokens_per_second"] > 0
        assert figures["peak_anonymous_bytes"]["run"] > 0
    endor = contenders["endor"]["endor"]
    assert endor["streamed_bytes"] > 0
    assert endor["link_bound_tokens_per_second"] > 0
    assert set(endor["planned_bytes"]) == {"ring", "scratch", "resident", "dense"}
    assert set(endor["seconds_per_token"]) == {"read", "copy", "decode", "compute", "stall"}

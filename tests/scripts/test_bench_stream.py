"""The streaming benchmark runs on a tiny model, says what it should, and shows no speed on a red gate."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
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
    logits: list[list[float]] | None = None,
) -> Any:
    nothing = (0,) * len(token_s)
    return bench.Turn(
        token_ids=token_ids,
        token_s=token_s,
        read_bytes=nothing,
        foreign_share=foreign_share or nothing,
        logits=None if logits is None else np.array(logits, dtype=np.float32),
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
    with pytest.raises(bench.GateError, match=r"endor generated \[1, 2, 4\], dense \[1, 2, 3\]"):
        bench.check_tokens(turn(bench), turn(bench, token_ids=(1, 2, 4)), name="endor", source="dense")


def test_logits_of_every_token_must_be_near_the_reference(bench: ModuleType) -> None:
    reference = turn(bench, logits=[[3.0, 4.0], [0.0, 10.0]])

    near = turn(bench, logits=[[3.0, 4.1], [0.0, 10.0]])
    assert bench.check_logits(reference, near, name="endor") == pytest.approx(0.02)
    with pytest.raises(bench.GateError, match=r"the logits of endor are 10.0% from"):
        bench.check_logits(reference, turn(bench, logits=[[3.0, 4.0], [0.0, 9.0]]), name="endor")
    with pytest.raises(bench.GateError, match="the logits of endor are nan%"):
        bench.check_logits(reference, turn(bench, logits=[[3.0, 4.0], [0.0, math.nan]]), name="endor")


def test_lossy_codecs_are_compared_with_their_own_weights(bench: ModuleType) -> None:
    references = {name: c.reference for name, c in bench.CONTENDERS.items()}

    assert references["endor-auto-resident"] == "mapped"
    assert references["endor-int4-depth0-decode"] == "decoded-int4"
    assert all(references[reference] == reference for reference in references.values())


def test_contenders_without_a_codec_stand_for_all_codecs(bench: ModuleType) -> None:
    names = ("dense", "endor", "endor-resident-decode", "endor-raw")

    assert bench.expand(names, ("raw", "int4")) == (
        "dense",
        "endor-raw",
        "endor-int4",
        "endor-raw-resident-decode",
        "endor-int4-resident-decode",
    )


def test_every_mode_has_contenders(bench: ModuleType) -> None:
    arguments = bench.parse(["--values", "auto,int8"])

    assert tuple(arguments.contenders) == bench.MODES
    assert arguments.contenders["resident"][:2] == ("dense", "dense-huge")


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
        bench.build_models(tmp_path, bench.LLAMA_TINY, ["auto"])


@pytest.mark.slow
def test_all_figures_are_reported_for_a_tiny_model(repository: Path, tmp_path: Path) -> None:
    contenders = ("--contenders", "accelerate,mapped,endor", "--values", "auto,int4", "--mode", "disk")
    words = (*contenders, "--rounds", "1", "--tokens", "3")
    found = run_small(repository, tmp_path, *words, "--json", "-")

    assert found.returncode == 0, found.stderr
    figures_of = json.loads(found.stdout)["modes"]["disk"]
    assert list(figures_of) == ["accelerate", "mapped", "endor-auto", "endor-int4"]
    for figures in figures_of.values():
        assert figures["tokens_per_second"] > 0
        assert figures["peak_anonymous_bytes"]["run"] > 0
    assert figures_of["endor-auto"]["logits_error"] <= 0.05
    endor = figures_of["endor-auto"]["endor"]
    assert endor["streamed_bytes"] > 0
    assert endor["link_bound_tokens_per_second"] > 0
    assert set(endor["planned_bytes"]) == {"ring", "scratch", "resident", "dense"}
    assert set(endor["seconds_per_token"]) == {"read", "copy", "decode", "compute", "stall"}

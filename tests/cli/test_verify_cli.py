"""`endor verify`: exit codes, every error, and one JSON object."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.shards import INDEX, ShardParts, write_checkpoint

Run = Callable[..., subprocess.CompletedProcess[str]]
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def damaged(model: Path) -> Path:
    """A checkpoint with two errors."""
    parts = ShardParts.read(model / SHARD)
    for tensor in ("layers.0.norm", "endor.padding.0"):
        parts.section(tensor)[-1] ^= 1
    raw = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(raw[: len(raw) - len(parts.payload)] + parts.payload)
    return model


def test_a_whole_checkpoint_is_ok(run_command: Run, model: Path) -> None:
    done = run_command("endor", "verify", model)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{model}: ok\n", "")


def test_every_error_is_printed_and_the_exit_code_is_1(run_command: Run, damaged: Path) -> None:
    done = run_command("endor", "verify", damaged)
    assert done.returncode == 1
    assert done.stdout == f"{damaged}: 2 errors\n"
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: {damaged / SHARD}: entry 'layers.0.norm', section dense")
    assert second.startswith(f"error: {damaged / SHARD}: block 'layers.0': padding")


def test_quiet_prints_errors_only(run_command: Run, model: Path, damaged: Path) -> None:
    assert len(run_command("endor", "verify", damaged, "--quiet").stderr.splitlines()) == 2
    assert run_command("endor", "verify", damaged, "--quiet").stdout == ""
    write_checkpoint(model)
    done = run_command("endor", "verify", model, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_json_is_one_object(run_command: Run, model: Path) -> None:
    done = run_command("endor", "verify", model, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"ok": True, "errors": []})
    (model / INDEX).unlink()
    done = run_command("endor", "verify", model, "--json")
    assert done.returncode == 1
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert [INDEX in error for error in found["errors"]] == [True]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_not_a_checkpoint_is_an_error_not_a_crash(
    run_command: Run, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    done = run_command("endor", "verify", path)
    assert done.returncode == 1
    assert str(path) in done.stderr


def test_usage_errors_exit_with_2(run_command: Run) -> None:
    assert run_command("endor", "verify").returncode == 2
    assert run_command("endor", "verify", "a", "b").returncode == 2


def test_progress_is_shown_to_a_person_only(
    run_command: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endor.cli import verify

    with verify._progress_bar(shown=False) as progress:
        assert progress is None
    with verify._progress_bar(shown=True) as progress:
        assert progress is not None
        progress(1, 2)


def test_a_converted_model_is_whole(run_command: Run, demo_checkpoint: Path) -> None:
    assert run_command("endor", "verify", demo_checkpoint).returncode == 0

"""Conversions that are killed, run out of space or are interrupted lose nothing and end with the same
bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import endor
from endor.convert import Progress
from endor.convert.output import JOURNAL_NAME
from endor.errors import ConvertError
from endor.formats.writer import ShardWriter
from tests.support.sources import file_digests, save_source

SHARDED: dict[str, Any] = {"shard_size": 40_000, "values": "raw"}
MAGNITUDE: dict[str, Any] = {**SHARDED, "method": "magnitude"}
WANDA: dict[str, Any] = {**SHARDED, "method": "wanda", "samples": 3, "sequence_length": 24}
KILL = """
import json, os, signal, sys, endor
calls = 0
def progress(_):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
endor.convert(sys.argv[1], sys.argv[2], progress=progress, **json.loads(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source("llama", tmp_path_factory.mktemp("resume") / "source")


@pytest.fixture(scope="module", params=["magnitude", "wanda"])
def case(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Options, and the files of a conversion that nothing disturbed."""
    options = MAGNITUDE if request.param == "magnitude" else WANDA
    out = tmp_path_factory.mktemp("whole") / "out"
    endor.convert(source, out, **options)
    return options, file_digests(out)


def kill_at(call: int, source: Path, out: Path, options: dict[str, Any], repository: Path) -> None:
    command = [sys.executable, "-c", KILL, str(source), str(out), json.dumps(options), str(call)]
    done = subprocess.run(command, cwd=repository, check=False, capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("call", [2, 14, 32])
def test_killed_conversion_is_visibly_unfinished_and_resumes_to_the_same_bytes(
    case: tuple[dict[str, Any], dict[str, bytes]], call: int, source: Path, tmp_path: Path, repository: Path
) -> None:
    options, whole = case
    out = tmp_path / "out"
    kill_at(call, source, out, options, repository)
    assert (out / JOURNAL_NAME).exists()
    assert not (out / "config.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}
    endor.convert(source, out, **options, resume=True)
    assert file_digests(out) == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, (
        "a finished shard was written again"
    )


def test_killed_twice(source: Path, tmp_path: Path, repository: Path) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    kill_at(14, source, out, WANDA, repository)
    kill_at(14, source, out, {**WANDA, "resume": True}, repository)
    endor.convert(source, out, **WANDA, resume=True)
    endor.convert(source, reference, **WANDA)
    assert file_digests(out) == file_digests(reference)


def test_exception_in_the_middle_leaves_no_temporary_file(source: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        endor.convert(source, tmp_path / "out", **MAGNITUDE, progress=interrupt)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert JOURNAL_NAME in names
    assert not [name for name in names if name.endswith(".part")]
    endor.convert(source, tmp_path / "out", **MAGNITUDE, resume=True)


def interrupted(source: Path, out: Path, **changes: Any) -> None:
    def stop(progress: Progress) -> None:
        if progress.done_bytes > progress.total_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        endor.convert(source, out, **{**MAGNITUDE, **changes}, progress=stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.6}, r"options sparsity was 0\.5, now 0\.6"),
        ({"method": "none"}, "options method was 'magnitude', now 'none'"),
        ({"shard_size": 1 << 20}, "options shard_size was 40000"),
        ({"exclude": ["*.mlp.*"]}, "options exclude was"),
    ],
    ids=str,
)
def test_resuming_with_other_options_is_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    interrupted(source, tmp_path / "out")
    before = file_digests(tmp_path / "out")
    with pytest.raises(ConvertError, match=message):
        endor.convert(source, tmp_path / "out", **{**MAGNITUDE, **change}, resume=True)
    assert file_digests(tmp_path / "out") == before


def test_resuming_with_another_source_is_refused(source: Path, tmp_path: Path) -> None:
    import shutil

    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    interrupted(changed, tmp_path / "out")
    os.utime(changed / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConvertError, match=r"source model\.safetensors was"):
        endor.convert(changed, tmp_path / "out", **MAGNITUDE, resume=True)


def test_resuming_with_other_calibration_text_is_refused(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words for calibration\n\n" * 40)
    interrupted(source, tmp_path / "out", **WANDA)
    with pytest.raises(ConvertError, match="calibration was"):
        endor.convert(source, tmp_path / "out", **WANDA, resume=True, calibration=text)


def test_options_that_do_not_matter_may_differ(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    endor.convert(source, tmp_path / "out", **MAGNITUDE, resume=True, memory=1 << 40, samples=5, seed=9)


def test_resume_without_anything_to_resume_starts(source: Path, tmp_path: Path) -> None:
    endor.convert(source, tmp_path / "out", **MAGNITUDE, resume=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_damaged_shard_of_an_interrupted_conversion_is_named(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    shard = min((tmp_path / "out").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4096])
    with pytest.raises(ConvertError, match=rf"{shard.name}.*Delete the file and run again with --resume"):
        endor.convert(source, tmp_path / "out", **MAGNITUDE, resume=True)
    shard.unlink()
    endor.convert(source, tmp_path / "out", **MAGNITUDE, resume=True)


def test_flipped_bit_in_a_finished_shard_is_found_when_it_is_needed(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", **WANDA)
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(endor.errors.ChecksumError, match=shard.name):
        endor.convert(source, tmp_path / "out", **WANDA, resume=True)


def test_full_disk_keeps_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = ShardWriter._write, 0

    def full(self: ShardWriter, data: Any) -> None:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise ConvertError("cannot write: No space left on device") from OSError(errno.ENOSPC, "")
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", full)
        with pytest.raises(ConvertError, match="No space left"):
            endor.convert(source, tmp_path / "out", **MAGNITUDE)
    assert list((tmp_path / "out").glob("model-*.safetensors"))
    assert not list((tmp_path / "out").glob("*.part"))
    endor.convert(source, tmp_path / "out", **MAGNITUDE, resume=True)
    endor.convert(source, tmp_path / "reference", **MAGNITUDE)
    assert file_digests(tmp_path / "out") == file_digests(tmp_path / "reference")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs the right to mount."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_too_little_space_is_said_before_anything_is_written(source: Path, small_disk: Path) -> None:
    with pytest.raises(ConvertError, match=r"needs up to \d+ MiB, but only [01] MiB are free"):
        endor.convert(source, small_disk / "out", **MAGNITUDE)
    assert not (small_disk / "out").exists()


def test_disk_that_fills_up_in_the_middle(
    source: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endor.convert.pipeline.free_bytes", lambda _: 1 << 40)
    filler = small_disk / "filler"
    filler.write_bytes(bytes((1 << 20) - 260_000))
    out = small_disk / "out"
    with pytest.raises(ConvertError, match=r"No space left on device; make room.*--resume"):
        endor.convert(source, out, **MAGNITUDE)
    assert (out / JOURNAL_NAME).exists()
    assert not (out / "config.json").exists()
    filler.unlink()
    endor.convert(source, out, **MAGNITUDE, resume=True)
    endor.convert(source, tmp_path / "reference", **MAGNITUDE)
    assert file_digests(out) == file_digests(tmp_path / "reference")


def test_mismatch_after_encoding_is_an_error_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from endor.convert import packing
    from endor.kernels import decode_rows

    def wrong(*arguments: Any) -> Any:
        dense = decode_rows(*arguments)
        dense[0, 0] = 7
        return dense

    monkeypatch.setattr(packing, "decode_rows", wrong)
    with pytest.raises(ConvertError, match=r"rows 0 and following do not come out of the packed weight"):
        endor.convert(source, tmp_path / "out", method="magnitude", values="raw")
    assert not list((tmp_path / "out").glob("model-*"))

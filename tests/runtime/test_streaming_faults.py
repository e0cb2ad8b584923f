"""Faults injected for real into models that stream: typed errors, nothing left, and a model that works again
or says that it does not."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.faults_worker import BROKEN_BLOCK, SCENARIOS

ROOT = Path(__file__).resolve().parent.parent.parent

Outcome = dict[str, Any]
Outcomes = dict[str, Outcome]

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("faults below Python need Linux and a C compiler")
    library = tmp_path_factory.mktemp("preload") / "preload.so"
    source = ROOT / "tests" / "loaders" / "faults" / "preload.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, preload: Path) -> Outcomes:
    """All scenarios in one process, for its start takes longer than they do."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.faults_worker", str(tmp_path_factory.mktemp("faults"))],
        env={**os.environ, "LD_PRELOAD": str(preload), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {outcome["scenario"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


def errors(outcome: Outcome) -> list[dict[str, Any]]:
    assert None not in outcome["errors"], "a fault went unnoticed"
    return list(outcome["errors"])


def assert_read_error(outcome: Outcome, error: dict[str, Any]) -> None:
    """It names the unit, the file and an offset inside the block, and keeps the system's number."""
    assert (error["type"], error["errno"]) == ("LoadError", errno.EIO)
    said = re.fullmatch(
        rf"unit '{re.escape(BROKEN_BLOCK)}': {re.escape(outcome['shard'])}: reading (\d+) bytes at offset"
        r" (\d+) failed: Input/output error",
        error["message"],
    )
    assert said is not None, error["message"]
    assert outcome["begin"] <= int(said[2]) < outcome["end"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_left_and_a_following_load_works(found: Outcomes, name: str) -> None:
    assert found[name]["left"] == []
    assert found[name]["leases"] == 0
    assert found[name]["fresh"] is True


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("bad_sector", 2),
        ("short_reads", 1),
        ("damaged_before_the_first_read", 1),
        ("damaged_after_the_first_read", 2),
        ("permission_lost", 2),
        ("exception_in_a_layer", 3),
        ("ctrl_c_in_generation", 2),
        ("ctrl_c_while_the_disk_is_slow", 2),
        ("used_in_a_forked_process", 2),
        ("fault_while_two_threads_use_the_model", 4),
        ("two_models_share_a_checkpoint", 4),
    ],
)
def test_model_works_again_when_the_fault_is_over(found: Outcomes, name: str, times: int) -> None:
    assert found[name]["again"] == [True] * times


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("bad_sector", 2),
        ("bad_sector_while_resident_blocks_are_read", 1),
        ("fault_while_two_threads_use_the_model", 2),
        ("two_models_share_a_checkpoint", 2),
    ],
)
def test_bad_sector_is_named(found: Outcomes, name: str, times: int) -> None:
    found_errors = errors(found[name])
    assert len(found_errors) == times
    for error in found_errors:
        assert_read_error(found[name], error)


def test_disk_that_dies_is_an_error_with_its_number(found: Outcomes) -> None:
    outcome = found["disk_that_dies"]
    if "skipped" in outcome:
        pytest.skip(outcome["skipped"])
    [error] = errors(outcome)
    assert (error["type"], error["errno"]) == ("LoadError", errno.EIO)
    assert f"{outcome['disk']}/model-0000" in error["message"]
    assert "at offset" in error["message"]
    assert outcome["left on it"] == []


def test_truncated_file_makes_the_model_unusable_in_words(found: Outcomes) -> None:
    outcome = found["truncated_while_running"]
    cut, restored = errors(outcome)
    assert cut["type"] == restored["type"] == "LoadError"
    assert f"{outcome['shard']}: the file ends at byte {outcome['begin'] + 100}, expected" in cut["message"]
    assert BROKEN_BLOCK in cut["message"]
    assert "was modified while it was read" in restored["message"]
    assert restored["message"].endswith("load the model again")


def test_replaced_file_makes_the_model_unusable_in_words(found: Outcomes) -> None:
    outcome = found["replaced_while_running"]
    for error in errors(outcome):
        assert error["type"] == "LoadError"
        assert f"{outcome['shard']}: the file was replaced while it was read" in error["message"]
        assert error["message"].endswith("load the model again")


@pytest.mark.parametrize("name", ["damaged_before_the_first_read", "damaged_after_the_first_read"])
def test_damaged_section_is_named(found: Outcomes, name: str) -> None:
    [error] = errors(found[name])
    assert error["type"] == "ChecksumError"
    assert found[name]["shard"] in error["message"]
    assert f"entry '{BROKEN_BLOCK}." in error["message"]
    assert error["notes"] == [f"while unit '{BROKEN_BLOCK}' was read"]


def test_file_that_may_no_longer_be_read_is_named(found: Outcomes) -> None:
    [error] = errors(found["permission_lost"])
    assert (error["type"], error["errno"]) == ("LoadError", errno.EACCES)
    assert found["permission_lost"]["shard"] in error["message"]


def test_memory_that_cannot_be_had_is_a_number_of_bytes(found: Outcomes) -> None:
    for error in errors(found["no_memory_for_the_arena"]):
        assert error["type"] == "PlanError"
        assert re.search(r"\d+ bytes of \w+ memory are needed and could not be mapped", error["message"])


def test_exception_in_a_layer_arrives_as_it_is(found: Outcomes) -> None:
    for error in errors(found["exception_in_a_layer"]):
        assert (error["type"], error["message"]) == ("RuntimeError", "a layer of the test's")


@pytest.mark.parametrize("name", ["ctrl_c_in_generation", "ctrl_c_while_the_disk_is_slow"])
def test_ctrl_c_arrives_as_it_is(found: Outcomes, name: str) -> None:
    assert {error["type"] for error in errors(found[name])} == {"KeyboardInterrupt"}


def test_forked_process_is_told_to_load_the_model_itself(found: Outcomes) -> None:
    said = found["used_in_a_forked_process"]["child"]
    assert said.startswith("LoadError: ")
    assert said.endswith("load the model again in this one")

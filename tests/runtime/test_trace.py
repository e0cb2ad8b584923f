"""A trace names what a run did, when, on which track, and adds up to the statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import endor
from endor.errors import EndorError
from endor.runtime import Trace, runtime_of
from tests.support.models import tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 20, 3]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_endor_checkpoint(tiny_llama(layers=3), tmp_path / "endor")


def events(trace: Trace, track: str) -> list[dict[str, Any]]:
    return [event for event in trace.to_json()["traceEvents"] if event.get("cat") == track]


@pytest.mark.parametrize("host_memory", [0, None])
def test_every_block_of_every_forward_is_there_in_order(checkpoint: Path, host_memory: int | None) -> None:
    trace = Trace()
    model = endor.load(checkpoint, host_memory=host_memory, trace=trace)
    for _ in range(2):
        model(IDS)
    blocks = events(trace, "block")
    names = [f"model.layers.{i}" for i in range(3)] + ["lm_head"]
    in_time = sorted(blocks, key=lambda event: event["ts"])
    assert [event["name"] for event in in_time if event["name"] in names] == [*names, *names]
    assert len(events(trace, "forward")) == 2


def test_durations_add_up_to_the_statistics(checkpoint: Path) -> None:
    trace = Trace()
    model = endor.load(checkpoint, host_memory=0, trace=trace, matmul="decode")
    model(IDS)
    stats = runtime_of(model).stats()
    for track, seconds in [("forward", stats.wall_s), ("decode", stats.decode_s), ("stall", stats.stall_s)]:
        assert sum(e["dur"] for e in events(trace, track)) / 1e6 == pytest.approx(seconds, rel=0.01), track


def test_reads_have_their_bytes_and_do_not_overlap(checkpoint: Path) -> None:
    trace = Trace()
    model = endor.load(checkpoint, host_memory=0, trace=trace)
    model(IDS)
    runtime_of(model).close()
    reads = sorted(events(trace, "read"), key=lambda event: event["ts"])
    assert sum(event["args"]["bytes"] for event in reads) >= runtime_of_bytes(checkpoint)
    ends = [event["ts"] + event["dur"] for event in reads]
    assert all(after["ts"] >= end - 1e-3 for after, end in zip(reads[1:], ends, strict=False))


def runtime_of_bytes(checkpoint: Path) -> int:
    return runtime_of(endor.load(checkpoint, host_memory=0)).streamed_bytes


def test_a_saved_trace_is_whole_json(checkpoint: Path, tmp_path: Path) -> None:
    trace = Trace()
    endor.load(checkpoint, host_memory=0, trace=trace)(IDS)
    trace.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    assert {event["ph"] for event in saved["traceEvents"]} == {"M", "X"}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in saved["traceEvents"] if event["ph"] == "X")


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(EndorError, match="nowhere"):
        Trace().save(tmp_path / "nowhere" / "trace.json")

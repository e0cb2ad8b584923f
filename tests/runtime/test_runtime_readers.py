"""A model computes the same whichever reader brings its blocks, and says which one did and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import endor
from endor.errors import PlanError
from endor.loaders import READER_NAMES
from endor.runtime import runtime_of
from tests.support.models import tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 200]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endor_checkpoint(tiny_llama(), tmp_path_factory.mktemp("readers") / "endor")


def logits(checkpoint: Path, reader: str, *, host_memory: int) -> tuple[torch.Tensor, str, str]:
    model = endor.load(checkpoint, host_memory=host_memory, reader=reader)
    with runtime_of(model) as runtime, torch.inference_mode():
        return model(IDS).logits, runtime.reader.name, runtime.reader_reason


@pytest.mark.parametrize("reader", [name for name in READER_NAMES if name != "kvikio"])
@pytest.mark.parametrize("host_memory", [0, 90_000, 1 << 30], ids=["disk", "mixed", "host"])
def test_logits_do_not_depend_on_the_reader(checkpoint: Path, reader: str, host_memory: int) -> None:
    expected, _, _ = logits(checkpoint, "posix", host_memory=1 << 30)
    found, name, reason = logits(checkpoint, reader, host_memory=host_memory)
    assert torch.equal(found, expected)
    assert name == ("posix" if reader == "auto" else reader)
    assert reason


def test_unknown_reader_is_refused_with_the_known_ones(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match=r"reader 'pigeon' is unknown; use auto, posix, kvikio, mmap"):
        endor.load(checkpoint, reader="pigeon")

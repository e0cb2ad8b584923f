"""Every loader test must leave no thread and no descriptor behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def _threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("endor-"))


def _descriptors() -> dict[str, str]:
    found: dict[str, str] = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[link.name] = str(link.readlink())
        except OSError:  # the one this loop itself uses
            continue
    return {number: target for number, target in found.items() if "/proc/" not in target}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _threads(), _descriptors()
    yield
    if (_threads(), _descriptors()) != before:  # a full collection takes longer than most tests
        gc.collect()
    assert (_threads(), _descriptors()) == before

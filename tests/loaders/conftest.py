"""Every loader test must leave no thread and no descriptor behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAGE = 4096

WriteFile = Callable[..., tuple[Path, bytes]]


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


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    def write(size_bytes: int, *, name: str = "model.safetensors", directory: Path = tmp_path) -> tuple[Path, bytes]:
        content = os.urandom(size_bytes)
        path = directory / name
        path.write_bytes(content)
        return path, content

    return write

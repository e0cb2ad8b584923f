"""A container's memory limit counts as much as the machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from endor.loaders import available_bytes
from endor.loaders.memory import _headroom_bytes

MIB = 1 << 20


def group(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_machine_says_how_much_it_has() -> None:
    available = available_bytes()
    assert available is not None
    assert MIB < available < 1 << 50


@pytest.mark.parametrize(
    ("version", "limit", "usage", "cache"),
    [
        (2, "memory__max", "memory__current", "inactive_file"),
        (1, "memory__limit_in_bytes", "memory__usage_in_bytes", "total_inactive_file"),
    ],
)
def test_group_has_left_its_limit_less_what_it_uses_but_for_page_cache(
    tmp_path: Path, version: int, limit: str, usage: str, cache: str
) -> None:
    stat = f"anon 1\n{cache} {30 * MIB}\nactive_file 7\n"
    group(tmp_path, **{limit: f"{100 * MIB}\n", usage: f"{80 * MIB}\n", "memory__stat": stat})
    assert _headroom_bytes(tmp_path, version) == 50 * MIB


def test_group_beyond_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert _headroom_bytes(group(tmp_path, memory__max="5\n", memory__current="9\n"), 2) == 0


def test_group_without_limit_or_files_says_nothing(tmp_path: Path) -> None:
    assert _headroom_bytes(tmp_path, 2) is None
    assert _headroom_bytes(group(tmp_path, memory__max="max\n", memory__current="9\n"), 2) is None

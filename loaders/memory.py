"""How much memory this process could still take: asked before a large allocation, so that it fails in words.

Linux lets a process map more than there is and kills it, or another one, when it touches the pages. The limit
of a container (its control group) counts as much as the machine's memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["available_bytes"]

_CGROUPS: Final = Path("/sys/fs/cgroup")
_FILES: Final = {  # by version: limit, usage, and what of the usage is page cache that would make room
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes() -> int | None:
    """Memory the system would give without swapping, as far as it says so."""
    known = [bound for bound in (_machine_bytes(), _group_bytes(_CGROUPS)) if bound is not None]
    return min(known) if known else None


def _machine_bytes() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _group_bytes(root: Path) -> int | None:
    """What this process's control group has left; inside a container its own group looks like the root."""
    groups = _text(Path("/proc/self/cgroup"))
    bounds = []
    for pattern, folder, version in ((r"^0::(.*)$", root, 2), (r"^\d+:memory:(.*)$", root / "memory", 1)):
        found = re.search(pattern, groups, re.MULTILINE)
        if found:
            bounds += [
                _headroom_bytes(folder, version),
                _headroom_bytes(folder / found[1].lstrip("/"), version),
            ]
    return min((bound for bound in bounds if bound is not None), default=None)


def _headroom_bytes(folder: Path, version: int) -> int | None:
    limit_name, usage_name, cache_name = _FILES[version]
    limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
    if not limit.isdigit() or not usage.isdigit():  # "max": no limit
        return None
    cache = re.search(rf"^{cache_name} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(usage) + (int(cache[1]) if cache else 0))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""

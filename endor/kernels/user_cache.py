"""Small JSON files in the user's cache folder: what was measured once on this machine.

Whatever cannot be read counts as nothing, and where nothing can be written it is measured again next time.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_file", "read_versioned", "write_versioned"]


def cache_file(name: str) -> Path:
    """As the XDG base directory specification has it: a relative path in the variable does not count."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "endor" / name


def read_versioned(file: Path, version: int) -> dict[str, Any]:
    """What `write_versioned` wrote for this version; nothing if it was not that."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("version") != version:
        return {}
    content = found.get("content")
    return content if isinstance(content, dict) else {}


def write_versioned(file: Path, version: int, content: Mapping[str, Any]) -> None:
    """Replace the file as a whole, so that a reader at the same time sees the old or the new one."""
    text = json.dumps({"version": version, "content": dict(content)}, indent=1)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        Path(name).replace(file)

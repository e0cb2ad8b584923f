"""Streams files in units of 16 pages as a runtime would, and says what happened on standard output.

Usage: stream.py PASSES FILE...; one JSON object per file and mode.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from pathlib import Path

from endor.errors import LoadError
from endor.loaders import PAGE_BYTES, LoadPlan, PosixReader, Prefetcher, ReadOp, Unit

UNIT_BYTES = 16 * PAGE_BYTES


def stream(path: Path, *, direct: bool, passes: int) -> dict[str, object]:
    units = tuple(
        Unit(f"layer {offset // UNIT_BYTES}", (ReadOp(path, offset, UNIT_BYTES),))
        for offset in range(0, path.stat().st_size, UNIT_BYTES)
    )
    digest = hashlib.sha256()
    outcome: dict[str, object] = {}
    with (
        PosixReader(direct=direct, chunk_bytes=5 * PAGE_BYTES) as reader,
        Prefetcher(LoadPlan(units, depth=2), reader) as prefetcher,
    ):
        try:
            for index in [*range(len(units))] * passes:
                with prefetcher.acquire(index) as lease:
                    digest.update(lease.memory)
        except LoadError as error:
            outcome |= {"error": str(error), "errno": error.errno}
        except KeyboardInterrupt:
            outcome["interrupted"] = True
        stats = prefetcher.stats()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("endor-")]
    files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return outcome | {
        "digest": digest.hexdigest(),
        "bytes_direct": stats.bytes_direct,
        "bytes_buffered": stats.bytes_buffered,
        "left": left + [name for name in files if name == str(path)],
    }


if __name__ == "__main__":
    passes = int(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for path in sys.argv[2:]:
        for mode in ("direct", "buffered"):
            outcome = stream(Path(path), direct=mode == "direct", passes=passes)
            sys.stdout.write(json.dumps({"path": path, "mode": mode, **outcome}) + "\n")
            if "interrupted" in outcome:
                sys.exit()

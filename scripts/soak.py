#!/usr/bin/env python3
"""Generates with a streamed model for a long time and fails if memory, descriptors or threads grow.

    python scripts/soak.py out/demo --minutes 60

The first fifth of the time is for warming up; what the process has then is compared with what it has at the
end.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch

import endor
from bench_common import anonymous_bytes, environment_line, hush_transformers

WARM_UP_SHARE = 0.2
ALLOWED_BYTES = 8 << 20


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    anonymous_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        return cls(anonymous_bytes(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count())

    def grown_from(self, earlier: Footprint) -> list[str]:
        """What is more than it was, beyond what allocators keep."""
        more = self.anonymous_bytes - earlier.anonymous_bytes
        found = [f"anonymous memory grew by {more} bytes"] if more > ALLOWED_BYTES else []
        if self.descriptors > earlier.descriptors:
            found.append(f"descriptors grew from {earlier.descriptors} to {self.descriptors}")
        if self.threads > earlier.threads:
            found.append(f"threads grew from {earlier.threads} to {self.threads}")
        return found


class Soak:
    """Generation with a streamed model, and every so often a model loaded and closed beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = endor.load(directory, host_memory=0)
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = 0

    def once(self) -> None:
        """One generation from a random prompt."""
        prompt = torch.randint(3, self.vocabulary, (1, 12), generator=self.generator)
        out = self.model.generate(prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        self.tokens += out.shape[1] - prompt.shape[1]

    def another(self) -> None:
        """A second model of the same files, used and closed."""
        other = endor.load(self.directory, host_memory=0)
        other.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
        other.endor_runtime.close()

    def run(self, seconds: float) -> None:
        began, turn = perf_counter(), 0
        while perf_counter() - began < seconds:
            self.once()
            turn += 1
            if turn % 10 == 0:
                self.another()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="an Endor checkpoint")
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    hush_transformers()
    print(environment_line())
    soak = Soak(options.model)
    soak.run(60 * options.minutes * WARM_UP_SHARE)
    warm = Footprint.now()
    soak.run(60 * options.minutes * (1 - WARM_UP_SHARE))
    end = Footprint.now()
    print(json.dumps({"tokens": soak.tokens, "warm": asdict(warm), "end": asdict(end)}))
    if grown := end.grown_from(warm):
        raise SystemExit("; ".join(grown))


if __name__ == "__main__":
    main()

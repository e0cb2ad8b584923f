"""The Triton kernels compile ahead of time, for every generation of GPUs we name, without a GPU.

All of them, for all targets: `python scripts/triton_resources.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

MAX_REGISTERS = {"decode": 128, "matmul": 255}
"""A multiprocessor has 65,536: with 128, two programs of 256 threads fit."""


def resources(repository: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """What scripts/triton_resources.py says, in a process without the interpreter and with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(repository), "TRITON_CACHE_DIR": str(folder / "cache")}
    if os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    report = folder / "resources.json"
    command = [sys.executable, "-W", "error", "scripts/triton_resources.py", "--json", str(report)]
    done = subprocess.run(
        [*command, *arguments], cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels: list[dict[str, Any]] = json.loads(report.read_text())["kernels"]
    return kernels


@pytest.mark.slow
def test_kernels_compile_for_the_h100_and_fit(repository: Path, tmp_path: Path) -> None:
    names = ["decode raw bf16", "decode exponent", "decode int", "decode group", "matmul 1 row exponent"]
    names += ["matmul 1 row raw", "matmul 16 rows int4"]
    kernels = resources(repository, tmp_path, "--targets", "sm_90", "--kernels", *names)
    assert len(kernels) == 13
    for kernel in kernels:
        assert kernel["registers"] <= MAX_REGISTERS[kernel["kernel"].split()[0]], kernel
        assert kernel["spilled_bytes"] <= (0 if kernel["kernel"].startswith("decode") else 64), kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_120", "gfx942"])
def test_kernels_compile_for_other_devices(target: str, repository: Path, tmp_path: Path) -> None:
    names = ["decode raw bf16", "decode exponent bf16 0+3", "matmul 16 rows raw"]
    kernels = resources(repository, tmp_path, "--targets", target, "--kernels", *names)
    assert [kernel["kernel"] for kernel in kernels] == [*names[:2], "matmul 16 rows raw bf16"]
    assert all(kernel["target"] == target for kernel in kernels)
    assert not any(kernel["spilled_bytes"] for kernel in kernels if kernel["kernel"].startswith("decode"))


def test_decoding_takes_few_instructions_per_weight(repository: Path, tmp_path: Path) -> None:
    """docs/design/triton.md says what follows from them; a change that costs one in ten is one to know of."""
    names = ["decode raw bf16", "decode exponent bf16"]
    kernels = resources(repository, tmp_path, "--targets", "sm_90", "--kernels", *names)
    limits = [13.6, 24.6, 24.1]
    assert len(kernels) == len(limits)
    for kernel, limit in zip(kernels, limits, strict=True):
        assert 5 < kernel["per_weight"] <= limit, kernel

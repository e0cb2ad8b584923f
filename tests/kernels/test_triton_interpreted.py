"""The Triton kernels in Triton's interpreter: each of their test files, in a process of its own.

The interpreter must be asked for before Triton is imported, and must not reach torch.compile's tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

FILES = ("decode", "group", "hostile", "matmul", "tuning")


@pytest.mark.parametrize("name", FILES)
def test_kernels_pass_in_the_interpreter(name: str, repository: Path) -> None:
    command = [sys.executable, "-m", "pytest", f"tests/kernels/test_triton_{name}.py", "-q", "-x"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout

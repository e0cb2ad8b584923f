"""The shipped model, converted once for all command line tests, and a way to call a command."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import endor

MODULES = {"run-offloaded": "endor.cli.run", "convert-model": "endor.cli.convert", "endor": "endor.cli"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    out = tmp_path_factory.mktemp("demo") / "endor"
    endor.convert(repository / "endor" / "assets" / "demo_model", out, method="magnitude")
    return out


@pytest.fixture(scope="session")
def run_command() -> Run:
    """Run a command line in this process: `run_command("run-offloaded", ...)`, ten times as fast."""

    def run(name: str, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(_command(name), [*map(str, arguments)], input=stdin, prog_name=name)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess([name], result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def run_process(repository: Path) -> Run:
    """The same in a process of its own, as a shell would."""

    def run(name: str, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        code = f"from {MODULES[name]} import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            cwd=repository,
            check=False,
        )

    return run


def _command(name: str) -> click.Command:
    module = importlib.import_module(MODULES[name])
    command = module.cli if name == "endor" else module.command
    assert isinstance(command, click.Command)
    return command

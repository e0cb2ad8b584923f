"""The documentation of the command line is the commands' own help, and every command has some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from endor.cli import cli

COMMANDS = cli.list_commands(click.Context(cli))


def test_docs_cli_is_what_the_help_says(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_cli_docs.py", "--check"],
        cwd=repository,
        env=_environment(repository),
        check=False,
    )
    assert done.returncode == 0, "run python scripts/make_cli_docs.py and commit docs/cli.md"


def _environment(repository: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_knows_json_and_quiet(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert {"as_json", "quiet"} <= {p.name for p in command.params}

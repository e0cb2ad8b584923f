#!/usr/bin/env python3
"""Writes docs/cli.md from the commands' own help; `--check` fails if the file is not what it would write."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from endor.cli import cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100
INTRODUCTION = """# Command line

`convert-model` and `run-offloaded` are the two commands most people need; they are also `endor convert` and
`endor run`. Exit codes: 0 success, 1 failure (one line on stderr says what and what to do), 2 wrong usage,
130 Ctrl-C. With `--json`, stdout has one JSON object and everything else goes to stderr; `--quiet` prints no
progress and no notes. A SIZE is `8GiB`, `500MB`, a number of bytes, or `0`. ENDOR_TRACEBACK=1 in the
environment shows where an unexpected error happened.

This page is made by `python scripts/make_cli_docs.py` from the commands' own help.
"""
ALIASES = {"convert": "convert-model", "run": "run-offloaded"}


def page() -> str:
    """The whole page."""
    group = click.Context(cli, info_name="endor", terminal_width=WIDTH, max_content_width=WIDTH)
    parts = [INTRODUCTION]
    for name in cli.list_commands(group):
        command = cli.get_command(group, name)
        assert command is not None
        shown = ALIASES.get(name, f"endor {name}")
        context = click.Context(command, info_name=shown, terminal_width=WIDTH, max_content_width=WIDTH)
        parts.append(f"## {shown}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check; returns the exit code."""
    if "--check" in sys.argv[1:]:
        return int(not TARGET.exists() or TARGET.read_text() != page())
    TARGET.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())

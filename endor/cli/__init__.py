"""The command line: each command parses, calls the library, and prints."""

from __future__ import annotations

import importlib
from typing import Any

import click

import endor

__all__ = ["cli", "main"]

_COMMANDS = {
    "convert": "endor.cli.convert",
    "doctor": "endor.cli.doctor",
    "inspect": "endor.cli.inspect",
    "plan": "endor.cli.plan",
    "run": "endor.cli.run",
    "verify": "endor.cli.verify",
}


class _LazyGroup(click.Group):
    """Imports a command when it is named, so that `endor verify` does not wait for transformers."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module: Any = importlib.import_module(_COMMANDS[cmd_name])
        return module.command  # type: ignore[no-any-return]


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(endor.__version__, prog_name="endor")
def cli() -> None:
    """Run language models too big for memory from compressed, streamed weights."""


def main() -> None:
    """Entry point of `endor`."""
    cli(prog_name="endor")

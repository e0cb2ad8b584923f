"""`endor verify`: is every byte of a checkpoint what was written?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from endor.cli.options import common_options, emit_json, exits_cleanly

__all__ = ["command", "verify"]


@click.command("verify", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@common_options
@exits_cleanly
def command(*, model: Path, as_json: bool, quiet: bool) -> None:
    """Check the Endor checkpoint in directory MODEL: structure, checksums, contents, padding, index.

    Every error is reported, not only the first. The exit code is 0 if there is none, else 1.
    """
    from endor.formats import verify_checkpoint

    with _progress_bar(shown=not (quiet or as_json) and sys.stderr.isatty()) as progress:
        errors = verify_checkpoint(model, progress=progress)
    if as_json:
        emit_json({"ok": not errors, "errors": errors})
    else:
        for error in errors:
            click.echo(f"error: {error}", err=True)
        if not quiet:
            click.echo(f"{model}: {_verdict(len(errors))}")
    if errors:
        sys.exit(1)


def _verdict(errors: int) -> str:
    return "ok" if not errors else f"{errors} error{'s' if errors > 1 else ''}"


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yields what `verify_checkpoint` reports its progress to."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify", total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)


verify = command

"""`convert-model`: a Hugging Face model becomes an Endor checkpoint."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from endor.cli.options import SIZE, common_options, emit_json, exits_cleanly, format_size, say
from endor.cli.progress import progress_display

__all__ = ["command", "main"]

_TERMINATED = 128 + signal.SIGTERM


def _sparsity(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:  # noqa: ARG001
    if value is not None and not 0 <= value < 1:
        raise click.BadParameter(f"{value} is not at least 0 and below 1")
    return value


@click.command("convert", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(["wanda", "magnitude", "none"]),
    default="wanda",
    show_default=True,
    help="What decides which weights go; none keeps every weight.",
)
@click.option(
    "--sparsity", type=float, callback=_sparsity, help="Share of the weights that go.  [default: 0.5]"
)
@click.option(
    "--pattern",
    type=click.Choice(["unstructured", "2:4", "4:8"]),
    default="unstructured",
    show_default=True,
    help="N:M keeps N of every M neighbours along the input dimension.",
)
@click.option(
    "--values",
    type=click.Choice(["auto", "raw", "exponent", "int8", "int4"]),
    default="auto",
    show_default=True,
    help="How kept values are stored: auto is the smallest lossless way per tensor; int8 and int4 lose. "
    "Linear weights that are not pruned, such as the head, are losslessly coded in any case but raw.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help='Text with blank lines between documents, or .jsonl with "text".  [default: the text that ships]',
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Calibration sequences."
)
@click.option(
    "--sequence-length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of each."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the calibration sequences.")
@click.option(
    "--device", default="auto", show_default=True, help="Where calibration runs: auto, cpu or cuda[:N]."
)
@click.option(
    "--memory", type=SIZE, help="Bound on the converter's own memory.  [default: largest tensor x 4 + 1 GiB]"
)
@click.option(
    "--shard-size",
    type=SIZE,
    default="4GiB",
    show_default=True,
    help="No file is larger, unless one block is.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Names of tensors to prune, e.g. '*.mlp.*'; repeatable.  [default: the blocks' Linear weights]",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Names of tensors not to prune, only to code losslessly (as they are with --values raw); "
    "repeatable.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted conversion.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint or interrupted conversion in OUT.")
@click.option(
    "--evaluate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Perplexity on a text, before and after.",
)
@common_options
@exits_cleanly
def command(
    *, source: str, out: Path, evaluate: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Convert the Hugging Face model SOURCE, a directory or hub id, to an Endor checkpoint in the directory
    OUT.

    SOURCE is never changed. OUT is complete once it has a config.json; an interrupted conversion continues
    with --resume.
    """
    if options["resume"] and options["overwrite"]:
        raise click.UsageError(
            "--resume continues a conversion, --overwrite starts it again: give one of them"
        )
    with _terminated_like_interrupted(), _warnings_to_stderr(quiet=quiet):
        report = _convert(source, out, options, evaluate=evaluate, quiet=quiet)
    if as_json:
        emit_json(report)
    else:
        _print(out, report, quiet=quiet)


def _convert(
    source: str, out: Path, options: dict[str, Any], *, evaluate: Path | None, quiet: bool
) -> dict[str, Any]:
    say(f"converting {source}", quiet=quiet)
    import transformers

    from endor.cli.evaluate import perplexities, read_text
    from endor.convert.pipeline import convert
    from endor.convert.source import resolve_source

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = read_text(evaluate) if evaluate is not None else None
    try:
        with progress_display(quiet=quiet) as show:
            report = convert(source, out, progress=show, **options).to_json()
    except (KeyboardInterrupt, SystemExit):
        say("what is finished is kept: the same command with --resume continues", quiet=quiet)
        raise
    if text is not None:
        length = options["sequence_length"]
        tell = partial(say, quiet=quiet)
        report["perplexity"] = perplexities(
            resolve_source(source), out, text, sequence_length=length, say=tell
        )
    return report


def _print(out: Path, report: dict[str, Any], *, quiet: bool) -> None:
    if quiet:
        return
    click.echo(
        f"{out}: {report['tensors']} tensors, {report['pruned_tensors']} of them pruned to sparsity "
        f"{report['sparsity']:.3f}, {report['bits_per_weight']:.2f} bits per weight"
    )
    click.echo(
        f"{format_size(report['source_bytes'])} became {format_size(report['output_bytes'])} in "
        f"{report['seconds']:.1f} s"
    )
    for name, value in report.get("perplexity", {}).items():
        click.echo(f"perplexity, {name}: {value:.3f}")


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that no temporary file stays behind."""

    def terminate(*_: object) -> None:
        sys.exit(_TERMINATED)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _warnings_to_stderr(*, quiet: bool) -> Iterator[None]:
    """Show Endor's warnings as one line each; those of libraries are not for users of the command."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if category is UserWarning and "endor" in Path(filename).parts:
            say(f"warning: {message}", quiet=quiet)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def main() -> None:
    """Entry point of `convert-model`."""
    command(prog_name="convert-model")

"""`run-offloaded`: generate text with a converted model, its weights streamed from disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from endor.cli.options import (
    DEVICE,
    SIZE,
    common_options,
    depth_option,
    emit_json,
    exits_cleanly,
    say,
)
from endor.errors import LoadError

if TYPE_CHECKING:
    import torch

    from endor.cli.generation import Generation, Session

__all__ = ["command", "main"]

_DTYPES = ("auto", "bfloat16", "float16", "float32")


@click.command("run", context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": None})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", help="The text to continue; from stdin if neither this nor --prompt-file is given.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A file with the text to continue.")
@click.option(
    "--chat", is_flag=True, help="Converse: the chat template is applied, one turn per line of input."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens to make at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that have this probability together.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of sampling, where the temperature is above 0.",
)
@click.option(
    "--device",
    type=DEVICE,
    default="auto",
    show_default=True,
    metavar="[auto|cpu|cuda[:N]]",
    help="Where to compute; auto takes a GPU if there is one.",
)
@click.option(
    "--device-memory",
    type=SIZE,
    help="Bytes of compressed blocks to keep in the memory of a GPU, e.g. 8GiB; 0 keeps none.  "
    "[default: what fits beside everything else]",
)
@click.option(
    "--host-memory",
    type=SIZE,
    help="Bytes of compressed blocks to keep in memory, e.g. 8GiB; 0 streams every block from disk.  "
    "[default: what fits in 70 % of free memory]",
)
@click.option(
    "--reader",
    type=click.Choice(["auto", "posix", "kvikio", "mmap"]),
    default="auto",
    show_default=True,
    help="How blocks are read; `endor doctor` says what each can do here.",
)
@depth_option
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True, help="To compute in.")
@click.option(
    "--matmul",
    type=click.Choice(["auto", "decode"]),
    default="auto",
    show_default=True,
    help="auto multiplies straight from compressed weights where that is faster; decode gives the logits of "
    "the dense pruned model to the last bit.",
)
@click.option(
    "--verify",
    type=click.Choice(["first", "always", "never"]),
    default="first",
    show_default=True,
    help="When weights are compared with their checksums: when they are first read, every time, or never.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what happened when to FILE, a Chrome trace for ui.perfetto.dev.",
)
@click.option(
    "--stats", is_flag=True, help="Print a table: tokens/s, bytes per tier, where the time went, memory."
)
@common_options
@exits_cleanly
def command(
    *,
    model: Path,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    stats: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Generate text with the Endor checkpoint in directory MODEL.

    The prompt comes from --prompt, --prompt-file or stdin. New text goes to stdout as it is made.
    """
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("give --prompt or --prompt-file, not both")
    if chat and (as_json or prompt is not None or prompt_file is not None):
        raise click.UsageError("--chat is interactive: it takes no --prompt, --prompt-file or --json")
    text = None if chat else _read_prompt(prompt, prompt_file)
    with _session(model, text, quiet=quiet, options=options) as session:
        if text is None:
            _converse(session, stats=stats)
        else:
            generation = session.generate(session.encode(text), echo=not as_json)
            _report(session, generation, stats=stats, as_json=as_json)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is None:
        prompt = _read_file(prompt_file) if prompt_file is not None else _read_stdin()
    if not prompt.strip():
        raise click.UsageError(
            "the prompt is empty; give --prompt TEXT, --prompt-file FILE, or text on stdin"
        )
    return prompt


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LoadError(f"cannot read the prompt file {path}: {reason}") from error


def _read_stdin() -> str:
    if sys.stdin.isatty():
        say("reading the prompt from the terminal; end it with Ctrl-D")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise LoadError("cannot read the prompt from stdin: it is not UTF-8 text") from error


@contextmanager
def _session(model: Path, text: str | None, *, quiet: bool, options: dict[str, Any]) -> Iterator[Session]:
    from endor.cli.generation import Session, SessionOptions

    options["dtype"] = _dtype(options["dtype"])
    with Session(model, SessionOptions(**options), prompt=text, quiet=quiet) as session:
        yield session


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _converse(session: Session, *, stats: bool) -> None:
    """One turn per line, until the input ends."""
    messages: list[dict[str, str]] = []
    while True:
        line = _next_line()
        if line is None:
            return
        messages.append({"role": "user", "content": line})
        generation = session.generate(session.encode_chat(messages), echo=True)
        messages.append({"role": "assistant", "content": generation.text})
        _report(session, generation, stats=stats, as_json=False)


def _next_line() -> str | None:
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    for line in sys.stdin:
        if line.strip():
            return str(line.strip())
    return None


def _report(session: Session, generation: Generation, *, stats: bool, as_json: bool) -> None:
    from endor.cli.report import print_stats

    if as_json:
        emit_json(generation.to_json(session.runtime))
    if stats:
        print_stats(generation, session.runtime)


def main() -> None:
    """Entry point of `run-offloaded`."""
    command(prog_name="run-offloaded")

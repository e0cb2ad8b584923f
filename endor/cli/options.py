"""What all commands share: sizes, common options, and how errors become messages and exit codes."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import click

import endor
from endor.errors import EndorError

__all__ = ["SIZE", "common_options", "depth_option", "emit_json", "exits_cleanly", "format_size", "say"]

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)}
_INTERRUPTED = 130


class Size(click.ParamType[int]):
    """A number of bytes: `8GiB`, `500MB`, `1.5 GB`, `4096` or `0`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
        if match is None or match[2] not in _UNITS:
            self.fail(
                f"{value!r} is not a size; write for example 8GiB, 500MB, a number of bytes, or 0", param, ctx
            )
        number = float(match[1]) * _UNITS[match[2]]
        if not math.isfinite(number) or number >= 2**63:
            self.fail(f"{value!r} is too large", param, ctx)
        return int(number)


SIZE = Size()


class Device(click.ParamType[str]):
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)) is None:
            self.fail(f"{value!r} is no device; write auto, cpu, cuda or cuda:N", param, ctx)
        return str(value)


DEVICE = Device()


def format_size(n_bytes: float) -> str:
    """Bytes for people: `1.2 GB`, `34.5 MB`, `678 B`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n_bytes) >= scale:
            return f"{n_bytes / scale:.{1 if n_bytes / scale < 100 else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


depth_option = click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Blocks read ahead of the one that runs.",
)


def common_options(function: F) -> F:
    """Add `--json`, `--quiet` and `--version`."""
    function = click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object to stdout; everything else goes to stderr.",
    )(function)
    function = click.option("--quiet", is_flag=True, help="Print no progress and no notes.")(function)
    return click.version_option(endor.__version__, prog_name="endor")(function)


def emit_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of a command."""
    click.echo(json.dumps(value, ensure_ascii=False))


def say(message: str, *, quiet: bool = False) -> None:
    """A note for the person in front of the terminal: to stderr, unless `quiet`."""
    if not quiet:
        click.echo(message, err=True)


def exits_cleanly(function: F) -> F:
    """Turn errors into one line on stderr and an exit code: 1 for a failure, 130 for Ctrl-C. Usage errors are
    click's."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _die("interrupted", _INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output is gone; give the interpreter nothing to flush into it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except EndorError as error:
            _die(f"error: {error}", 1)
        except MemoryError:
            _die("error: out of memory; give a smaller budget or a shorter prompt", 1)
        except Exception as error:  # noqa: BLE001 - the boundary: a person must never see a traceback
            if "ENDOR_TRACEBACK" in os.environ:
                traceback.print_exc()
            _die(
                f"error: {type(error).__name__}: {error}\nThis is a bug in Endor or in a library under it. "
                "Set ENDOR_TRACEBACK=1 to see where it happened",
                1,
            )

    return wrapped  # type: ignore[return-value]


def _die(message: str, code: int) -> None:
    click.echo(message, err=True)
    sys.exit(code)

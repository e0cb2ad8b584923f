"""The directory a conversion writes: what it may hold before, how it is marked unfinished, and how it is
finished.

While a conversion is under way the directory has a journal and no config.json. The journal says what is being
converted and how; the shards under their final names are the ones that are finished. config.json comes last,
so a directory that has one is complete.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endor.errors import ConvertError
from endor.formats.reader import CONFIG_NAME, is_endor_checkpoint
from endor.formats.writer import INDEX_NAME, atomic_write

__all__ = [
    "ACTIVATIONS_NAME",
    "JOURNAL_NAME",
    "OutputState",
    "check_output",
    "claim_output",
    "copy_companions",
    "finish_output",
]

JOURNAL_NAME = "endor-conversion.json"
ACTIVATIONS_NAME = "endor-activations.tmp"
"""Directory for calibration activations that do not fit in memory."""
_JOURNAL_VERSION = 1
_CLEARING = {"state": "deleting what was here before"}
_OURS = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors(\.part(\.moved)?)?"
    r"|model\.safetensors\.index\.json(\.part)?|endor-conversion\.json(\.part)?|config\.json\.part"
)
_LEFTOVERS = re.compile(r".*\.part(\.moved)?")
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab", ".bpe"}
_COMPANION_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps chat templates beyond the first."""


class OutputState(enum.Enum):
    """What a directory holds."""

    EMPTY = "empty or missing"
    COMPLETE = "a complete Endor checkpoint"
    INTERRUPTED = "a conversion that was interrupted"
    FOREIGN = "something else"


def _state_of(out: Path) -> OutputState:
    if not out.exists():
        return OutputState.EMPTY
    if not out.is_dir():
        raise ConvertError(f"{out} is a file; OUT must be a directory, or not exist")
    if (out / JOURNAL_NAME).exists():
        return OutputState.INTERRUPTED
    if is_endor_checkpoint(out):
        return OutputState.COMPLETE
    # A run that was killed while it wrote its journal leaves only the part of that.
    found = {path.name for path in out.iterdir()} - {f"{JOURNAL_NAME}.part"}
    return OutputState.FOREIGN if found else OutputState.EMPTY


def check_output(out: Path, source: Path, *, resume: bool, overwrite: bool) -> OutputState:
    """Decide whether a conversion may write to `out`; changes nothing.

    Raises ConvertError that says what to do if it may not.
    """
    if resume and overwrite:
        raise ConvertError("resume continues a conversion and overwrite starts it again: ask for one of them")
    state = _state_of(out)
    if out.exists() and out.samefile(source):
        raise ConvertError(f"OUT and SOURCE are the same directory, {out}; the source is never changed")
    match state:
        case OutputState.FOREIGN:
            raise ConvertError(
                f"{out} is not empty and was not written by Endor, so it is left alone; choose a new "
                "directory"
            )
        case OutputState.COMPLETE if resume:
            raise ConvertError(f"{out} is complete, there is nothing to resume; --overwrite converts again")
        case OutputState.COMPLETE if not overwrite:
            raise ConvertError(
                f"{out} is an Endor checkpoint already; choose a new directory, or --overwrite it"
            )
        case OutputState.INTERRUPTED if not (resume or overwrite):
            raise ConvertError(
                f"{out} holds an interrupted conversion; continue it with --resume, or --overwrite it"
            )
        case _:
            return state


@contextmanager
def claim_output(
    out: Path, state: OutputState, fingerprint: Mapping[str, Any], *, resume: bool
) -> Iterator[None]:
    """Mark the directory as being written to, alone, for as long as the context lasts.

    Args:
        out: created if missing.
        state: what `check_output` found there.
        fingerprint: what is converted and how, as in `JOURNAL_NAME`.
        resume: continue what is there; otherwise what is ours is deleted.

    Raises ConvertError if another process writes to it, or if a resumed conversion was started differently.
    """
    journal = out / JOURNAL_NAME
    with _os_errors(f"cannot prepare {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if _state_of(out) is not state:
                raise ConvertError(
                    f"{out} was {state.value} when this conversion began to prepare and is not any more: "
                    "another one has written to it. Nothing was changed; start again"
                )
            if state is OutputState.INTERRUPTED and resume and _read_journal(journal) != _CLEARING:
                _check_same(journal, fingerprint)
                _remove(out, _LEFTOVERS)
            else:
                if state is not OutputState.EMPTY:
                    _clear(out, journal)
                _write_journal(journal, fingerprint)
            shutil.rmtree(out / ACTIVATIONS_NAME, ignore_errors=True)
            yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the directory's lock; the system gives it back even if the process is killed."""
    fd = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(
                f"another conversion is writing to {out}; wait for it, or stop it first"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
                raise
            # Some network file systems have no locks; the journal still guards against everything but a race.
        yield
    finally:
        os.close(fd)


def _clear(out: Path, journal: Path) -> None:
    """Delete what is ours. The journal says so meanwhile: a resumed run must not take old shards for its
    own."""
    _write_journal(journal, _CLEARING)
    (out / CONFIG_NAME).unlink(missing_ok=True)
    _remove(out, _OURS, keep=journal)


def _write_journal(journal: Path, content: Mapping[str, Any]) -> None:
    atomic_write(journal, json.dumps({"version": _JOURNAL_VERSION, **content}, indent=2).encode() + b"\n")


def _read_journal(journal: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(journal.read_bytes())
    except (OSError, ValueError) as error:
        raise ConvertError(f"{journal} cannot be read ({error}); start again with --overwrite") from error
    if not isinstance(recorded, dict) or recorded.pop("version", None) != _JOURNAL_VERSION:
        raise ConvertError(f"{journal} is not of this version of Endor; start again with --overwrite")
    return recorded


def _check_same(journal: Path, fingerprint: Mapping[str, Any]) -> None:
    recorded, expected = _read_journal(journal), json.loads(json.dumps(fingerprint))
    differences = list(_differences(recorded, expected))
    if differences:
        raise ConvertError(
            f"{journal.parent}: the interrupted conversion was started differently: "
            f"{'; '.join(differences[:5])}. Use the same source and options, or start again with --overwrite"
        )


def _differences(recorded: Mapping[str, Any], expected: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*recorded, *expected}):
        was, now = recorded.get(key), expected.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{path}{key} ")
        elif was != now:
            yield f"{path}{key} was {was!r}, now {now!r}"


def _remove(out: Path, pattern: re.Pattern[str], *, keep: Path | None = None) -> None:
    for path in out.iterdir():
        if pattern.fullmatch(path.name) and path.is_file() and path != keep:
            path.unlink()


def free_bytes(out: Path) -> int:
    """Free space where `out` is or will be. Raises ConvertError if that cannot be found out."""
    there = out.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    with _os_errors(f"cannot find out how much space is free for {out}"):
        return shutil.disk_usage(there).free


def bytes_of_ours(out: Path) -> int:
    """Bytes of the files in `out` that overwriting deletes."""
    if not out.is_dir():
        return 0
    return sum(path.stat().st_size for path in out.iterdir() if _OURS.fullmatch(path.name))


def copy_companions(source: Path, out: Path) -> None:
    """Copy what belongs to the model beside its weights: tokenizer, generation config, templates, license.

    Raises ConvertError if a file cannot be copied.
    """
    with _os_errors(f"cannot copy the tokenizer and other small files of {source} to {out}"):
        for path in sorted(source.iterdir()):
            if path.is_file() and _is_companion(path.name):
                _copy(path, out / path.name)
        if (source / _TEMPLATES).is_dir():
            (out / _TEMPLATES).mkdir(exist_ok=True)
            for path in sorted((source / _TEMPLATES).glob("*.jinja")):
                _copy(path, out / _TEMPLATES / path.name)


def _is_companion(name: str) -> bool:
    if name in (CONFIG_NAME, INDEX_NAME, JOURNAL_NAME) or name.endswith(".index.json"):
        return False
    return Path(name).suffix in _COMPANION_SUFFIXES or name.startswith(_COMPANION_PREFIXES)


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def finish_output(out: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, which makes the directory complete, and take the journal away."""
    atomic_write(out / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
    (out / JOURNAL_NAME).unlink(missing_ok=True)


@contextmanager
def _os_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ConvertError:
        raise
    except OSError as error:
        raise ConvertError(f"{what}: {error.strerror or error}") from error

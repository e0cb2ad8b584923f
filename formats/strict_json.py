"""JSON as the format reads it: what two readers could understand differently, or what could exhaust one, is
refused.

Python's parser takes duplicate names, NaN, lone surrogates and nesting down to the end of the stack; the
safetensors library takes none or some of them. Here all are FormatErrors [F3], and numbers come out as
checked integers.
"""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any, NoReturn

from endor.errors import FormatError
from endor.formats.layout import MAX_INTEGER

__all__ = ["integer", "integers", "load_object", "mapping", "short", "strings"]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 160
_BRIEF.maxlevel = 3


def short(value: object) -> str:
    """`repr`, cut so that a hostile value cannot fill a message."""
    if isinstance(value, str) and len(value) <= _BRIEF.maxstring // 2:  # every name of a header comes here
        return repr(value)
    return _BRIEF.repr(value)


def load_object(raw: bytes | str, *, where: str, constants: bool = False) -> dict[str, Any]:
    """Parse one JSON object; `constants` allows NaN and Infinity. FormatErrors start with `where`."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        loaded = json.loads(
            text, object_pairs_hook=_unique, parse_constant=float if constants else _no_constant
        )
        if _SURROGATE.search(text):  # a pair is fine, half of one cannot be encoded again
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except RecursionError:
        raise FormatError(f"{where} is nested too deeply [F3]") from None
    except UnicodeError as error:
        raise FormatError(f"{where} is not UTF-8 ({error}) [F3]") from None
    except ValueError as error:
        raise FormatError(f"{where} is not JSON ({error}) [F3]") from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{where} is a JSON {type(loaded).__name__}, expected an object [F3]")
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    loaded = dict(pairs)
    if len(loaded) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise FormatError(f"duplicate name {short(name)} [F3]")
            seen.add(name)
    return loaded


def _no_constant(text: str) -> NoReturn:
    raise FormatError(f"{text} is not a JSON number [F3]")


def integer(value: object, *, where: str) -> int:
    """`value` if it is an integer from 0 to MAX_INTEGER; true, 1.0 and 1e3 are not. Raises FormatError."""
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise FormatError(f"{where} must be an integer from 0 to {MAX_INTEGER}, found {short(value)} [F3]")
    return value


def integers(value: object, *, where: str) -> tuple[int, ...]:
    """A list of such integers as a tuple. Raises FormatError."""
    if not isinstance(value, list):
        raise FormatError(f"{where} must be a list of integers, found {short(value)} [F3]")
    return tuple(integer(item, where=where) for item in value)


def strings(value: object, *, where: str) -> tuple[str, ...]:
    """A list of strings as a tuple. Raises FormatError."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"{where} must be a list of strings, found {short(value)} [F3]")
    return tuple(value)


def mapping(value: object, keys: set[str], *, where: str, rule: str) -> dict[str, Any]:
    """`value` if it is an object with exactly `keys`. Raises FormatError that cites `rule`."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be an object, found {short(value)} [{rule}]")
    for key in sorted(keys - value.keys()):
        raise FormatError(f"{where}: key {key!r} is missing [{rule}]")
    for key in sorted(value.keys() - keys):
        raise FormatError(f"{where}: unknown key {short(key)}; expected {', '.join(sorted(keys))} [{rule}]")
    return value

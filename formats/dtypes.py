"""Names of element types in a file (those of safetensors) and the torch dtypes they stand for."""

from __future__ import annotations

import torch

from endor.errors import FormatError
from endor.formats.strict_json import short

__all__ = ["DTYPES", "PACKABLE", "dtype_name", "itemsize", "parse_dtype"]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PACKABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
"""The dtypes of weights that a bitmap mask may be applied to."""


def dtype_name(dtype: torch.dtype) -> str:
    """The file's name of a torch dtype. Raises FormatError where the format has none."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise FormatError(f"{dtype} has no name in the format; use one of {', '.join(DTYPES)}") from None


def parse_dtype(name: object, *, where: str) -> torch.dtype:
    """The torch dtype a file's name stands for. Raises FormatError that says `where` the name was found."""
    if not isinstance(name, str) or name not in DTYPES:
        raise FormatError(f"{where}: unknown dtype {short(name)}; expected one of {', '.join(DTYPES)} [F4]")
    return DTYPES[name]


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return dtype.itemsize

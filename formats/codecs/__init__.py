"""Values codecs, one per file, and the registry the header looks names up in."""

from __future__ import annotations

from endor.errors import FormatError
from endor.formats.codecs.base import (
    BlockRun,
    Codec,
    Params,
    SectionPart,
    SectionSpec,
    ValuesContext,
    ValuesSlice,
)
from endor.formats.codecs.exponent import ExponentCodec
from endor.formats.codecs.quantized import Int4Codec, Int8Codec
from endor.formats.codecs.raw import RawCodec
from endor.formats.strict_json import short

__all__ = [
    "CODECS",
    "BlockRun",
    "Codec",
    "ExponentCodec",
    "Int4Codec",
    "Int8Codec",
    "Params",
    "RawCodec",
    "SectionPart",
    "SectionSpec",
    "ValuesContext",
    "ValuesSlice",
    "codec_named",
]

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (RawCodec(), ExponentCodec(), Int8Codec(), Int4Codec())
}


def codec_named(name: object, *, where: str = "values") -> Codec:
    """The codec called `name`. Raises FormatError that says `where` the name was found."""
    if not isinstance(name, str) or name not in CODECS:
        raise FormatError(
            f"{where}: unknown codec {short(name)}; this Endor knows {', '.join(CODECS)}. "
            "A newer Endor may have written it: upgrade to read it [F11]"
        )
    return CODECS[name]

"""What the bytes of an Endor checkpoint mean: layout, codecs, header, writer and reader (docs/format.md)."""

from __future__ import annotations

from endor.formats.codecs import CODECS, Codec, codec_named
from endor.formats.entries import Block, Header, Section, TensorEntry
from endor.formats.header import parse_header, read_header
from endor.formats.layout import FORMAT_VERSION, Geometry
from endor.formats.packed import PackedTensor, TensorLayout
from endor.formats.reader import BlockRange, CheckpointReader, is_endor_checkpoint
from endor.formats.verify import verify_checkpoint
from endor.formats.writer import CheckpointWriter, ShardWriter, atomic_write, header_bytes_bound

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "Block",
    "BlockRange",
    "CheckpointReader",
    "CheckpointWriter",
    "Codec",
    "Geometry",
    "Header",
    "PackedTensor",
    "Section",
    "ShardWriter",
    "TensorEntry",
    "TensorLayout",
    "atomic_write",
    "codec_named",
    "header_bytes_bound",
    "is_endor_checkpoint",
    "parse_header",
    "read_header",
    "verify_checkpoint",
]

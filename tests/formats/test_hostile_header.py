"""One shard per rule of docs/format.md that breaks it alone; the message names file, tensor and rule."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from endor.errors import FormatError, LoadError
from endor.formats import parse_header, read_header
from tests.support.shards import ShardParts, write_checkpoint, write_raw

SHARD = "model-00001-of-00001.safetensors"
W, NORM, HEAD = "layers.0.w", "layers.0.norm", "head.w"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a shard that breaks nothing."""
    return (write_checkpoint(tmp_path_factory.mktemp("whole")) / SHARD).read_bytes()


@pytest.fixture
def path(tmp_path: Path, whole: bytes) -> Path:
    """A shard that breaks nothing, to be broken."""
    path = tmp_path / SHARD
    path.write_bytes(whole)
    return path


def refuse(path: Path, rule: str, *words: str) -> None:
    """The file is refused with a message that starts with its path, has the words, and ends with the rule."""
    with pytest.raises(FormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    assert message.endswith(f"[{rule}]"), message
    for word in words:
        assert word in message, message
    assert len(message) < 1000


@dataclass(frozen=True)
class Lie:
    """What is changed in a whole shard, and what the message must say."""

    id: str
    rule: str
    change: Callable[[ShardParts], Any]
    words: tuple[str, ...]


def move(parts: ShardParts, tensor: str, by: int) -> None:
    offsets = parts.table[tensor]["data_offsets"]
    parts.table[tensor]["data_offsets"] = [offset + by for offset in offsets]


def move_all(parts: ShardParts) -> None:
    for tensor in parts.table:
        move(parts, tensor, 64)


def rename(table: dict[str, Any], old: str, new: str) -> None:
    table[new] = table.pop(old)


def swap_entries(parts: ShardParts) -> None:
    """Two entries, described in another order than they lie."""
    parts.block("layers.0")["entries"].reverse()


def wide_padding(parts: ShardParts) -> None:
    """A page too many at the end of the last block."""
    last = max(parts.table, key=lambda name: parts.table[name]["data_offsets"][1])
    parts.table[last]["data_offsets"][1] += 8192
    parts.table[last]["shape"][0] += 8192
    parts.block("head")["end"] += 8192
    parts.payload += bytes(8192)


def payload_behind_blocks(parts: ShardParts) -> None:
    """A page of padding that belongs to no block."""
    parts.table["endor.padding.x"] = {"dtype": "U8", "shape": [4096], "data_offsets": [8192, 12288]}
    parts.payload += bytes(4096)


def unaligned_section(parts: ShardParts) -> None:
    """The plain vector 32 bytes later, with the padding around it changed to fit."""
    begin = parts.table[NORM]["data_offsets"][0]
    before = next(row for row in parts.table.values() if row["data_offsets"][1] == begin)
    after = next(row for row in parts.table.values() if row["data_offsets"][0] == begin + 20)
    for row, begin_by, end_by in ((before, 0, 32), (parts.table[NORM], 32, 32), (after, 32, 0)):
        row["data_offsets"] = [row["data_offsets"][0] + begin_by, row["data_offsets"][1] + end_by]
    before["shape"][0] += 32
    after["shape"][0] -= 32


def set_table(tensor: str, key: str, value: Any) -> Callable[[ShardParts], Any]:
    return lambda parts: parts.table[tensor].__setitem__(key, value)


def set_entry(entry: str, key: str, value: Any) -> Callable[[ShardParts], Any]:
    return lambda parts: parts.entry(entry).__setitem__(key, value)


def set_block(block: str, key: str, value: Any) -> Callable[[ShardParts], Any]:
    return lambda parts: parts.block(block).__setitem__(key, value)


def set_endor(key: str, value: Any) -> Callable[[ShardParts], Any]:
    return lambda parts: parts.endor.__setitem__(key, value)


BITMAP = "layers.0.w.bitmap"
LIES = [
    # Rules F3, numbers
    Lie("shape-is-bool", "F3", set_table(NORM, "shape", [True]), (NORM, "integer", "True")),
    Lie("shape-is-float", "F3", set_table(NORM, "shape", [5.0]), (NORM, "integer", "5.0")),
    Lie("shape-is-negative", "F3", set_table(NORM, "shape", [-5]), (NORM, "integer", "-5")),
    Lie("shape-is-string", "F3", set_table(NORM, "shape", "5"), (NORM, "list of integers", "'5'")),
    Lie("shape-is-huge", "F3", set_table(NORM, "shape", [2**62 + 1]), (NORM, str(2**62 + 1))),
    Lie("offsets-are-huge", "F3", set_table(NORM, "data_offsets", [10**40, 10**40 + 20]), (NORM, "integer")),
    Lie("nnz-is-bool", "F3", set_entry(W, "nnz", True), (W, "nnz", "True")),
    Lie("nnz-is-float", "F3", set_entry(W, "nnz", 175.0), (W, "nnz", "175.0")),
    Lie("nnz-is-negative", "F3", set_entry(W, "nnz", -1), (W, "nnz", "-1")),
    Lie("block-begin-is-bool", "F3", set_block("layers.0", "begin", False), ("layers.0", "begin", "False")),
    Lie("block-end-is-string", "F3", set_block("layers.0", "end", "4096"), ("layers.0", "end", "'4096'")),
    Lie("entry-shape-is-float", "F3", set_entry(W, "shape", [5, 70.0]), (W, "shape", "70.0")),
    Lie("param-is-string", "F3", set_entry(W, "params", {"group": "64"}), (W, "params['group']", "'64'")),
    Lie("alias-is-number", "F3", set_entry(W, "aliases", [1]), (W, "aliases", "strings")),
    Lie("aliases-are-a-string", "F3", set_entry(W, "aliases", "ab"), (W, "aliases", "'ab'")),
    # Rules F4, the tensor table
    Lie("row-without-shape", "F4", lambda p: p.table[NORM].pop("shape"), (NORM, "'shape' is missing")),
    Lie("row-with-more", "F4", set_table(NORM, "stride", [1]), (NORM, "unknown key 'stride'")),
    Lie("row-is-a-list", "F4", lambda p: p.table.__setitem__(NORM, []), (NORM, "must be an object", "[]")),
    Lie("unknown-dtype", "F4", set_table(NORM, "dtype", "F4"), (NORM, "unknown dtype 'F4'", "BF16")),
    Lie("dtype-is-a-list", "F4", set_table(NORM, "dtype", ["F32"]), (NORM, "unknown dtype ['F32']")),
    Lie("three-offsets", "F4", set_table(NORM, "data_offsets", [0, 20, 20]), (NORM, "two integers")),
    Lie("size-of-another-shape", "F4", set_table(NORM, "shape", [6]), (NORM, "F32 [6] needs 24 bytes")),
    Lie("size-of-another-dtype", "F4", set_table(NORM, "dtype", "F16"), (NORM, "F16 [5] needs 10 bytes")),
    Lie("end-before-begin", "F4", lambda p: p.table[NORM]["data_offsets"].reverse(), (NORM, "20 bytes")),
    Lie("product-overflows", "F4", set_table(NORM, "shape", [2**40, 2**40]), (NORM, "overflows")),
    Lie("zero-hides-overflow", "F4", set_table(NORM, "shape", [2**40, 2**40, 0]), (NORM, "overflows")),
    Lie("too-many-dimensions", "F4", set_table(NORM, "shape", [1] * 17), (NORM, "17 dimensions", "16")),
    # Rules F5, tiling
    Lie("overlap", "F5", lambda p: move(p, NORM, -4), (NORM, "overlaps")),
    Lie("hole", "F5", lambda p: move(p, NORM, 4), (NORM, "hole")),
    Lie("same-bytes-twice", "F5", lambda p: p.table.__setitem__("x", dict(p.table[NORM])), ("overlaps",)),
    Lie("hole-at-the-start", "F5", move_all, (BITMAP, "hole", "64")),
    # Rules F6, size
    Lie("payload-too-short", "F6", lambda p: p.payload.pop(), ("expected a file of", "found")),
    Lie("trailing-bytes", "F6", lambda p: p.payload.append(0), ("expected a file of", "found")),
    # Rules F7, F8, metadata and version
    Lie("metadata-not-a-string", "F7", lambda p: p.metadata.__setitem__("format", 1), ("'format'", "string")),
    Lie(
        "version-2",
        "F8",
        set_endor("format_version", 2),
        ("format_version 2 is unknown", "version 1", "upgrade"),
    ),
    Lie("version-0", "F8", set_endor("format_version", 0), ("format_version 0 is unknown",)),
    Lie("version-is-true", "F8", set_endor("format_version", True), ("format_version True is unknown",)),
    Lie("version-is-float", "F8", set_endor("format_version", 1.0), ("format_version 1.0 is unknown",)),
    Lie("version-is-missing", "F8", lambda p: p.endor.pop("format_version"), ("format_version None",)),
    Lie("unknown-key", "F8", set_endor("extra", 1), ("unknown key 'extra'",)),
    Lie("no-blocks", "F8", lambda p: p.endor.pop("blocks"), ("'blocks' is missing",)),
    Lie("blocks-is-an-object", "F8", set_endor("blocks", {}), ("blocks must be a list",)),
    # Rules F9, blocks
    Lie("block-is-a-number", "F9", lambda p: p.endor["blocks"].insert(0, 1), ("block 0", "object")),
    Lie("block-with-more", "F9", set_block("head", "device", "cpu"), ("block 1", "unknown key 'device'")),
    Lie("block-without-end", "F9", lambda p: p.block("head").pop("end"), ("block 1", "'end' is missing")),
    Lie("block-name-is-number", "F9", set_block("head", "name", 7), ("block 1", "name must be a string")),
    Lie("block-without-name", "F9", set_block("head", "name", ""), ("a block needs a name",)),
    Lie("entries-is-an-object", "F9", set_block("head", "entries", {}), ("block 1", "entries a list")),
    Lie("block-not-aligned", "F9", set_block("head", "end", 8000), ("'head'", "whole pages", "8000")),
    Lie("block-is-empty", "F9", set_block("head", "end", 4096), ("'head'", "at least one")),
    Lie("payload-behind-blocks", "F9", payload_behind_blocks, ("blocks end at 8192", "payload at 12288")),
    Lie(
        "blocks-in-wrong-order",
        "F9",
        lambda p: p.endor["blocks"].reverse(),
        ("'head' starts at 4096", "expected 0"),
    ),
    Lie("blocks-overlap", "F9", set_block("head", "begin", 0), ("'head' starts at 0, expected 4096",)),
    # Rules F10, entries
    Lie(
        "entry-is-a-string",
        "F10",
        lambda p: p.block("head")["entries"].append("x"),
        ("an entry of block 'head'",),
    ),
    Lie("entry-without-nnz", "F10", lambda p: p.entry(W).pop("nnz"), (W, "'nnz' is missing")),
    Lie("entry-with-more", "F10", set_entry(W, "pattern", "2:4"), (W, "unknown key 'pattern'")),
    Lie("entry-name-is-number", "F10", set_entry(W, "name", 1), ("name must be a string", "1")),
    Lie("mask-is-a-list", "F10", set_entry(W, "mask", ["bitmap"]), (W, "strings")),
    Lie("codec-is-null", "F10", set_entry(W, "codec", None), (W, "strings")),
    Lie("params-is-a-list", "F10", set_entry(W, "params", []), (W, "params must be an object")),
    Lie("alias-is-empty", "F10", set_entry(W, "aliases", [""]), ("''", "name of an entry")),
    Lie("alias-is-reserved", "F10", set_entry(W, "aliases", ["endor.padding.x"]), ("endor.padding.x",)),
    Lie("alias-is-metadata", "F10", set_entry(W, "aliases", ["__metadata__"]), ("__metadata__",)),
    # Rules F11, layout
    Lie("unknown-mask", "F11", set_entry(W, "mask", "csr"), (W, "unknown mask 'csr'", "bitmap")),
    Lie("unknown-codec", "F11", set_entry(W, "codec", "zstd"), (W, "unknown codec 'zstd'", "raw", "upgrade")),
    Lie("nnz-above-elements", "F11", set_entry(W, "nnz", 351), (W, "nnz 351", "[5, 70]")),
    Lie("nnz-of-dense-below", "F11", set_entry(NORM, "nnz", 4), (NORM, "nnz 4", "dense")),
    Lie("codec-without-dtype", "F11", set_entry(W, "dtype", "I32"), (W, "raw", "bitmap", "I32")),
    Lie("unknown-param", "F11", set_entry(W, "params", {"group": 64}), (W, "no params", "group")),
    Lie("entry-overflows", "F4", set_entry(W, "shape", [2**40, 2**40]), (W, "overflows")),
    # Rules F12, sections
    Lie("section-missing", "F12", lambda p: rename(p.table, BITMAP, "x"), (W, BITMAP, "missing")),
    Lie(
        "section-claimed-twice",
        "F12",
        lambda p: p.block("head")["entries"].append(p.entry(NORM)),
        (NORM, "two entries"),
    ),
    Lie(
        "shape-mismatch",
        "F12",
        set_entry(NORM, "shape", [5, 1]),
        (NORM, "expected F32 [5, 1], found F32 [5]"),
    ),
    Lie("dtype-mismatch", "F12", set_entry(NORM, "dtype", "I32"), (NORM, "expected I32 [5], found F32 [5]")),
    Lie("nnz-mismatch", "F12", set_entry(W, "nnz", 3), (f"{W}.values", "expected BF16 [3], found BF16")),
    Lie(
        "bitmap-of-another-width",
        "F12",
        set_entry(W, "shape", [5, 60]),
        (BITMAP, "expected U8 [5, 8]", "[5, 16]"),
    ),
    Lie("section-not-aligned", "F12", unaligned_section, (NORM, "section dense", "64 bytes")),
    Lie(
        "section-outside-block",
        "F12",
        lambda p: p.block("layers.0")["entries"].append(p.block("head")["entries"].pop()),
        (HEAD, "outside its block 'layers.0'"),
    ),
    Lie("sections-in-wrong-order", "F12", swap_entries, (W, "before the section")),
    Lie("too-much-padding", "F12", wide_padding, ("padding", "'head'", "4096")),
    # Rules F13, checksums
    Lie(
        "checksum-missing", "F13", lambda p: p.entry(W)["checksums"].pop("bitmap"), (W, "'bitmap' is missing")
    ),
    Lie(
        "checksum-too-many",
        "F13",
        lambda p: p.entry(NORM)["checksums"].update(x="0" * 16),
        (NORM, "unknown key 'x'"),
    ),
    Lie("checksums-is-a-list", "F13", set_entry(W, "checksums", []), (W, "object")),
    Lie(
        "checksum-is-short", "F13", set_entry(NORM, "checksums", {"dense": "0" * 15}), (NORM, "16 lower-case")
    ),
    Lie(
        "checksum-is-upper-case",
        "F13",
        set_entry(NORM, "checksums", {"dense": "A" * 16}),
        (NORM, "16 lower-case"),
    ),
    Lie(
        "checksum-is-a-number",
        "F13",
        set_entry(NORM, "checksums", {"dense": 10**15}),
        (NORM, "16 lower-case"),
    ),
    # Rules F14, names
    Lie("alias-of-itself", "F14", set_entry(W, "aliases", [W]), (W, "used twice")),
    Lie("alias-twice", "F14", set_entry(W, "aliases", ["a", "a"]), ("'a'", "used twice")),
    Lie("alias-is-an-entry", "F14", set_entry(W, "aliases", [NORM]), (NORM, "used twice")),
    Lie("alias-of-two-entries", "F14", set_entry(W, "aliases", ["embed.w"]), ("'embed.w'", "used twice")),
    Lie("alias-is-a-section", "F14", set_entry(NORM, "aliases", [BITMAP]), (BITMAP, "used twice")),
    Lie("two-blocks-of-one-name", "F14", set_block("head", "name", "layers.0"), ("block name 'layers.0'",)),
    # Rules F15, padding
    Lie("tensor-of-no-entry", "F15", lambda p: p.block("layers.0")["entries"].pop(), (NORM, "no entry")),
    Lie(
        "padding-called-otherwise",
        "F15",
        lambda p: rename(p.table, "endor.padding.0", "pad"),
        ("'pad'", "no entry"),
    ),
    Lie(
        "padding-of-another-dtype",
        "F15",
        set_table("endor.padding.0", "dtype", "I8"),
        ("endor.padding.0", "U8", "I8"),
    ),
    Lie(
        "padding-is-a-matrix",
        "F15",
        lambda p: p.table["endor.padding.0"]["shape"].append(1),
        ("endor.padding.0", "1]"),
    ),
]


@pytest.mark.parametrize("lie", [pytest.param(lie, id=f"{lie.rule}-{lie.id}") for lie in LIES])
def test_a_header_with_one_lie_is_refused(lie: Lie, path: Path) -> None:
    parts = ShardParts.read(path)
    lie.change(parts)
    parts.write(path)
    refuse(path, lie.rule, *lie.words)


def test_the_helper_itself_breaks_nothing(path: Path) -> None:
    ShardParts.read(path).write(path)
    header, _ = read_header(path)
    assert list(header.entries) == [W, NORM, HEAD]


def test_an_entry_without_elements_must_be_plain(path: Path) -> None:
    """F11: otherwise a tiny file could ask for one counter per row of [2^50, 0]."""
    parts = ShardParts.read(path)
    entry = dict(parts.entry(W), name="z", shape=[2**50, 0], nnz=0)
    row_offsets = {"dtype": "I32", "shape": [2], "data_offsets": [8192, 8200]}
    parts.table.update({
        "z.bitmap": {"dtype": "U8", "shape": [2**50, 0], "data_offsets": [8192, 8192]},
        "z.row_offsets": row_offsets,
        "z.values": {"dtype": "BF16", "shape": [0], "data_offsets": [8256, 8256]},
        "endor.padding.x": {"dtype": "U8", "shape": [56], "data_offsets": [8200, 8256]},
        "endor.padding.y": {"dtype": "U8", "shape": [4032], "data_offsets": [8256, 12288]},
    })  # fmt: skip
    parts.endor["blocks"].append({"name": "z", "begin": 8192, "end": 12288, "entries": [entry]})
    parts.payload += bytes(4096)
    parts.write(path)
    refuse(path, "F11", "'z'", "no elements")


def test_a_packed_scalar_is_refused(path: Path) -> None:
    parts = ShardParts.read(path)
    parts.entry(W)["shape"] = []
    parts.write(path)
    refuse(path, "F11", W, "scalar")


# Rules F1, prefix and length


@pytest.mark.parametrize("size", range(8))
def test_a_file_that_ends_inside_the_prefix_is_refused(path: Path, whole: bytes, size: int) -> None:
    path.write_bytes(whole[:size])
    refuse(path, "F1", f"{size} bytes", "truncated")


@pytest.mark.parametrize("size", [8, 9, 4095])
def test_a_file_that_ends_inside_the_header_is_refused(path: Path, whole: bytes, size: int) -> None:
    path.write_bytes(whole[:size])
    refuse(path, "F1", f"file has {size}", "truncated")


@pytest.mark.parametrize("missing", [1, 4096, 8192])
def test_a_file_that_ends_inside_the_payload_is_refused(path: Path, whole: bytes, missing: int) -> None:
    path.write_bytes(whole[:-missing])
    refuse(path, "F6", str(len(whole)), str(len(whole) - missing))


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(path: Path, whole: bytes, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + whole[8:])
    refuse(path, "F1", str(length), "100000000")


def test_a_header_longer_than_the_file_is_refused(path: Path, whole: bytes) -> None:
    path.write_bytes((len(whole)).to_bytes(8, "little") + whole[8:])
    refuse(path, "F1", str(len(whole) + 8), str(len(whole)))


def test_header_bytes_that_are_not_what_the_prefix_says_are_refused(whole: bytes) -> None:
    """As when a file is truncated between two reads."""
    with pytest.raises(FormatError, match=r"shard: expected \d+ bytes of header, found 4096.*\[F1\]"):
        parse_header(whole[:4096], file_bytes=len(whole), file="shard")


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_not_a_regular_file_is_refused_without_opening_it(tmp_path: Path, kind: str) -> None:
    """F1; opening a pipe would wait for ever."""
    path = tmp_path / SHARD
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    with pytest.raises(LoadError, match=re.escape(str(path)) + " is not a regular file"):
        read_header(path)


def test_a_missing_file_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="No such file") as caught:
        read_header(tmp_path / SHARD)
    assert caught.value.errno == 2


# Rules F2, placement


def test_a_payload_off_the_page_is_refused(path: Path) -> None:
    parts = ShardParts.read(path)
    header = parts.header().encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + parts.payload)
    refuse(path, "F2", str(8 + len(header)), "4096")


@pytest.mark.parametrize("text", [" {}", "\n{}", "{}\n", "{}\t"], ids=repr)
def test_white_space_other_than_spaces_at_the_end_is_refused(path: Path, text: str) -> None:
    write_raw(path, text.encode())
    refuse(path, "F2", "spaces")


# Rules F3, JSON


@pytest.mark.parametrize(
    ("text", "word"),
    [
        pytest.param(b'{"a": "\xff"}', "UTF-8", id="not-utf-8"),
        pytest.param('\ufeff{"a": 1}'.encode(), "not JSON", id="byte-order-mark"),
        pytest.param('{"a": 1}'.encode("utf-16"), "UTF-8", id="utf-16"),
        pytest.param(b'{"a": 1', "not JSON", id="cut-off"),
        pytest.param(b'{"a": 1} {}', "not JSON", id="two-objects"),
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"[]", "JSON list", id="list"),
        pytest.param(b"null", "JSON NoneType", id="null"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply", id="deep-objects"),
        pytest.param(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}", "nested too deeply", id="deep-lists"),
        pytest.param(b'{"a": NaN}', "NaN", id="nan"),
        pytest.param(b'{"a": -Infinity}', "-Infinity", id="infinity"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "not JSON", id="5000-digits"),
        pytest.param(b'{"\\ud800": 1}', "UTF-8", id="half-a-surrogate-pair"),
        pytest.param(b'{"a": 1, "b": 2, "a": 1}', "duplicate name 'a'", id="duplicate-tensor"),
        pytest.param(
            b'{"a": {"dtype": "U8", "dtype": "I8"}}', "duplicate name 'dtype'", id="duplicate-in-row"
        ),
        pytest.param(
            b'{"__metadata__": {}, "__metadata__": {}}', "duplicate name '__met", id="duplicate-metadata"
        ),
        pytest.param(
            b'{"__metadata__": {"endor": "", "endor": ""}}', "duplicate name 'endor'", id="duplicate-endor"
        ),
        pytest.param(b"\x00" * 64, "not JSON", id="zeros"),
    ],
)
def test_a_header_that_is_not_strict_json_is_refused(path: Path, text: bytes, word: str) -> None:
    write_raw(path, text)
    refuse(path, "F3", "the header", word)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        pytest.param("", "not JSON", id="empty"),
        pytest.param("[]", "JSON list", id="list"),
        pytest.param('{"format_version": 1, "format_version": 1}', "duplicate name 'format", id="duplicate"),
        pytest.param('{"blocks": [{"name": 1, "name": 1}]}', "duplicate name 'name'", id="in-block"),
        pytest.param(
            '{"blocks": [{"entries": [{"nnz": 1, "nnz": 2}]}]}', "duplicate name 'nnz'", id="in-entry"
        ),
        pytest.param(
            '{"blocks": [{"entries": [{"sums": {"a": 1, "a": 1}}]}]}', "duplicate name 'a'", id="in-sums"
        ),
        pytest.param('{"blocks": ' + "[" * 500_000 + "]" * 500_000 + "}", "nested too deeply", id="deep"),
        pytest.param('{"blocks": [NaN]}', "NaN", id="nan"),
        pytest.param('{"\\udfff": 1}', "UTF-8", id="half-a-surrogate-pair"),
    ],
)
def test_a_description_that_is_not_strict_json_is_refused(path: Path, text: str, word: str) -> None:
    parts = ShardParts.read(path)
    parts.write(path, header=json.dumps({"__metadata__": {"endor": text}, **parts.table}))
    refuse(path, "F3", "__metadata__['endor']", word)


def test_a_number_beyond_floats_is_refused(path: Path) -> None:
    """1e400 is valid JSON and becomes infinity in Python."""
    parts = ShardParts.read(path)
    parts.write(path, header=parts.header().replace('"shape": [5]', '"shape": [1e400]'))
    refuse(path, "F3", NORM, "shape", "inf")


def test_a_duplicate_among_very_many_names_is_found_fast(path: Path) -> None:
    names = ",".join(f'"{i}":1' for i in range(200_000))
    write_raw(path, f'{{{names},"199999":1}}'.encode())
    refuse(path, "F3", "duplicate name '199999'")


# Rules F7, the mark of Endor


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        '{"__metadata__": {}}',
        '{"__metadata__": {"format": "pt"}}',
        '{"__metadata__": [1]}',
        '{"__metadata__": "endor"}',
    ],
)
def test_a_safetensors_file_that_is_not_ours_is_refused_with_the_way_out(path: Path, header: str) -> None:
    write_raw(path, header.encode())
    refuse(path, "F7", "not an Endor shard", "convert-model")


def test_a_description_that_is_not_a_string_is_refused(path: Path) -> None:
    write_raw(path, b'{"__metadata__": {"endor": {"format_version": 1}}}')
    refuse(path, "F7", "'endor'", "string")

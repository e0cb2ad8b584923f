"""docs/format.md, the code and the tests speak of the same rules, numbers and bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from endor.formats import CODECS, layout
from endor.formats.dtypes import DTYPES, PACKABLE, dtype_name
from endor.formats.packed import MASKS
from endor.kernels import encode
from tests.support.shards import INDEX, Entries, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "docs" / "format.md").read_text()
RULES = re.findall(r"^\*\*(F\d+)\. ", DOCUMENT, re.MULTILINE)
SOURCES = "".join(path.read_text() for path in (ROOT / "formats").rglob("*.py"))
TESTS = "".join(path.read_text() for path in (ROOT / "tests" / "formats").glob("test_*.py"))


def test_rules_are_numbered_without_a_gap() -> None:
    assert sorted(RULES, key=lambda rule: int(rule[1:])) == [f"F{n}" for n in range(1, 31)]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_enforced_and_tested(rule: str) -> None:
    assert f"[{rule}]" in SOURCES or f'rule="{rule}"' in SOURCES
    assert re.search(rf'"{rule}"|\[{rule}\\?\]|"""{rule}\b', TESTS)


def test_no_message_cites_a_rule_that_does_not_exist() -> None:
    assert set(re.findall(r"\[(F\d+)\]|rule=\"(F\d+)\"", SOURCES)) <= {(rule, "") for rule in RULES} | {
        ("", r) for r in RULES
    }


def test_numbers_of_the_document_are_those_of_the_code() -> None:
    rules = {rule: DOCUMENT.split(f"**{rule}. ")[1].split("\n\n")[0] for rule in RULES}
    assert f"{layout.HEADER_LIMIT_BYTES:,}" in rules["F1"]
    assert f"first {layout.PREFIX_BYTES} bytes" in rules["F1"]
    assert f"multiple of {layout.BLOCK_ALIGNMENT_BYTES} bytes" in rules["F2"]
    assert f"2^{layout.MAX_INTEGER.bit_length() - 1}" in rules["F3"]
    assert f"at most {layout.MAX_RANK} sizes" in rules["F4"]
    assert f"2^{layout.MAX_ELEMENTS.bit_length() - 1}" in rules["F4"]
    assert re.findall(r"`([A-Z]+\d*(?:_E\dM\d)?)`", rules["F4"]) == list(DTYPES)
    assert f"`{layout.METADATA_KEY}`" in rules["F7"]
    assert f"`format_version` MUST be {layout.FORMAT_VERSION}." in rules["F8"]
    assert f"multiples of {layout.BLOCK_ALIGNMENT_BYTES}" in rules["F9"]
    assert f"multiples of {layout.SECTION_ALIGNMENT_BYTES} bytes" in rules["F12"]
    assert f"`{layout.PADDING_PREFIX}`" in rules["F15"]
    assert f"R * columns >= {layout.ROW_BLOCK_ELEMENTS}" in DOCUMENT
    assert f"ceil(columns / {layout.WORD_BITS})" in DOCUMENT


def test_every_mask_codec_and_packable_dtype_is_described() -> None:
    for name in (*MASKS, *CODECS):
        assert re.search(rf"^`{name}`: ", DOCUMENT, re.MULTILINE), name
    raw = DOCUMENT.split("`raw`: ")[1]
    assert all(f"`{dtype_name(dtype)}`" in raw for dtype in PACKABLE)


def example(directory: Path) -> bytes:
    """The file of the document's last section, written now."""
    w = torch.tensor([[1.5, 0, 0, 0, -0.0], [0, 0, -2.0, 0, 0.25]]).bfloat16()
    blocks: dict[str, Entries] = {"layer": {"w": encode(w), "b": torch.tensor([1.0, 2.0])}}
    write_checkpoint(directory, [blocks], header_reserve_bytes=1)
    return (directory / "model-00001-of-00001.safetensors").read_bytes()


def test_the_bytes_of_the_example_are_those_of_the_writer(tmp_path: Path) -> None:
    raw = example(tmp_path)
    rows = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+) ", DOCUMENT, re.MULTILINE)
    assert len(rows) == 5
    for offset, text in rows:
        data = bytes.fromhex(text)
        assert raw[int(offset, 16) :][: len(data)] == data
    assert f"{len(raw):04x}" == re.findall(r"^([0-9a-f]{4}) +end$", DOCUMENT, re.MULTILINE)[0]


def test_the_header_of_the_example_is_that_of_the_writer(tmp_path: Path) -> None:
    raw = example(tmp_path)
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip(b" ").decode()
    assert header in DOCUMENT
    files = json.loads((tmp_path / INDEX).read_text())["metadata"]["endor"]["files"]
    (record,) = files.values()
    assert record["header_checksum"] in DOCUMENT

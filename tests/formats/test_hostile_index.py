"""One directory per rule about index, config and left-overs that breaks this rule alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from endor.errors import ChecksumError, FormatError, LoadError
from endor.formats import (
    CheckpointReader,
    CheckpointWriter,
    header_bytes_bound,
    is_endor_checkpoint,
    verify_checkpoint,
)
from tests.support.shards import CONFIG, INDEX, ShardParts, pruned, repair_index, write_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole checkpoint of two shards."""
    from endor.kernels import encode

    blocks: list[dict[str, Any]] = [{"a": {"a.w": encode(pruned(8, 64))}}, {"b": {"b.w": torch.arange(4.0)}}]
    return write_checkpoint(tmp_path, blocks, aliases={"b.w": ["b.tied"]})


def refuse(directory: Path, file: str, rule: str, *words: str, error: type[Exception] = FormatError) -> None:
    """Reader and verifier refuse the checkpoint; the message starts with the file and ends with the rule."""
    with pytest.raises(error) as caught, CheckpointReader(directory):
        pass
    message = str(caught.value)
    assert message.startswith(str(directory / file)), message
    assert message.endswith(f"[{rule}]"), message
    for word in words:
        assert word in message, message
    assert message in verify_checkpoint(directory)


def edit(path: Path, change: Change) -> None:
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))


def files(index: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = index["metadata"]["endor"]["files"]
    return found


def put(*keys: str, value: Any) -> Change:
    """Set a value deep inside."""

    def change(loaded: dict[str, Any]) -> None:
        for key in keys[:-1]:
            loaded = loaded[key]
        loaded[keys[-1]] = value

    return change


def drop(*keys: str) -> Change:
    def change(loaded: dict[str, Any]) -> None:
        for key in keys[:-1]:
            loaded = loaded[key]
        del loaded[keys[-1]]

    return change


def rename_shard(name: str) -> Change:
    return lambda index: files(index).__setitem__(name, files(index).pop(SECOND))


TRAVERSAL = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "..",
    "",
    "a/../model-00002-of-00002.safetensors",
    "x\0.safetensors",
]
INDEX_LIES = [
    pytest.param(drop("metadata"), "F19", ("metadata and weight_map",), id="no-metadata"),
    pytest.param(drop("weight_map"), "F19", ("metadata and weight_map",), id="no-weight-map"),
    pytest.param(put("weight_map", value=[]), "F19", ("metadata and weight_map",), id="weight-map-is-a-list"),
    pytest.param(drop("metadata", "endor"), "F19", ("metadata.endor", "None"), id="no-endor"),
    pytest.param(put("metadata", "endor", value=[]), "F19", ("metadata.endor", "[]"), id="endor-is-a-list"),
    pytest.param(put("metadata", "endor", "x", value=1), "F19", ("unknown key 'x'",), id="unknown-key"),
    pytest.param(put("metadata", "endor", "format_version", value=2), "F8", ("version 2",), id="version-2"),
    pytest.param(put("metadata", "endor", "format_version", value=True), "F8", ("True",), id="true"),
    pytest.param(drop("metadata", "endor", "format_version"), "F8", ("None",), id="no-version"),
    pytest.param(put("metadata", "endor", "files", value={}), "F19", ("at least one",), id="no-files"),
    pytest.param(
        put("metadata", "endor", "files", value=[FIRST]), "F19", ("at least one",), id="list-of-files"
    ),
    pytest.param(lambda i: files(i).pop(FIRST), "F19", (SECOND, "1 shards"), id="one-shard-left-out"),
    pytest.param(
        lambda i: files(i).update({"model-00003-of-00003.safetensors": {}}),
        "F19",
        ("3 shards",),
        id="one-more",
    ),
    *(pytest.param(rename_shard(n), "F19", (repr(n),), id=f"shard-{n!r}") for n in TRAVERSAL),
    pytest.param(
        put("metadata", "endor", "files", FIRST, value=1), "F19", (FIRST, "object"), id="bad-record"
    ),
    pytest.param(
        drop("metadata", "endor", "files", FIRST, "bytes"), "F19", (FIRST, "'bytes'"), id="no-bytes"
    ),
    pytest.param(
        put("metadata", "endor", "files", FIRST, "bytes", value="1"), "F3", (FIRST, "'1'"), id="text-bytes"
    ),
    pytest.param(
        put("metadata", "endor", "files", FIRST, "header_checksum", value=1),
        "F19",
        (FIRST, "string"),
        id="sum",
    ),
    pytest.param(
        put("weight_map", "a.w.bitmap", value="../x"), "F21", ("a.w.bitmap", "'../x'"), id="map-leaves"
    ),
    pytest.param(put("weight_map", "a.w.bitmap", value=[FIRST]), "F21", ("a.w.bitmap",), id="to-a-list"),
    pytest.param(
        put("weight_map", "a.w.bitmap", value="model.safetensors"), "F21", ("not a shard",), id="elsewhere"
    ),
    pytest.param(drop("metadata", "total_size"), "F3", ("total_size", "None"), id="no-total"),
    pytest.param(put("metadata", "total_size", value=1.5), "F3", ("total_size", "1.5"), id="total-is-float"),
    pytest.param(put("metadata", "total_size", value=1), "F22", ("8192", "found 1"), id="wrong-total"),
]


@pytest.mark.parametrize(("change", "rule", "words"), INDEX_LIES)
def test_an_index_with_one_lie_is_refused(
    directory: Path, change: Change, rule: str, words: tuple[str, ...]
) -> None:
    edit(directory / INDEX, change)
    refuse(directory, INDEX, rule, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(
            put("weight_map", "a.w.bitmap", value=SECOND), ("'a.w.bitmap'",), id="in-the-other-shard"
        ),
        pytest.param(put("weight_map", "ghost", value=FIRST), ("'ghost'", "missing"), id="not-in-the-shard"),
        pytest.param(
            drop("weight_map", "a.w.bitmap"), ("'a.w.bitmap'", "not in the weight_map"), id="left-out"
        ),
        pytest.param(put("weight_map", "endor.padding.0", value=FIRST), ("'endor.padding.0'",), id="padding"),
    ],
)
def test_a_weight_map_that_is_not_the_shards_is_refused(
    directory: Path, change: Change, words: tuple[str, ...]
) -> None:
    edit(directory / INDEX, change)
    refuse(directory, FIRST, "F21", *words)


def test_an_alias_in_the_weight_map_is_refused(directory: Path) -> None:
    edit(directory / INDEX, put("weight_map", "b.tied", value=SECOND))
    refuse(directory, SECOND, "F21", "'b.tied'")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "\xff",
        '{"metadata": {}, "metadata": {}}',
        "[" * 500_000,
        '{"a": NaN}',
        '{"a": ' + "9" * 5000 + "}",
    ],
    ids=["empty", "list", "cut-off", "not-utf-8", "duplicate", "deep", "nan", "huge-number"],
)
def test_an_index_that_is_not_strict_json_is_refused(directory: Path, text: str) -> None:
    (directory / INDEX).write_bytes(text.encode("latin-1"))
    refuse(directory, INDEX, "F3")


def test_a_header_that_is_not_the_one_the_index_means_is_refused(directory: Path) -> None:
    """The header is valid by itself, so only its checksum tells."""
    path = directory / FIRST
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'a.w\\"', b'z.w\\"').replace(b'"a.w.', b'"z.w.'))
    refuse(directory, FIRST, "F20", "expected header checksum", "copy it again", error=ChecksumError)


def test_a_shard_of_another_size_is_refused(directory: Path) -> None:
    edit(directory / INDEX, lambda index: files(index)[FIRST].update(bytes=1))
    refuse(directory, FIRST, "F20", "expected 1 bytes", f"found {(directory / FIRST).stat().st_size}")


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        pytest.param("b.w", "a.w", "'a.w'", id="entry"),
        pytest.param("b.tied", "a.w", "'a.w'", id="alias"),
        pytest.param("b.tied", "a.w.bitmap", "'a.w.bitmap'", id="alias-is-a-section"),
    ],
)
def test_a_name_in_two_shards_is_refused(directory: Path, old: str, new: str, word: str) -> None:
    """F14 across shards; the name of the file it was seen in first is given."""
    parts = ShardParts.read(directory / SECOND)
    if old in parts.table:
        parts.table[new] = parts.table.pop(old)
    text = json.dumps(parts.endor).replace(f'"{old}"', f'"{new}"')
    parts.endor = json.loads(text)
    parts.write(directory / SECOND)
    repair_index(directory)
    edit(
        directory / INDEX, lambda i: i["weight_map"].pop(old, None) and i["weight_map"].update({new: SECOND})
    )
    with pytest.raises(
        FormatError, match=re.escape(f"{word} is used twice in {directory / FIRST}")
    ) as caught:
        CheckpointReader(directory)
    assert str(caught.value).endswith("[F14]")


def test_a_block_name_in_two_shards_is_refused(directory: Path) -> None:
    parts = ShardParts.read(directory / SECOND)
    parts.block("b")["name"] = "a"
    parts.write(directory / SECOND)
    repair_index(directory)
    with pytest.raises(FormatError, match=r"block name 'a' is used twice in .*\[F14\]"):
        CheckpointReader(directory)


def test_the_writer_refuses_a_name_in_two_shards(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, shards=2)
    for number in range(2):
        with (
            writer.shard(number, header_reserve_bytes=header_bytes_bound(["x"])) as shard,
            shard.block(f"{number}"),
        ):
            shard.add("x", torch.zeros(1))
    with pytest.raises(FormatError, match="'x' is used twice"):
        writer.finish()
    assert not (tmp_path / INDEX).exists()


# Missing files: what is not there is a LoadError, which says how to go on.


def test_a_missing_shard_is_named(directory: Path) -> None:
    (directory / SECOND).unlink()
    with pytest.raises(LoadError, match=re.escape(f"{directory / SECOND}: No such file")):
        CheckpointReader(directory)
    assert any(SECOND in error and "No such file" in error for error in verify_checkpoint(directory))


def test_a_missing_index_says_that_the_conversion_did_not_finish(directory: Path) -> None:
    (directory / INDEX).unlink()
    with pytest.raises(LoadError, match=r"did not finish; run it again with --resume"):
        CheckpointReader(directory)
    (error,) = verify_checkpoint(directory)
    assert "--resume" in error


def test_a_missing_config_says_why(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(LoadError, match=r"no config\.json: the conversion .* --resume"):
        CheckpointReader(directory)
    with pytest.raises(LoadError, match=r"no config\.json: not a model directory"):
        CheckpointReader(tmp_path_factory.mktemp("empty"))
    with pytest.raises(LoadError, match="no such model directory"):
        CheckpointReader(directory / "nowhere")
    assert verify_checkpoint(directory / "nowhere") == [f"{directory / 'nowhere'}: no such model directory"]


# config.json


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        pytest.param(
            drop("quantization_config"), "F23", ("not an Endor checkpoint", "convert-model"), id="dense-model"
        ),
        pytest.param(put("quantization_config", value=[]), "F23", ("None",), id="not-an-object"),
        pytest.param(
            put("quantization_config", "quant_method", value="gptq"), "F23", ("'gptq'",), id="other-method"
        ),
        pytest.param(
            put("quantization_config", "format_version", value=9), "F8", ("version 9", "upgrade"), id="newer"
        ),
        pytest.param(put("quantization_config", "format_version", value=True), "F8", ("True",), id="true"),
        pytest.param(drop("quantization_config", "format_version"), "F8", ("None",), id="no-version"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    directory: Path, change: Change, rule: str, words: tuple[str, ...]
) -> None:
    edit(directory / "config.json", change)
    refuse(directory, "config.json", rule, *words)


@pytest.mark.parametrize(
    "text", ["", "[1]", "[" * 500_000, "\xff"], ids=["empty", "list", "deep", "not-utf-8"]
)
def test_a_config_that_is_not_json_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    refuse(directory, "config.json", "F3")
    assert not is_endor_checkpoint(directory)


def test_infinity_in_a_config_is_fine(directory: Path) -> None:
    """transformers writes it, so only our own files must do without."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, "time_step_limit": [0.0, float("inf")]}))
    with CheckpointReader(directory) as checkpoint:
        assert checkpoint.config["time_step_limit"][1] == float("inf")
    assert is_endor_checkpoint(directory)


def test_is_endor_checkpoint_only_looks_and_never_raises(directory: Path) -> None:
    assert is_endor_checkpoint(directory)
    assert not is_endor_checkpoint(directory / "nowhere")
    edit(directory / "config.json", put("quantization_config", value="endor"))
    assert not is_endor_checkpoint(directory)


# What a conversion may leave behind: rule F24.


@pytest.mark.parametrize(
    "name", ["model-00001-of-00003.safetensors", "model-00002-of-00002.safetensors.part"]
)
def test_left_overs_of_a_conversion_are_reported_by_verify_alone(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    with CheckpointReader(directory):
        pass
    (error,) = verify_checkpoint(directory)
    assert error.startswith(str(directory / name))
    assert error.endswith("[F24]")


def test_other_files_are_nobodys_business(directory: Path) -> None:
    for name in ("tokenizer.json", "README.md", "model.safetensors", ".gitattributes"):
        (directory / name).write_bytes(b"x")
    assert verify_checkpoint(directory) == []


def test_verify_checks_shards_even_without_an_index(directory: Path) -> None:
    (directory / INDEX).write_text("{")
    parts = ShardParts.read(directory / SECOND)
    parts.section("b.w")[0] ^= 1
    parts.write(directory / SECOND)
    first, second = verify_checkpoint(directory)
    assert INDEX in first
    assert "entry 'b.w', section dense" in second

"""Random damage: 10,000 mutations of golden files give an EndorError or the same tensors, nothing else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from endor.errors import EndorError, FormatError
from endor.formats import CheckpointReader, PackedTensor, parse_header, verify_checkpoint
from endor.kernels import backends, decode
from tests.support.shards import bits

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "v1"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def flip(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    """Change one to four bytes of [low, high): one bit, or any value, or a digit."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(low, high)
        data[at] = rng.choice(
            (data[at] ^ (1 << rng.randrange(8)), rng.randrange(256), rng.choice(b"0123456789"))
        )


def cut(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    """Remove, insert or repeat a few bytes."""
    at, length = rng.randrange(low, high), rng.randrange(1, 9)
    data[at : at + rng.choice((0, length))] = bytes(data[at : at + rng.choice((0, length, 2 * length))])


def regions(data: bytes) -> list[tuple[int, int]]:
    """Where damage is done: prefix, JSON without the spaces behind it, payload, anywhere."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return [(0, 8), (8, len(data[:begin].rstrip())), (begin, len(data)), (0, len(data))]


def mutations(data: bytes, seed: int, count: int) -> list[bytes]:
    rng = random.Random(seed)
    places = rng.choices(regions(data), weights=(1, 10, 10, 2), k=count)
    mutated = []
    for place in places:
        copy = bytearray(data)
        rng.choices((flip, cut), weights=(9, 1))[0](copy, rng, *place)
        mutated.append(bytes(copy))
    return mutated


def contents(directory: Path) -> dict[str, tuple[object, list[bytes]]]:
    """Layout and bytes of everything that can be read."""
    with CheckpointReader(directory) as checkpoint:
        names = [*checkpoint.names(), *checkpoint.aliases]
        read = {name: checkpoint.read(name) for name in names}
    return {name: (p.layout, [bits(section) for section in p.sections.values()]) for name, p in read.items()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "copy"))


@pytest.mark.parametrize("name", SHARDS)
def test_a_checkpoint_with_a_damaged_shard_gives_an_error_or_the_same_tensors(copy: Path, name: str) -> None:
    whole, data = contents(copy), (GOLDEN / name).read_bytes()
    refused = 0
    for mutated in mutations(data, seed=1, count=700):
        (copy / name).write_bytes(mutated)
        try:
            assert contents(copy) == whole
        except EndorError as error:
            refused += name in str(error)
    assert refused > 400  # damage to padding is harmless, but most damage is not


def test_a_checkpoint_with_a_damaged_index_gives_an_error_or_the_same_tensors(copy: Path) -> None:
    whole, data = contents(copy), (GOLDEN / INDEX).read_bytes()
    rng, refused = random.Random(2), 0
    for _ in range(600):
        mutated = bytearray(data)
        rng.choices((flip, cut), weights=(9, 1))[0](mutated, rng, 0, len(data))
        (copy / INDEX).write_bytes(bytes(mutated))
        try:
            assert contents(copy) == whole
        except EndorError:
            refused += 1
    assert refused > 400


def use(packed: PackedTensor) -> None:
    """Whatever one may do with sections from a file that nobody verified."""
    with suppress(FormatError):
        packed.check()
    for backend in backends():
        with suppress(FormatError):
            decode(packed, backend=backend)


def unpack_unverified(data: bytes) -> None:
    header = parse_header(data[: 8 + int.from_bytes(data[:8], "little")], file_bytes=len(data), file="shard")
    for block in header.blocks:
        begin = header.payload_begin + block.begin
        memory = torch.frombuffer(bytearray(data[begin : begin + block.nbytes]), dtype=torch.uint8)
        for packed in block.unpack(memory).values():
            use(packed)


@pytest.mark.parametrize(
    ("name", "damage", "count"),
    [
        pytest.param(SHARDS[0], flip, 2500, id="flip-0"),
        pytest.param(SHARDS[1], flip, 2500, id="flip-1"),
        pytest.param(SHARDS[0], cut, 1000, id="cut-0"),
        pytest.param(SHARDS[1], cut, 1000, id="cut-1"),
    ],
)
def test_a_header_nobody_vouches_for_gives_a_format_error_or_is_valid(
    name: str, damage: Callable[[bytearray, random.Random, int, int], None], count: int
) -> None:
    """Without the index's checksum the rules alone must hold: a header that passes them can be used."""
    data = (GOLDEN / name).read_bytes()
    low, high = regions(data)[1]
    rng = random.Random(3)
    for _ in range(count):
        mutated = bytearray(data)
        damage(mutated, rng, low, high)
        keep = len(mutated) - len(
            data
        )  # a cut must not move the payload, or only one rule would ever be tested
        end = 8 + int.from_bytes(data[:8], "little")
        mutated[end : end + keep] = b""
        if keep < 0:
            mutated[end + keep : end + keep] = b" " * -keep
        with suppress(FormatError):
            unpack_unverified(bytes(mutated))


@pytest.mark.parametrize("name", SHARDS)
def test_a_payload_nobody_verified_gives_a_format_error_or_some_tensor(name: str) -> None:
    """Kernels get lying bitmaps and offsets: they must neither crash nor leave their memory."""
    data = (GOLDEN / name).read_bytes()
    low, high = regions(data)[2]
    rng = random.Random(4)
    for _ in range(500):
        mutated = bytearray(data)
        flip(mutated, rng, low, high)
        unpack_unverified(bytes(mutated))


def test_verify_notices_every_damaged_byte_and_never_raises(copy: Path) -> None:
    """Unlike a reader, which need not look at padding."""
    rng = random.Random(5)
    for name in SHARDS:
        data = (GOLDEN / name).read_bytes()
        for _ in range(150):
            mutated = bytearray(data)
            at = rng.randrange(len(data))
            mutated[at] ^= 1 << rng.randrange(8)
            (copy / name).write_bytes(bytes(mutated))
            errors = verify_checkpoint(copy)
            assert errors, f"byte {at} of {name}"
            assert any(name in error for error in errors)
        (copy / name).write_bytes(data)
    assert verify_checkpoint(copy) == []

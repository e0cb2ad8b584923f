"""Codec `exponent`: the reference against a second implementation, one value at a time, of docs/format.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given

from endor.formats.codecs.exponent import SLACK_BYTES, Levels
from endor.formats.packed import MASKS, PackedTensor, TensorLayout
from endor.kernels import decode, decode_rows, encode
from endor.kernels.exponent_levels import choose_levels, record_bytes
from endor.kernels.smallest import encode_smallest
from tests.support.bits import as_integers, assert_bitwise_equal
from tests.support.kernels import Case, cases, poisoned, random_bits, special_values

HALVES = (torch.bfloat16, torch.float16)
IDS = ("bf16", "fp16")
EXPONENT_BITS = {torch.bfloat16: 8, torch.float16: 5}

by_dtype = pytest.mark.parametrize("dtype", HALVES, ids=IDS)
by_mask = pytest.mark.parametrize("mask", MASKS)


def pack(weight: torch.Tensor, mask: str = "bitmap") -> PackedTensor:
    packed = encode(weight, values="exponent", mask=mask, backend="reference")
    packed.check()
    return packed


def assert_round_trip(weight: torch.Tensor, mask: str) -> PackedTensor:
    packed = pack(weight, mask)
    output = poisoned(tuple(weight.shape), weight.dtype)
    decode(packed, out=output.tensor, backend="reference")
    assert_bitwise_equal(output.tensor, weight)
    output.assert_guards_intact()
    return packed


def gaussian(
    rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, *, prune: bool = True
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    if prune:
        weight[weight.abs() < weight.abs().median()] = 0
    return weight.to(dtype)


# A second implementation: bits of one value after the other, in plain Python.


def value_bits(weight: torch.Tensor) -> list[int]:
    return [int(word) & 0xFFFF for word in as_integers(weight).flatten()]


def bits_to_bytes(bits: list[int]) -> bytes:
    padded = bits + [0] * (-len(bits) % 8)
    return bytes(
        sum(bit << i for i, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8)
    )


def record(exponents: list[int], levels: Levels) -> bytes:
    counted = Counter(exponents)
    table = sorted(range(256), key=lambda e: (-counted[e], e))[: levels.table_bytes]
    out, names = bytes(table), list(table)
    for width in levels.widths:
        highest = (1 << width) - 1
        named, names = names[:highest], names[highest:]
        codes = [named.index(e) if e in named else highest for e in exponents]
        for plane in range(width):
            out += bits_to_bytes([code >> plane & 1 for code in codes])
        exponents = [e for e, code in zip(exponents, codes, strict=True) if code == highest]
    return out + bytes(exponents)


def sections_by_hand(weight: torch.Tensor, mask: str, levels: Levels) -> dict[str, bytes]:
    layout = TensorLayout(tuple(weight.shape), weight.dtype, "dense", "raw", weight.numel())
    width = EXPONENT_BITS[weight.dtype]
    mantissa = 15 - width
    words, step = value_bits(weight), layout.geometry.row_block * layout.geometry.cols
    blocks = [[w for w in words[at : at + step] if w or mask == "dense"] for at in range(0, len(words), step)]
    records = [record([w >> mantissa & (1 << width) - 1 for w in block], levels) for block in blocks]
    kept = [w for block in blocks for w in block]
    offsets = [sum(map(len, records[:i])) for i in range(len(records) + 1)]
    low = [w >> bit & 1 for w in kept for bit in range(mantissa - 7)]
    sections = {
        "exponent_offsets": b"".join(n.to_bytes(4, "little") for n in offsets),
        "exponents": b"".join(records) + bytes(SLACK_BYTES),
        "sign_mantissa": bytes((w >> 8 & 0x80) | (w >> (mantissa - 7) & 0x7F) for w in kept),
    }
    return sections | ({"mantissa_low": bits_to_bytes(low)} if low or mantissa > 7 else {})


def section_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@by_dtype
@by_mask
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 7), (40, 300), (2, 5000), (3, 6, 200), (4097,)], ids=str)
def test_the_bytes_are_those_of_the_second_implementation(
    shape: tuple[int, ...], density: float, mask: str, dtype: torch.dtype
) -> None:
    weight = random_bits(shape, dtype, density, seed=2)
    weight.view(-1)[::3] = gaussian(1, weight.numel(), dtype, prune=False).view(-1)[::3]
    packed = pack(weight, mask)
    params = packed.layout.params
    expected = sections_by_hand(weight, mask, Levels(params["pairs"], params["singles"]))
    for name, raw in expected.items():
        assert section_bytes(packed.sections[name]) == raw, name


# What must come back.


@given(case=cases())
def test_every_bit_comes_back(case: Case) -> None:
    if case.dtype in HALVES:
        for mask in MASKS:
            assert_round_trip(case.tensor(), mask)


@by_dtype
@by_mask
def test_special_values_come_back(dtype: torch.dtype, mask: str) -> None:
    assert_round_trip(special_values(dtype).repeat(50), mask)


def exponents_only(dtype: torch.dtype, exponents: torch.Tensor) -> torch.Tensor:
    """[64, 256] with the given exponents, one after the other, and any sign and mantissa."""
    mantissa = 15 - EXPONENT_BITS[dtype]
    bits = as_integers(random_bits((64, 256), dtype, 1.0)).to(torch.int32)
    bits &= ~(((1 << EXPONENT_BITS[dtype]) - 1) << mantissa)
    bits |= exponents.repeat(64 * 256 // len(exponents) + 1)[: 64 * 256].view(64, 256) << mantissa
    return bits.to(torch.int16).view(dtype)


EXPONENTS: dict[str, Callable[[int], torch.Tensor]] = {
    "all-equal": lambda _bits: torch.tensor([17], dtype=torch.int32),
    "all-different": lambda bits: torch.arange(1 << bits, dtype=torch.int32),
    "only-subnormal": lambda _bits: torch.tensor([0], dtype=torch.int32),
    "only-inf-and-nan": lambda bits: torch.tensor([(1 << bits) - 1], dtype=torch.int32),
    "two": lambda bits: torch.tensor([(1 << bits) - 1, 0, 0], dtype=torch.int32),
}


@by_dtype
@by_mask
@pytest.mark.parametrize("exponents", list(EXPONENTS.values()), ids=list(EXPONENTS))
def test_adversarial_exponents_come_back(
    exponents: Callable[[int], torch.Tensor], mask: str, dtype: torch.dtype
) -> None:
    assert_round_trip(exponents_only(dtype, exponents(EXPONENT_BITS[dtype])), mask)


def test_negative_zero_is_a_value() -> None:
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    weight[3, 5] = -0.0
    assert assert_round_trip(weight, "bitmap").layout.nnz == 1


@by_dtype
def test_empty_row_blocks_have_nothing_but_their_table(dtype: torch.dtype) -> None:
    weight = gaussian(64, 512, dtype)
    weight[8:40] = 0
    packed = assert_round_trip(weight, "bitmap")
    sizes = packed.sections["exponent_offsets"].diff()
    assert (sizes[1:5] == packed.layout.params["pairs"] * 3 + packed.layout.params["singles"]).all()


@by_dtype
@by_mask
def test_any_run_of_row_blocks_decodes_alone(dtype: torch.dtype, mask: str) -> None:
    weight = gaussian(37, 700, dtype)
    packed = pack(weight, mask)
    g = packed.layout.geometry
    for start in range(g.row_blocks + 1):
        for stop in range(start, g.row_blocks + 1):
            part = weight[start * g.row_block : stop * g.row_block]
            out = torch.full_like(part, 7)
            decode_rows(packed, start, stop, out, backend="reference")
            assert_bitwise_equal(out, part)


@by_mask
def test_working_in_parts_changes_nothing(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(300, 300)
    whole = pack(weight, mask)
    monkeypatch.setattr("endor.kernels.reference_exponent._CHUNK_VALUES", 1000)
    parts = pack(weight, mask)
    assert parts.layout == whole.layout
    for name, section in whole.sections.items():
        assert_bitwise_equal(parts.sections[name], section)


# Sizes.


@by_mask
def test_the_size_that_was_predicted_is_the_size(mask: str) -> None:
    packed = pack(gaussian(64, 1024), mask)
    params = packed.layout.params
    exponents = as_integers(gaussian(64, 1024)).to(torch.int64) >> 7 & 255
    kept = (
        as_integers(gaussian(64, 1024)) != 0 if mask == "bitmap" else torch.ones(64, 1024, dtype=torch.bool)
    )
    rows = packed.layout.geometry.row_block
    histograms = torch.stack(
        [
            torch.bincount(exponents[at : at + rows][kept[at : at + rows]], minlength=256)
            for at in range(0, 64, rows)
        ]
    )
    sizes = record_bytes(histograms, Levels(params["pairs"], params["singles"]))
    assert sizes.tolist() == packed.sections["exponent_offsets"].diff().tolist()
    assert int(sizes.sum()) == params["exponent_bytes"]


def test_levels_come_within_a_64th_of_the_smallest_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shares = torch.rand(256, generator=generator) ** 20
        histograms = torch.bincount(shares.multinomial(20000, True, generator=generator), minlength=256)
        chosen = choose_levels(histograms.unsqueeze(0), 30000)
        sizes = [
            30000 + int(record_bytes(histograms.unsqueeze(0), Levels(p, s)))
            for p in range(3)
            for s in range(9)
            if p + s
        ]
        assert 30000 + int(record_bytes(histograms.unsqueeze(0), chosen)) <= min(sizes) * 65 / 64


def wanda(rows: int, cols: int, sigma: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(rows, cols, generator=generator) * 0.02
    score = weight.abs() * (torch.randn(cols, generator=generator) * sigma).exp()
    weight[score < score.median(1, keepdim=True).values] = 0
    return weight.bfloat16()


@pytest.mark.parametrize(
    ("weight", "mask", "limit"),
    [
        (gaussian(256, 4096), "bitmap", 5.80),
        (wanda(256, 4096, 0.5), "bitmap", 6.00),
        (wanda(256, 4096, 1.0), "bitmap", 6.11),
        (gaussian(256, 4096, torch.float16), "bitmap", 7.30),
        (gaussian(256, 4096, prune=False), "dense", 10.80),
    ],
    ids=["magnitude", "wanda-0.5", "wanda-1.0", "fp16", "unpruned"],
)
def test_bits_per_weight(weight: torch.Tensor, mask: str, limit: float) -> None:
    assert pack(weight, mask).layout.bits_per_weight <= limit


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_auto_is_the_smallest_of_all_lossless_forms(density: float, dtype: torch.dtype) -> None:
    weight = torch.where(torch.rand(64, 300) < density, gaussian(64, 300, prune=False), 0.0).to(dtype)
    every = [encode(weight, values="raw", mask=mask, backend="reference") for mask in MASKS]
    if dtype in HALVES:
        every += [pack(weight, mask) for mask in MASKS]
    chosen = encode_smallest(weight, backend="reference")
    assert chosen.layout.nbytes == min(packed.layout.nbytes for packed in every)
    assert_bitwise_equal(decode(chosen, backend="reference"), weight)

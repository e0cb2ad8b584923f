"""Sections that lie are refused by every backend, by name, and nothing outside the output is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st

from endor.errors import FormatError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, decode_rows, encode
from tests.support.kernels import poisoned, random_bits, replace_section

SHAPE = (45, 700)  # six row blocks of eight rows, the last of five
WEIGHT = random_bits(SHAPE, torch.bfloat16, 0.5)
HUGE = 2**31 - 1


def with_offset(
    block: int, *, value: int | None = None, change: int = 0
) -> Callable[[PackedTensor], PackedTensor]:
    """Row offset number `block` becomes `value`, or changes by `change`."""

    def lie(packed: PackedTensor) -> PackedTensor:
        offsets = packed.sections["row_offsets"].clone()
        offsets[block] = offsets[block] + change if value is None else value
        return replace_section(packed, {"row_offsets": offsets})

    return lie


def with_bit(row: int, bit: int, value: int) -> Callable[[PackedTensor], PackedTensor]:
    """One bit of the bitmap becomes `value`, which it was not."""

    def lie(packed: PackedTensor) -> PackedTensor:
        bitmap = packed.sections["bitmap"].clone()
        mask = 1 << bit % 8
        assert bool(bitmap[row, bit // 8] & mask) != bool(value)
        bitmap[row, bit // 8] ^= mask
        return replace_section(packed, {"bitmap": bitmap})

    return lie


def with_values_missing(packed: PackedTensor) -> PackedTensor:
    """The values section, and nnz with it, is shorter than the bitmap says."""
    nnz = packed.layout.nnz - 1
    return replace_section(packed, {"values": packed.sections["values"][:nnz].clone()}, nnz=nnz)


def with_values_left_over(packed: PackedTensor) -> PackedTensor:
    """The values section, and nnz with it, is longer than the bitmap says."""
    values = torch.nn.functional.pad(packed.sections["values"].float(), (0, 1)).to(torch.bfloat16)
    return replace_section(packed, {"values": values}, nnz=len(values))


SET_BIT = int((WEIGHT[20].view(torch.int16) != 0).int().argmax())
CLEAR_BIT = int((WEIGHT[20].view(torch.int16) == 0).int().argmax())
LIES = {
    "first-offset-not-zero": with_offset(0, change=1),
    "first-offset-negative": with_offset(0, value=-1),
    "last-offset-below-nnz": with_offset(6, change=-1),
    "last-offset-above-nnz": with_offset(6, change=1),
    "offset-negative": with_offset(3, value=-7000),
    "offset-most-negative": with_offset(3, value=-(2**31)),
    "offset-huge": with_offset(3, value=HUGE),
    "offset-too-large": with_offset(3, change=1),
    "offset-too-small": with_offset(3, change=-1),
    "offsets-decrease": with_offset(3, value=1),
    "bit-more": with_bit(20, CLEAR_BIT, 1),
    "bit-less": with_bit(20, SET_BIT, 0),
    "bit-in-padding": with_bit(20, 700, 1),
    "bit-at-the-end-of-padding": with_bit(44, 703, 1),
    "values-missing": with_values_missing,
    "values-left-over": with_values_left_over,
}


@pytest.fixture(params=list(LIES.values()), ids=list(LIES))
def lying(request: pytest.FixtureRequest) -> PackedTensor:
    lie: Callable[[PackedTensor], PackedTensor] = request.param
    return lie(encode(WEIGHT, backend="reference"))


def test_lie_is_refused(backend: str, lying: PackedTensor) -> None:
    out = poisoned(SHAPE, torch.bfloat16)
    with pytest.raises(FormatError, match=r"row block \d|row_offsets|beyond column"):
        decode(lying, out=out.tensor, backend=backend)
    out.assert_guards_intact()


def test_lie_is_refused_by_the_format_too(lying: PackedTensor) -> None:
    with pytest.raises(FormatError):
        lying.check()


def test_rows_that_do_not_lie_can_still_be_decoded(backend: str) -> None:
    packed = with_bit(20, CLEAR_BIT, 1)(encode(WEIGHT, backend="reference"))
    out = torch.empty(16, 700, dtype=torch.bfloat16)
    decode_rows(packed, 0, 2, out, backend=backend)
    with pytest.raises(FormatError, match="row block 2"):
        decode_rows(packed, 1, 3, out, backend=backend)


def test_offset_of_a_tensor_without_rows_must_be_zero(backend: str) -> None:
    packed = encode(torch.empty(0, 64), backend="reference")
    lying = replace_section(packed, {"row_offsets": torch.tensor([5], dtype=torch.int32)})
    with pytest.raises(FormatError):
        decode(lying, backend=backend)


@pytest.mark.parametrize("offset", [-(2**63), -1, 2**40, 2**62, 2**63 - 1])
def test_64_bit_offsets_are_not_trusted_either(
    backend: str, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endor.formats.packed.offsets_dtype", lambda _nnz: torch.int64)
    monkeypatch.setattr("endor.kernels.reference.offsets_dtype", lambda _nnz: torch.int64)
    packed = encode(WEIGHT, backend="reference")
    decode(packed, backend=backend)
    with pytest.raises(FormatError):
        decode(with_offset(3, value=offset)(packed), backend=backend)


@given(data=st.data())
def test_flipped_bytes_are_refused_or_harmless(backend: str, data: st.DataObject) -> None:
    packed = encode(WEIGHT, backend="reference")
    changed = {name: section.clone() for name, section in packed.sections.items()}
    for _ in range(data.draw(st.integers(1, 4))):
        section = changed[data.draw(st.sampled_from(("bitmap", "row_offsets")))]
        flat = section.view(torch.uint8).view(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    lying = PackedTensor(packed.layout, changed)
    out = poisoned(SHAPE, torch.bfloat16)
    try:
        lying.check()
    except FormatError:
        with pytest.raises(FormatError):
            decode(lying, out=out.tensor, backend=backend)
    else:
        decode(lying, out=out.tensor, backend=backend)
    out.assert_guards_intact()

"""Codec `exponent` on every backend: the reference's sections, every bit back, no trust in files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from endor.errors import FormatError
from endor.formats.codecs.exponent import Levels
from endor.formats.packed import PackedTensor
from endor.kernels import decode, decode_rows, encode
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import poisoned, random_bits, replace_section, special_values

DTYPES = (torch.bfloat16, torch.float16)
SHAPES = {
    "one": (1,),
    "no-elements": (0,),
    "no-rows": (0, 64),
    "no-cols": (7, 0),
    "one-col": (300, 1),
    "word": (3, 64),
    "ragged": (33, 1025),
    "aligned": (64, 512),
    "row-of-many-tiles": (2, 9000),
    "row-beyond-the-stack": (1, 70_000),
    "experts": (3, 6, 200),
}


@pytest.fixture(params=DTYPES, ids=["bf16", "f16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture(params=["bitmap", "dense"])
def mask(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def weights(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Normally distributed, as real weights are: few exponents are common."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * 0.02 * keep).to(dtype)


def with_exponents(exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Random signs and mantissas under the given exponents."""
    mantissa = 7 if dtype == torch.bfloat16 else 10
    rest = random_bits(tuple(exponents.shape), torch.bfloat16, 1.0).view(torch.int16).to(torch.int32)
    keep = 0x8000 | ((1 << mantissa) - 1)
    return (rest & keep | exponents << mantissa).to(torch.int16).view(dtype)


def assert_comes_back(weight: torch.Tensor, mask: str, backend: str) -> None:
    packed = encode(weight, values="exponent", mask=mask, backend=backend)
    out = poisoned(tuple(weight.shape), weight.dtype)
    decode(packed, out=out.tensor, backend=backend)
    assert_bitwise_equal(out.tensor, weight)
    out.assert_guards_intact()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_sections_and_bits_are_those_of_the_reference(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, mask: str, density: float
) -> None:
    weight = weights(shape, dtype, density)
    expected = encode(weight, values="exponent", mask=mask, backend="reference")
    actual = encode(weight, values="exponent", mask=mask, backend=backend)
    assert actual.layout == expected.layout
    assert dict(actual.layout.params) == dict(expected.layout.params)
    for name, section in expected.sections.items():
        assert_bitwise_equal(actual.sections[name], section)
    actual.check()
    assert_comes_back(weight, mask, backend)


@given(data=st.data())
def test_any_tensor_comes_back(backend: str, data: st.DataObject) -> None:
    cols = data.draw(st.one_of(st.integers(0, 9), st.sampled_from((63, 64, 65, 127, 129, 1000, 2049))))
    shape = (data.draw(st.integers(0, 20)), cols)
    density, seed = (
        data.draw(st.sampled_from((0.0, 0.02, 0.5, 0.97, 1.0))),
        data.draw(st.integers(0, 2**32 - 1)),
    )
    make = data.draw(st.sampled_from((weights, random_bits)))
    weight = make(shape, data.draw(st.sampled_from(DTYPES)), density, seed)
    assert_comes_back(weight, data.draw(st.sampled_from(("bitmap", "dense"))), backend)


LEVELS = [Levels(pairs, singles) for pairs in range(3) for singles in (0, 1, 2, 3, 4, 8) if pairs + singles]


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: f"{levels.pairs}+{levels.singles}")
def test_every_number_of_levels(
    backend: str, levels: Levels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("native_exponent", "reference_exponent"):
        monkeypatch.setattr(f"endor.kernels.{module}.choose_levels", lambda *_: levels)
    weight = torch.cat([weights((20, 700), dtype), random_bits((20, 700), dtype, 0.5)])
    expected = encode(weight, values="exponent", backend="reference")
    actual = encode(weight, values="exponent", backend=backend)
    assert_bitwise_equal(actual.sections["exponents"], expected.sections["exponents"])
    assert_bitwise_equal(decode(expected, backend=backend), weight)


@pytest.mark.parametrize("kind", ["equal", "different", "subnormal", "infinite", "two"])
def test_adversarial_exponents(backend: str, dtype: torch.dtype, mask: str, kind: str) -> None:
    highest = 255 if dtype == torch.bfloat16 else 31
    index = torch.arange(30 * 333, dtype=torch.int32).view(30, 333)
    exponents = {
        "equal": torch.full_like(index, highest // 2),
        "different": index % (highest + 1),
        "subnormal": torch.zeros_like(index),
        "infinite": torch.full_like(index, highest),
        "two": index % 2 * highest,
    }[kind]
    assert_comes_back(with_exponents(exponents, dtype), mask, backend)


def test_every_special_value_survives_in_every_lane(backend: str, dtype: torch.dtype, mask: str) -> None:
    special = special_values(dtype)
    assert_comes_back(torch.stack([special.roll(i).repeat(13) for i in range(len(special))]), mask, backend)


@pytest.mark.parametrize("streaming_bytes", [0, 1 << 60], ids=["streaming", "cached"])
@pytest.mark.parametrize("shift_bytes", [0, 2])
def test_stores_and_alignment_do_not_matter(  # noqa: PLR0917 - fixtures
    backend: str,
    dtype: torch.dtype,
    mask: str,
    streaming_bytes: int,
    shift_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("endor.kernels.native_backend.STREAMING_BYTES", streaming_bytes)
    for shape in ((64, 512), (50, 333), (3, 5000)):
        weight = weights(shape, dtype)
        packed = encode(weight, values="exponent", mask=mask, backend=backend)
        out = poisoned(shape, dtype, shift_bytes=shift_bytes)
        decode(packed, out=out.tensor, backend=backend)
        assert_bitwise_equal(out.tensor, weight)
        out.assert_guards_intact()


def test_every_run_of_blocks(backend: str, dtype: torch.dtype, mask: str) -> None:
    weight = weights((45, 700), dtype)
    packed = encode(weight, values="exponent", mask=mask, backend=backend)
    for start in range(7):
        for stop in range(start, 7):
            expected = weight[start * 8 : stop * 8]
            out = poisoned(tuple(expected.shape), dtype)
            decode_rows(packed, start, stop, out.tensor, backend=backend)
            assert_bitwise_equal(out.tensor, expected)
            out.assert_guards_intact()


class TestHostileSections:
    """What the reference refuses every backend refuses; everything else decodes to the same bits."""

    @given(data=st.data())
    def test_changed_bytes(self, backend: str, data: st.DataObject) -> None:
        dtype, mask = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(("bitmap", "dense")))
        packed = encode(weights((20, 700), dtype), values="exponent", mask=mask, backend="reference")
        changed = {name: section.clone() for name, section in packed.sections.items()}
        for _ in range(data.draw(st.integers(1, 3))):
            flat = changed[data.draw(st.sampled_from(sorted(changed)))].view(torch.uint8).view(-1)
            flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
        self.assert_as_the_reference(PackedTensor(packed.layout, changed), backend)

    @pytest.mark.parametrize("block", [0, 1, 3])
    @pytest.mark.parametrize("value", [-(2**31), -1, 0, 1, 500, 2**31 - 1])
    def test_offsets(self, backend: str, mask: str, block: int, value: int) -> None:
        packed = encode(weights((20, 700), torch.bfloat16), values="exponent", mask=mask)
        offsets = packed.sections["exponent_offsets"].clone()
        offsets[block] = value
        self.assert_as_the_reference(replace_section(packed, {"exponent_offsets": offsets}), backend)

    def test_of_a_tensor_without_rows(self, backend: str) -> None:
        packed = encode(torch.empty(0, 64, dtype=torch.bfloat16), values="exponent", mask="dense")
        offsets = torch.tensor([5], dtype=torch.int32)
        with pytest.raises(FormatError):
            decode(replace_section(packed, {"exponent_offsets": offsets}), backend=backend)

    def test_names_the_row_block(self, backend: str) -> None:
        packed = encode(weights((20, 700), torch.bfloat16), values="exponent")
        offsets = packed.sections["exponent_offsets"].clone()
        offsets[2] += 1
        with pytest.raises(FormatError, match=r"row block [12]"):
            decode(replace_section(packed, {"exponent_offsets": offsets}), backend=backend)

    @staticmethod
    def assert_as_the_reference(packed: PackedTensor, backend: str) -> None:
        out = poisoned(packed.layout.shape, packed.layout.dtype)
        try:
            expected = decode(packed, backend="reference")
        except FormatError:
            with pytest.raises(FormatError):
                decode(packed, out=out.tensor, backend=backend)
        else:
            decode(packed, out=out.tensor, backend=backend)
            assert_bitwise_equal(out.tensor, expected)
        out.assert_guards_intact()

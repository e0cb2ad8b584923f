"""Codecs `int8` and `int4` on every backend: the bits of the reference, rounding and overflow included."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, strategies as st

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, decode_rows, encode
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import poisoned, replace_section

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1,), (0, 64), (7, 0), (40, 1), (3, 64), (33, 1025), (16, 512), (45, 700), (3, 6, 200))


@pytest.fixture(params=DTYPES, ids=["bf16", "f16", "f32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture(params=["int8", "int4"])
def codec(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(params=["bitmap", "dense"])
def mask(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def weights(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * 0.02 * keep).to(dtype)


@cache
def encoded(
    shape: tuple[int, ...], dtype: torch.dtype, codec: str, mask: str = "bitmap", density: float = 0.5
) -> PackedTensor:
    """What the reference made of it: encoding takes far longer than decoding."""
    return encode(weights(shape, dtype, density), values=codec, mask=mask, backend="reference")


def assert_as_the_reference(packed: PackedTensor, backend: str, *, shift_bytes: int = 0) -> None:
    out = poisoned(packed.layout.shape, packed.layout.dtype, shift_bytes=shift_bytes)
    try:
        expected = decode(packed, backend="reference")
    except FormatError:
        with pytest.raises(FormatError):
            decode(packed, out=out.tensor, backend=backend)
    else:
        decode(packed, out=out.tensor, backend=backend)
        assert_bitwise_equal(out.tensor, expected)
    out.assert_guards_intact()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_bits_are_those_of_the_reference(  # noqa: PLR0917 - fixtures
    backend: str, codec: str, mask: str, dtype: torch.dtype, shape: tuple[int, ...], density: float
) -> None:
    packed = encoded(shape, dtype, codec, mask, density)
    assert_as_the_reference(packed, backend)


def test_sections_are_those_of_the_reference(backend: str, codec: str, mask: str, dtype: torch.dtype) -> None:
    actual = encode(weights((33, 1025), dtype), values=codec, mask=mask, backend=backend)
    expected = encoded((33, 1025), dtype, codec, mask)
    assert actual.layout == expected.layout
    for name, section in expected.sections.items():
        assert_bitwise_equal(actual.sections[name], section)


@pytest.mark.parametrize("exponent", [1, 90, 100, 105, 112, 127, 135, 140, 240])
def test_products_are_rounded_as_the_reference_rounds_them(
    backend: str, codec: str, mask: str, dtype: torch.dtype, exponent: int
) -> None:
    packed = encoded((40, 700), dtype, codec, mask)
    generator = torch.Generator().manual_seed(exponent)
    # All integers, and scales of any mantissa: in float16 from below the smallest subnormal to infinity.
    scales = torch.randint(0, 128, packed.sections["scales"].shape, dtype=torch.int16, generator=generator)
    codes = packed.sections["codes"]
    random = torch.randint(-127, 128, codes.shape, generator=generator)
    changes = {"scales": (scales | exponent << 7).view(torch.bfloat16), "codes": random.to(codes.dtype)}
    assert_as_the_reference(replace_section(packed, changes), backend)


@pytest.mark.parametrize("streaming_bytes", [0, 1 << 60], ids=["streaming", "cached"])
@pytest.mark.parametrize("shift", [0, 1])
def test_stores_and_alignment_do_not_matter(  # noqa: PLR0917 - fixtures
    backend: str,
    codec: str,
    dtype: torch.dtype,
    streaming_bytes: int,
    shift: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("endor.kernels.native_backend.STREAMING_BYTES", streaming_bytes)
    packed = encoded((32, 512), dtype, codec)
    assert_as_the_reference(packed, backend, shift_bytes=shift * dtype.itemsize)


def test_every_run_of_blocks(backend: str, codec: str, mask: str, dtype: torch.dtype) -> None:
    packed = encoded((45, 700), dtype, codec, mask)
    whole = decode(packed, backend="reference")
    for start, stop in ((0, 0), (0, 1), (2, 5), (5, 6), (1, 6)):
        expected = whole[start * 8 : stop * 8]
        out = poisoned(tuple(expected.shape), dtype)
        decode_rows(packed, start, stop, out.tensor, backend=backend)
        assert_bitwise_equal(out.tensor, expected)
        out.assert_guards_intact()


@given(data=st.data())
def test_changed_bytes_are_refused_or_decoded_as_the_reference_does(
    backend: str, data: st.DataObject
) -> None:
    codec = data.draw(st.sampled_from(("int8", "int4")))
    dtype = data.draw(st.sampled_from(DTYPES))
    packed = encoded((20, 700), dtype, codec)
    changed = {name: section.clone() for name, section in packed.sections.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        # Scales that are no numbers are the format's business.
        flat = (
            changed[data.draw(st.sampled_from(sorted(set(changed) - {"scales"})))].view(torch.uint8).view(-1)
        )
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    assert_as_the_reference(PackedTensor(packed.layout, changed), backend)


BAD_SCALES = {
    "nan": 0x7FC0,
    "signalling-nan": 0x7F81,
    "infinity": 0x7F80,
    "subnormal": 0x0001,
    "largest-subnormal": 0x007F,
    "minus-zero": -0x8000,
    "negative": -0x4080,
    "negative-nan": -1,
}


@pytest.mark.parametrize("bits", BAD_SCALES.values(), ids=BAD_SCALES)
def test_a_scale_that_is_no_positive_number_is_refused_by_its_row_block(
    backend: str, codec: str, mask: str, dtype: torch.dtype, bits: int
) -> None:
    packed = encoded((33, 1025), dtype, codec, mask)
    scales = packed.sections["scales"].clone()
    scales.view(torch.int16)[17, 8] = bits
    lying = replace_section(packed, {"scales": scales})
    out = poisoned((33, 1025), dtype)
    row_block = packed.layout.geometry.row_block
    with pytest.raises(FormatError, match=f"row block {17 // row_block}: .*positive normal number"):
        decode(lying, out=out.tensor, backend=backend)
    out.assert_guards_intact()
    before = torch.empty(2 * row_block, 1025, dtype=dtype)
    decode_rows(lying, 0, 2, before, backend=backend)  # others can still be decoded
    assert before.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_sections_of_any_shape_are_those_of_the_reference(  # noqa: PLR0917 - fixtures
    backend: str, codec: str, mask: str, dtype: torch.dtype, shape: tuple[int, ...], density: float
) -> None:
    actual = encode(weights(shape, dtype, density), values=codec, mask=mask, backend=backend)
    expected = encoded(shape, dtype, codec, mask, density)
    assert actual.layout == expected.layout
    assert set(actual.sections) == set(expected.sections)
    for name, section in expected.sections.items():
        assert_bitwise_equal(actual.sections[name], section)


def test_extreme_magnitudes_are_encoded_as_the_reference_does(
    backend: str, codec: str, mask: str, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 300, generator=generator).to(dtype)
    for row, size in enumerate((info.max / 8, info.tiny, info.smallest_normal / 64, 1e-30, 1e30, -0.0)):
        weight[row] = (weight[row].double() * size).clamp(info.min, info.max).to(dtype)
    weight[8, ::3] = -0.0
    weight[9, 5] = info.max
    actual = encode(weight, values=codec, mask=mask, backend=backend)
    expected = encode(weight, values=codec, mask=mask, backend="reference")
    for name, section in expected.sections.items():
        assert_bitwise_equal(actual.sections[name], section)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_nan_and_infinity_are_refused_by_every_backend(
    backend: str, codec: str, dtype: torch.dtype, value: float, threads: int
) -> None:
    weight = weights((45, 700), dtype)
    weight[44, 699] = value
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(KernelError, match="cannot hold NaN or infinity"):
            encode(weight, values=codec, backend=backend)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_that_share_a_byte_of_codes_write_the_same(
    backend: str, dtype: torch.dtype, threads: int
) -> None:
    weight = weights((999, 701), dtype)  # several chunks, which begin in the middle of a byte
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = encode(weight, values="int4", backend=backend)
    finally:
        torch.set_num_threads(before)
    expected = encoded((999, 701), dtype, "int4")
    assert_bitwise_equal(actual.sections["codes"], expected.sections["codes"])

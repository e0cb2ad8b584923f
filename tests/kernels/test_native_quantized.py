"""Codecs `int8` and `int4` on every backend: the bits of the reference, rounding and overflow included."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, strategies as st

from endor.errors import FormatError
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

"""Sections of codecs `int8` and `int4` that cannot be are refused by name."""

from __future__ import annotations

import pytest
import torch

from endor.errors import FormatError
from endor.formats import PackedTensor, TensorLayout
from endor.kernels import encode
from tests.support.kernels import replace_section


def packed(codec: str) -> PackedTensor:
    """[5, 300] with an odd number of values and three groups per row."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 300, generator=generator).bfloat16()
    weight[weight.abs() < 0.5] = 0
    if int((weight != 0).sum()) % 2 == 0:
        weight.view(-1)[int(weight.view(-1).nonzero()[0])] = 0
    return encode(weight, values=codec, backend="reference")


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan"), 1e-40, -0.0])
def test_scales_are_zero_or_normal(codec: str, scale: float) -> None:
    honest = packed(codec)
    honest.check()
    scales = honest.sections["scales"].clone()
    scales[3, 1] = scale
    with pytest.raises(FormatError, match=r"group 1 of row 3 has scale .*\[F30\]"):
        replace_section(honest, {"scales": scales}).check()


def test_the_last_half_byte_is_zero() -> None:
    honest = packed("int4")
    assert honest.layout.nnz % 2
    codes = honest.sections["codes"].clone()
    codes[-1] |= 0x10
    with pytest.raises(FormatError, match=r"codes: the bits behind the last value are not zero \[F30\]"):
        replace_section(honest, {"codes": codes}).check()


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("columns", [None, 0, 32, 100, (1 << 20) + 64])
def test_params_that_cannot_be_are_refused(codec: str, columns: int | None) -> None:
    params = {} if columns is None else {"group_columns": columns}
    with pytest.raises(FormatError, match=r"\[F29\]"):
        TensorLayout((5, 300), torch.bfloat16, "bitmap", codec, 7, params)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_fp8_is_refused(codec: str) -> None:
    with pytest.raises(FormatError, match="cannot hold F8_E4M3"):
        TensorLayout((5, 300), torch.float8_e4m3fn, "dense", codec, 1500, {"group_columns": 128})

"""Decoding while torch traces (torch.compile, fake tensors) goes through the operator, with the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode
from endor.kernels.ops import bitmap_decode_raw
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import random_bits


def packed_and_dense(shape: tuple[int, ...] = (64, 130)) -> tuple[PackedTensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) < 0.5
    dense = (torch.randn(shape, generator=generator) * keep).to(torch.bfloat16)
    return encode(dense), dense


def arguments(packed: PackedTensor) -> tuple[torch.Tensor, ...]:
    return tuple(packed.sections[name] for name in ("bitmap", "row_offsets", "values"))


@pytest.mark.parametrize("shape", [(64, 130), (3, 4, 100), (0, 64)], ids=str)
def test_opcheck_passes(shape: tuple[int, ...]) -> None:
    packed, dense = packed_and_dense(shape)
    torch.library.opcheck(bitmap_decode_raw, (*arguments(packed), torch.empty_like(dense)))


def test_operator_decodes() -> None:
    weight = random_bits((3, 40, 100), torch.float32, 0.5)
    out = torch.empty_like(weight)
    bitmap_decode_raw(*arguments(encode(weight)), out)
    assert_bitwise_equal(out, weight)


def test_operator_refuses_sections_of_another_tensor() -> None:
    packed, _ = packed_and_dense()
    with pytest.raises(FormatError, match="section bitmap: expected"):
        bitmap_decode_raw(*arguments(packed), torch.empty(64, 200, dtype=torch.bfloat16))


def test_operator_refuses_a_strided_output() -> None:
    packed, _ = packed_and_dense((64, 64))
    with pytest.raises(KernelError, match="out must be contiguous"):
        bitmap_decode_raw(*arguments(packed), torch.empty(64, 64, dtype=torch.bfloat16).t())


def test_compiled_code_decodes_without_a_graph_break() -> None:
    packed, dense = packed_and_dense()
    x = random_bits((2, 130), torch.bfloat16, 0.0) + 1

    def linear(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, decode(packed))

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x), F.linear(x, dense))


def test_fake_tensors_have_the_shape_and_dtype_of_the_result() -> None:
    packed, dense = packed_and_dense()
    with FakeTensorMode() as mode:
        fake = PackedTensor(packed.layout, {k: mode.from_tensor(t) for k, t in packed.sections.items()})
        result = decode(fake)
    assert (result.shape, result.dtype) == (dense.shape, dense.dtype)

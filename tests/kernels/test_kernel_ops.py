"""Decoding while torch traces (torch.compile, fake tensors) goes through the operator, with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from endor.errors import FormatError, KernelError
from endor.formats.codecs import CODECS
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode
from endor.kernels.ops import decode_op
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import random_bits

FORMS = [
    ("bitmap", "raw"),
    *((mask, codec) for codec in CODECS if codec != "raw" for mask in ("bitmap", "dense")),
]
each_form = pytest.mark.parametrize(("mask", "codec"), FORMS, ids=[f"{m}-{c}" for m, c in FORMS])


def packed_and_dense(
    shape: tuple[int, ...] = (64, 130), *, mask: str = "bitmap", codec: str = "raw"
) -> tuple[PackedTensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) < 0.5
    weight = (torch.randn(shape, generator=generator) * keep).to(torch.bfloat16)
    packed = encode(weight, values=codec, mask=mask)
    return packed, decode(packed)


def sections_of(packed: PackedTensor) -> list[torch.Tensor]:
    return [packed.sections[spec.name] for spec in packed.layout.sections]


def description_of(packed: PackedTensor) -> dict[str, Any]:
    layout = packed.layout
    names, values = list(layout.params), list(layout.params.values())
    return {
        "mask": layout.mask,
        "codec": layout.codec,
        "nnz": layout.nnz,
        "param_names": names,
        "param_values": values,
    }


def call_op(packed: PackedTensor, out: torch.Tensor) -> None:
    decode_op(sections_of(packed), out, **description_of(packed))


@each_form
def test_opcheck_passes(mask: str, codec: str) -> None:
    packed, dense = packed_and_dense(mask=mask, codec=codec)
    torch.library.opcheck(decode_op, (sections_of(packed), torch.empty_like(dense)), description_of(packed))


@pytest.mark.parametrize("shape", [(3, 4, 100), (0, 64)], ids=str)
def test_opcheck_passes_for_other_shapes(shape: tuple[int, ...]) -> None:
    packed, dense = packed_and_dense(shape)
    torch.library.opcheck(decode_op, (sections_of(packed), torch.empty_like(dense)), description_of(packed))


def test_operator_decodes() -> None:
    weight = random_bits((3, 40, 100), torch.float32, 0.5)
    out = torch.empty_like(weight)
    call_op(encode(weight), out)
    assert_bitwise_equal(out, weight)


def test_operator_refuses_sections_of_another_tensor() -> None:
    packed, _ = packed_and_dense()
    with pytest.raises(FormatError, match="section bitmap: expected"):
        call_op(packed, torch.empty(64, 200, dtype=torch.bfloat16))


def test_operator_refuses_a_strided_output() -> None:
    packed, _ = packed_and_dense((64, 64))
    with pytest.raises(KernelError, match="out must be contiguous"):
        call_op(packed, torch.empty(64, 64, dtype=torch.bfloat16).t())


@each_form
def test_compiled_code_decodes_without_a_graph_break(mask: str, codec: str) -> None:
    packed, dense = packed_and_dense(mask=mask, codec=codec)
    x = torch.linspace(-1, 1, 260).view(2, 130).to(torch.bfloat16)

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

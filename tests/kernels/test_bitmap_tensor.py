"""A BitmapTensor stands in for the dense tensor in every operation, and never lets anyone write to it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import endor
from endor.errors import KernelError
from endor.kernels.tensor import BitmapTensor
from tests.support.bits import assert_bitwise_equal


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16, density: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=generator).to(dtype)
    return torch.where(torch.rand(shape, generator=generator) < density, dense, torch.zeros((), dtype=dtype))


def test_encode_chooses_the_smallest_lossless_form_by_default() -> None:
    half, full = weight(64, 512), weight(64, 512, density=1.0)
    packed, dense = endor.encode(half), endor.encode(full)
    assert packed.mask == "bitmap"
    assert packed.nbytes < half.nbytes
    assert dense.nbytes <= full.nbytes
    assert_bitwise_equal(endor.decode(packed), half)
    assert_bitwise_equal(endor.decode(dense), full)


def test_properties_describe_the_packed_form() -> None:
    dense = weight(32, 256)
    packed = endor.encode(dense, values="raw", mask="bitmap")
    assert (packed.shape, packed.dtype, packed.device) == (dense.shape, dense.dtype, dense.device)
    assert (packed.mask, packed.codec, packed.nnz) == ("bitmap", "raw", int((dense != 0).sum()))
    assert packed.bits_per_weight == pytest.approx(8 * packed.nbytes / dense.numel())
    assert "bits_per_weight" in repr(packed)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 70), (0, 5), (5, 0), (1, 1, 1, 1)], ids=str)
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    for values, mask in (("auto", "auto"), ("raw", "bitmap"), ("raw", "dense")):
        dense = weight(*shape, dtype=torch.float32)
        assert_bitwise_equal(endor.decode(endor.encode(dense, values=values, mask=mask)), dense)


def test_other_dtypes_are_stored_as_they_are_or_refused() -> None:
    ids = torch.arange(6)
    assert torch.equal(endor.decode(endor.encode(ids)), ids)
    with pytest.raises(KernelError, match="int64"):
        endor.encode(ids, mask="bitmap")
    with pytest.raises(KernelError, match="fax"):
        endor.encode(weight(3, 3), values="fax")


def test_decode_writes_to_out() -> None:
    dense = weight(16, 64)
    out = torch.full_like(dense, float("nan"))
    assert endor.decode(endor.encode(dense), out=out) is out
    assert_bitwise_equal(out, dense)


def test_linear_equals_the_dense_linear_bit_for_bit() -> None:
    dense, x, bias = weight(24, 64), weight(5, 64), weight(24)
    packed = endor.encode(dense, values="raw", mask="dense")
    assert torch.equal(F.linear(x, packed, bias), F.linear(x, dense, bias))
    assert torch.equal(F.linear(input=x, weight=packed, bias=bias), F.linear(x, dense, bias))


def test_every_other_operation_sees_the_dense_tensor() -> None:
    dense, x = weight(24, 64), weight(5, 64)
    packed = endor.encode(dense)
    assert torch.equal(packed + 1, dense + 1)
    assert torch.equal(x @ packed.t(), x @ dense.t())
    assert torch.equal(packed[3], dense[3])
    assert torch.equal(torch.einsum("bi,oi->bo", x, packed), torch.einsum("bi,oi->bo", x, dense))
    assert torch.equal(F.embedding(torch.tensor([1, 5]), packed), dense[[1, 5]])
    assert torch.equal(torch.cat([packed, dense]), torch.cat([dense, dense]))
    assert type(packed + 1) is torch.Tensor


def test_another_dtype_is_shown_and_decoded_to() -> None:
    dense = weight(24, 64)
    wide = endor.encode(dense).to(torch.float32)
    assert isinstance(wide, BitmapTensor)
    assert wide.dtype == torch.float32
    assert torch.equal(wide + 0, dense.float())


def test_views_made_in_inference_mode_equal_the_dense_ones() -> None:
    dense = torch.randn(6, 8).to(torch.bfloat16)
    packed = endor.encode(dense)
    with torch.inference_mode():
        assert_bitwise_equal(packed.t().contiguous(), dense.t().contiguous())
        assert_bitwise_equal(packed.detach()[2:4], dense[2:4])


def test_writing_is_refused() -> None:
    packed = endor.encode(weight(4, 64))
    with pytest.raises(KernelError, match="read-only"):
        packed.add_(1)
    with pytest.raises(KernelError, match="read-only"):
        packed.copy_(torch.zeros(4, 64))


def test_copies_and_pickles_are_whole() -> None:
    dense = weight(24, 64)
    module = torch.nn.Linear(64, 24, bias=False, dtype=torch.bfloat16)
    module.weight = torch.nn.Parameter(endor.encode(dense), requires_grad=False)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(again.weight, BitmapTensor)
        assert isinstance(again.weight, torch.nn.Parameter)
        assert_bitwise_equal(endor.decode(again.weight), dense)
    assert isinstance(module.state_dict()["weight"], BitmapTensor)


def test_gradients_flow_to_the_input() -> None:
    dense = weight(24, 64, dtype=torch.float32)
    x, y = (weight(5, 64, dtype=torch.float32).requires_grad_() for _ in range(2))
    F.linear(x, endor.encode(dense)).sum().backward()
    F.linear(y, dense).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_a_compiled_linear_equals_the_eager_one() -> None:
    dense, x = weight(24, 64), weight(5, 64)
    packed = endor.encode(dense, values="raw", mask="bitmap")
    compiled = torch.compile(F.linear, backend="eager")
    assert torch.equal(compiled(x, packed), F.linear(x, dense))

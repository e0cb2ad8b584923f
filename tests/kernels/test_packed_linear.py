"""`F.linear` with a BitmapTensor that may multiply straight from its sections."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import endor
from endor.errors import KernelError, PlanError
from endor.kernels import linear
from endor.kernels.tensor import BitmapTensor


def weight(rows: int, columns: int, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    dense = torch.randn(rows, columns, generator=generator)
    return torch.where(dense.abs() > 0.6, dense, torch.zeros(())).to(dtype)


def automatic(dense: torch.Tensor, *, values: str = "auto") -> BitmapTensor:
    packed = endor.encode(dense, values=values)
    packed.use_matmul("auto")
    return packed


@pytest.mark.parametrize("values", ["raw", "exponent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (40, 64), (0, 64), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_every_way_gives_the_dense_product(
    shape: tuple[int, ...],
    with_bias: bool,
    dtype: torch.dtype,
    values: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "TILE_BYTES", 4096)
    dense, x = weight(96, 64, dtype=dtype), torch.randn(shape).to(dtype)
    bias = weight(96, 1, dtype=dtype)[:, 0] if with_bias else None
    y = F.linear(x, automatic(dense, values=values), bias)
    expected = F.linear(x, dense, bias)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(y, expected)


def test_a_wider_dtype_is_multiplied_in_it() -> None:
    dense, x = weight(96, 64), torch.randn(3, 64)
    y = F.linear(x, automatic(dense).to(torch.float32))
    torch.testing.assert_close(y, F.linear(x, dense.float()))
    assert y.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 40])
def test_a_new_tensor_gives_the_bits_of_the_dense_product(rows: int) -> None:
    dense, x = weight(96, 640), torch.randn(rows, 640).bfloat16()
    assert torch.equal(F.linear(x, endor.encode(dense)), F.linear(x, dense))


def test_gradients_of_input_and_bias_are_those_of_the_dense_product() -> None:
    dense = weight(24, 64)
    for wants in ((True, False), (False, True), (True, True)):
        found: list[torch.Tensor | None] = []
        expected: list[torch.Tensor | None] = []
        for kind, results in ((automatic(dense), found), (dense, expected)):
            torch.manual_seed(0)
            x = torch.randn(3, 64).bfloat16().requires_grad_(wants[0])
            bias = torch.randn(24).bfloat16().requires_grad_(wants[1])
            F.linear(x, kind, bias).sum().backward()
            results += [x.grad, bias.grad]
        torch.testing.assert_close(found, expected)


def test_autocast_decides_the_dtype_as_for_a_dense_weight() -> None:
    dense, x = weight(24, 64, dtype=torch.float32), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, expected = F.linear(x, automatic(dense)), F.linear(x, dense)
    assert torch.equal(y, expected)
    assert y.dtype == torch.bfloat16


def test_vmap_sees_a_dense_weight() -> None:
    dense, x = weight(24, 64), torch.randn(3, 64).bfloat16()
    packed = automatic(dense)
    y = torch.func.vmap(lambda row: F.linear(row, packed))(x)
    torch.testing.assert_close(y, F.linear(x, dense))


def test_a_compiled_linear_is_traced_through_decode() -> None:
    dense, x = weight(24, 64), torch.randn(3, 64).bfloat16()
    compiled = torch.compile(F.linear, backend="eager")
    assert torch.equal(compiled(x, automatic(dense)), F.linear(x, dense))


@pytest.mark.parametrize("x", [torch.randn(3, 60).bfloat16(), torch.randn(3, 64)], ids=["shape", "dtype"])
def test_what_does_not_fit_is_refused_as_for_a_dense_weight(x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError):
        F.linear(x, automatic(weight(24, 64)))


def test_copies_pickles_and_casts_multiply_in_the_same_way() -> None:
    packed = automatic(weight(24, 64))
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.float(), packed.detach()):
        assert isinstance(again, BitmapTensor)
        assert again._matmul == "auto"


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(PlanError, match="matmul must be one of auto, decode, found 'fast'"):
        endor.encode(weight(4, 64)).use_matmul("fast")


def test_a_weight_whose_sections_moved_is_read_where_they_are() -> None:
    packed = automatic(weight(64, 256), values="int4")
    x = torch.randn(1, 256).bfloat16()
    expected = F.linear(x, packed)
    ForkingPickler.dumps(packed)  # moves them to shared memory
    _ = [torch.full((1 << 16,), 255, dtype=torch.uint8) for _ in range(50)]
    assert torch.equal(F.linear(x, packed), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, at first use
def test_forward_mode_differentiation_goes_through() -> None:
    packed = automatic(weight(64, 256))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(1, 256).bfloat16(), torch.randn(1, 256).bfloat16())
        found, expected = F.linear(x, packed), F.linear(x, packed.to_dense())
        tangent = forward_ad.unpack_dual(found).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, forward_ad.unpack_dual(expected).tangent, rtol=0, atol=0)


@pytest.mark.parametrize("matmul", ["auto", "decode"])
def test_functional_gradients_go_through(matmul: str) -> None:
    packed = automatic(weight(64, 256))
    packed.use_matmul(matmul)
    x = torch.randn(3, 256).bfloat16()
    found = torch.func.grad(lambda a: F.linear(a, packed).sum())(x)
    dense = packed.to_dense()
    assert torch.equal(found, torch.func.grad(lambda a: F.linear(a, dense).sum())(x))


def test_a_negated_view_keeps_its_sign() -> None:
    packed = automatic(weight(64, 256))
    x = torch.randn(1, 256).bfloat16()
    torch.testing.assert_close(F.linear(torch._neg_view(x), packed), F.linear(-x, packed))
    assert torch.equal(endor.decode(endor.encode(torch._neg_view(x))), -x)


def test_an_unknown_codec_is_named_with_those_there_are() -> None:
    with pytest.raises(KernelError, match="unknown values codec 'zip'; use auto, raw, exponent"):
        endor.encode(weight(8, 64), values="zip")

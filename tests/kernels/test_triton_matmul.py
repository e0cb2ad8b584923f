"""Products on the GPU straight from packed weights: close to float64, exact where sums are, safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode
from tests.kernels.test_hostile_sections import CLEAR_BIT, WEIGHT, with_bit
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import replace_section
from tests.support.triton import DEVICE, MARKS, on_device, sparse_normal

# numpy, in the interpreter, warns of infinity and NaN.
pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")]
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
KINDS = [
    ("raw", "bitmap", "bf16"),
    ("raw", "bitmap", "f16"),
    ("exponent", "bitmap", "bf16"),
    ("exponent", "bitmap", "f16"),
    ("exponent", "dense", "bf16"),
    ("int8", "bitmap", "bf16"),
    ("int8", "dense", "f16"),
    ("int4", "bitmap", "f16"),
    ("int4", "dense", "bf16"),
]


@pytest.fixture(autouse=True)
def _nothing_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    from endor.kernels import triton_matmul, triton_tuning

    monkeypatch.setattr(triton_matmul, "_choices", triton_tuning.Choices(tmp_path / "tiles.json"))
    triton_matmul.set_tuning(allowed=False)
    yield
    triton_matmul.set_tuning(allowed=True)


def pack(weight: Tensor, codec: str = "raw", mask: str = "bitmap") -> PackedTensor:
    return encode(weight, values=codec, mask=mask, backend="reference")


def x_of(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).to(dtype)


def small_integers(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Sums of products of these are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-7, 8, shape, generator=generator).to(dtype)


def product(x: Tensor, packed: PackedTensor, bias: Tensor | None = None, **options: object) -> Tensor:
    from endor.kernels import triton_matmul

    moved = None if bias is None else bias.to(DEVICE)
    y = triton_matmul.linear(x.to(DEVICE), on_device(packed), moved, **options)  # type: ignore[arg-type]
    assert y is not None
    return y.cpu()


def assert_close(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within the rounding of float32 sums (a random walk over the columns) and of the result."""
    exact = x.double() @ weight.double().T
    terms = (x.double().square() @ weight.double().square().T).sqrt()  # the size of the walk's sums
    bound = 8 * torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5 * terms
    bound += torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("x_rows", [1, 5])
@pytest.mark.parametrize(("codec", "mask", "name"), KINDS)
def test_product_is_within_rounding_of_the_decoded_weight(
    codec: str, mask: str, name: str, x_rows: int
) -> None:
    dtype = HALVES[name]
    packed = pack(sparse_normal((5, 700), dtype), codec, mask)
    x = x_of(x_rows, 700, dtype)
    assert_close(product(x, packed), x, decode(packed, backend="reference"))


@pytest.mark.parametrize("x_rows", [1, 16])
@pytest.mark.parametrize("shape", [(1, 256), (9, 2000), (21, 300), (2, 4200)], ids=str)
def test_exact_sums_are_exact(shape: tuple[int, int], x_rows: int) -> None:
    """Row blocks of one row and of many, rows that end anywhere, the last row block cut short."""
    weight, x = (
        small_integers(shape, torch.bfloat16),
        small_integers((x_rows, shape[1]), torch.bfloat16, seed=1),
    )
    bias = small_integers((shape[0],), torch.bfloat16, seed=2)
    expected = x.float() @ weight.float().T
    assert_bitwise_equal(product(x, pack(weight)), expected.bfloat16())
    assert_bitwise_equal(product(x, pack(weight), bias), (expected + bias.float()).bfloat16())


def test_every_tile_gives_the_same_exact_sums() -> None:
    from endor.kernels.triton_matmul import tiles

    weight = small_integers((5, 1500), torch.float16)
    for x_rows in (1, 2):
        x = small_integers((x_rows, 1500), torch.float16, seed=1)
        for tile in tiles(x_rows):
            y = product(x, pack(weight), tile=tile)
            assert_bitwise_equal(y, (x.float() @ weight.float().T).half())


def test_leading_dimensions_and_strides_of_x_do_not_matter() -> None:
    weight = small_integers((5, 300), torch.bfloat16)
    x = small_integers((300, 6), torch.bfloat16, seed=1).T.reshape(2, 3, 300)
    assert_bitwise_equal(product(x, pack(weight)), F.linear(x.float(), weight.float()).bfloat16())
    assert product(x[0, 0], pack(weight)).shape == (5,)


@pytest.mark.parametrize("x_rows", [1, 2])
@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_infinity_and_nan_spread_as_in_a_dense_product(special: float, x_rows: int) -> None:
    weight = small_integers((3, 300), torch.bfloat16)
    weight[1:, 299] = 0  # infinity times a pruned weight is NaN
    x = small_integers((x_rows, 300), torch.bfloat16, seed=1)
    x[0, 299] = special
    y = product(x, pack(weight))
    torch.testing.assert_close(y, F.linear(x.float(), weight.float()).bfloat16(), equal_nan=True)


@pytest.mark.parametrize("x_rows", [1, 2])
def test_damage_is_refused_at_once_or_when_asked(x_rows: int) -> None:
    from endor.kernels.triton_launch import new_status, raise_for

    lying = with_bit(20, CLEAR_BIT, 1)(encode(WEIGHT, backend="reference"))
    x = torch.ones(x_rows, 700, dtype=torch.bfloat16)
    with pytest.raises(FormatError, match="row block 2: row_offsets and the number of bits"):
        product(x, lying)
    status = new_status(DEVICE)
    product(x, lying, status=status)
    with pytest.raises(FormatError, match="row block 2"):
        raise_for(status)


def test_damaged_records_are_refused() -> None:
    packed = pack(sparse_normal((9, 1000)), "exponent")
    offsets = packed.sections["exponent_offsets"].clone()
    offsets[1] += 1
    lying = replace_section(packed, {"exponent_offsets": offsets})
    with pytest.raises(FormatError, match="row block 0: its record of exponents"):
        product(torch.ones(1, 1000, dtype=torch.bfloat16), lying)


def test_what_is_not_supported_is_left_to_the_caller() -> None:
    from endor.kernels import triton_matmul

    packed = on_device(pack(sparse_normal((8, 256))))
    x = torch.ones(1, 256, dtype=torch.bfloat16, device=DEVICE)
    assert triton_matmul.supports(x, packed)
    assert triton_matmul.linear(x.half(), packed) is None
    assert triton_matmul.linear(x.expand(17, 256), packed) is None
    assert triton_matmul.linear(x[:, :255], packed) is None
    assert triton_matmul.linear(x[:, :64], on_device(pack(sparse_normal((300, 64))))) is None
    assert triton_matmul.linear(x.float(), on_device(pack(torch.ones(8, 256)))) is None


def test_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelError, match=r"bias must be torch\.bfloat16 \[8\]"):
        product(torch.ones(1, 256, dtype=torch.bfloat16), pack(sparse_normal((8, 256))), torch.ones(8))


def test_the_tile_that_was_found_fastest_is_used_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from endor.kernels import triton_matmul

    packed = on_device(pack(small_integers((3, 300), torch.bfloat16)))
    times = iter([3.0, 1.0, 2.0, 4.0])

    def time_s(run: object) -> float:
        assert callable(run)
        run()
        return next(times)

    best = triton_matmul.tune(packed, 1, time_s)
    assert best == triton_matmul.tiles(1)[1]
    used: list[object] = []
    monkeypatch.setattr(triton_matmul, "_launch", lambda *_, tile, **__: used.append(tile))
    triton_matmul.linear(torch.ones(1, 300, dtype=torch.bfloat16, device=DEVICE), packed)
    assert used == [best]

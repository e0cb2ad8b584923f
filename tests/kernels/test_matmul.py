"""Products straight from a packed weight: close to float64, exact where sums are, never out of bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode, matmul
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import replace_section

if not matmul.instruction_sets():
    pytest.skip("the native extension is not built", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float32]
PACKINGS = [
    (codec, mask)
    for codec in ("raw", "exponent", "int8", "int4")
    for mask in ("bitmap", "dense")
    if (codec, mask) != ("raw", "dense")
]
SHAPES = [(1, 1), (3, 31), (7, 65), (33, 200), (9, 1000), (70, 2048), (6, 4097)]
HUGE = 2**31 - 1


@pytest.fixture(scope="session", params=matmul.instruction_sets())
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=DTYPES, ids=["bf16", "f32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=PACKINGS, ids="-".join)
def packing(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weight_of(shape: tuple[int, int], density: float = 0.5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * kept).bfloat16()


def x_of(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def small_integers(shape: tuple[int, ...], *, seed: int = 0, highest: int = 7) -> Tensor:
    """Sums of products of these are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-highest, highest + 1, shape, generator=generator).float()


def product(x: Tensor, packed: PackedTensor, bias: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    y = matmul.linear(x, packed, bias, isa=isa)
    assert y is not None
    return y


def assert_close(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Within the rounding of float32 sums (a random walk over the columns) and of the result."""
    exact = x.double() @ weight.double().T
    steps = max(x.shape[-1], 1) ** 0.5
    terms = (x.double().square() @ weight.double().square().T).sqrt()  # the size of the walk's sums
    bound = 8 * torch.finfo(torch.float32).eps * steps * terms + torch.finfo(y.dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_within_rounding_of_float64_of_the_decoded_weight(
    isa: str, dtype: torch.dtype, packing: tuple[str, str], shape: tuple[int, int], density: float
) -> None:
    codec, mask = packing
    packed = encode(weight_of(shape, density), values=codec, mask=mask)
    for x_rows in (1, 3, 8):
        x = x_of((x_rows, shape[1]), dtype)
        assert_close(product(x, packed, isa=isa), x, decode(packed))


def unit(shape: tuple[int, int], column: int, dtype: torch.dtype) -> Tensor:
    x = torch.zeros(shape, dtype=dtype)
    x[:, column] = 1
    return x


@pytest.mark.parametrize("column", [0, 1, 62, 63, 64, 129, 130])
def test_single_column_gives_the_decoded_weights_to_the_bit(
    isa: str, dtype: torch.dtype, packing: tuple[str, str], column: int
) -> None:
    """Rounding of the lossy codecs included: what is multiplied is what decoding gives."""
    codec, mask = packing
    packed = encode(weight_of((37, 131)), values=codec, mask=mask)
    y = product(unit((2, 131), column, dtype), packed, isa=isa)
    expected = decode(packed)[:, column].to(dtype) + 0.0  # a pruned weight adds to zero whatever its sign
    assert_bitwise_equal(y[0] + 0.0, expected)
    assert_bitwise_equal(y[1] + 0.0, expected)


@pytest.mark.parametrize("levels", [1, 2, 5, 30, 250], ids=lambda n: f"{n}-exponents")
def test_any_number_of_exponents_is_multiplied_alike(isa: str, levels: int) -> None:
    """Few and many exponents make records with one and with several levels, of one and of two planes."""
    generator = torch.Generator().manual_seed(levels)
    exponents = torch.randint(0, levels, (40, 300), generator=generator) - levels // 2
    weight = torch.ldexp(torch.randn(40, 300, generator=generator).sign(), exponents).bfloat16()
    packed = encode(weight, values="exponent")
    x = unit((1, 300), 7, torch.float32)
    assert_bitwise_equal(product(x, packed, isa=isa)[0], decode(packed)[:, 7].float())


@pytest.mark.parametrize("x_rows", [*range(1, 10), 16])
@pytest.mark.parametrize("shape", [(9, 1000), (6, 64), (35, 129)], ids=str)
def test_exact_sums_are_exact(isa: str, dtype: torch.dtype, shape: tuple[int, int], x_rows: int) -> None:
    weight, x = small_integers(shape), small_integers((x_rows, shape[1]), seed=1)
    bias = small_integers((shape[0],), seed=2).to(dtype)
    packed = encode(weight.bfloat16())
    assert_bitwise_equal(product(x.to(dtype), packed, isa=isa), (x @ weight.T).to(dtype))
    assert_bitwise_equal(product(x.to(dtype), packed, bias, isa=isa), (x @ weight.T + bias.float()).to(dtype))


@given(data=st.data())
def test_any_shape_and_any_emptiness(isa: str, data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 300))
    kept = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    weight = small_integers((rows, cols), seed=data.draw(st.integers(0, 99)))
    weight[~torch.tensor(kept, dtype=torch.bool)] = 0
    x = small_integers((data.draw(st.integers(0, 9)), cols), seed=1)
    y = product(x, encode(weight.bfloat16()), isa=isa)
    assert_bitwise_equal(y + 0.0, x @ weight.T + 0.0)  # the sign of an empty sum does not matter


def test_leading_dimensions_and_strides_of_x_do_not_matter(isa: str) -> None:
    weight = small_integers((20, 100))
    packed = encode(weight.bfloat16())
    x = small_integers((100, 3), seed=1).T.unsqueeze(0)
    assert not x.is_contiguous()
    assert_bitwise_equal(product(x, packed, isa=isa), x @ weight.T)
    assert_bitwise_equal(product(x[0, 0], packed, isa=isa), x[0, 0] @ weight.T)


def test_row_of_x_gets_the_same_bits_alone_and_among_others(
    isa: str, dtype: torch.dtype, packing: tuple[str, str]
) -> None:
    codec, mask = packing
    packed = encode(weight_of((37, 3000)), values=codec, mask=mask)
    x = x_of((11, 3000), dtype)
    together = product(x, packed, isa=isa)
    for i in range(len(x)):
        assert_bitwise_equal(product(x[i], packed, isa=isa), together[i])


def test_any_number_of_threads_gives_the_same_bits(
    isa: str, dtype: torch.dtype, packing: tuple[str, str], threads: Callable[[int], None]
) -> None:
    codec, mask = packing
    packed = encode(weight_of((600, 2048)), values=codec, mask=mask)
    x = x_of((2, 2048), dtype)
    threads(1)
    alone = product(x, packed, isa=isa)
    for count in (2, 5):
        threads(count)
        for _ in range(2):
            assert_bitwise_equal(product(x, packed, isa=isa), alone)


@pytest.mark.parametrize("codec", ["raw", "exponent"])
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_infinity_and_nan_in_the_weight_spread_as_in_a_dense_product(
    isa: str, dtype: torch.dtype, codec: str, special: float
) -> None:
    weight = small_integers((8, 130))
    weight[2, 65] = special
    weight[5, 129] = -0.0
    x = small_integers((2, 130), seed=1)
    x[1, 65] = 0  # infinity times zero is NaN
    y = product(x.to(dtype), encode(weight.bfloat16(), values=codec), isa=isa)
    torch.testing.assert_close(y, (x @ weight.T).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_infinity_and_nan_spread_as_in_a_dense_product(
    isa: str, dtype: torch.dtype, codec: str, special: float
) -> None:
    weight = small_integers((8, 130), highest=1)
    weight[3:, 129] = 0  # infinity times a pruned weight is NaN
    packed = encode(weight.bfloat16(), values=codec)
    weight = decode(packed).float()
    x = small_integers((2, 130), seed=1)
    x[1, 129] = special
    y = product(x.to(dtype), packed, isa=isa)
    expected = (x @ weight.T).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-4, equal_nan=True)


def test_result_is_rounded_to_nearest_even(isa: str) -> None:
    """1 + 2^-8 and 1 + 3 * 2^-8 lie halfway between two bfloat16."""
    weight = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [1.0, 2**-7]]).bfloat16()
    y = product(torch.ones(1, 2).bfloat16(), encode(weight), isa=isa)
    assert y.tolist() == [[1.0, 1.0 + 2**-6, 1.0 + 2**-7]]


def with_offset(block: int, value: int) -> Callable[[PackedTensor], PackedTensor]:
    def lie(packed: PackedTensor) -> PackedTensor:
        offsets = packed.sections["row_offsets"].clone()
        offsets[block] = value
        return replace_section(packed, {"row_offsets": offsets})

    return lie


def with_bitmap(row: int, byte: int, change: int) -> Callable[[PackedTensor], PackedTensor]:
    def lie(packed: PackedTensor) -> PackedTensor:
        bitmap = packed.sections["bitmap"].clone()
        bitmap[row, byte] ^= change
        return replace_section(packed, {"bitmap": bitmap})

    return lie


def with_values(change: int) -> Callable[[PackedTensor], PackedTensor]:
    """The values section, and nnz with it, is shorter or longer than the bitmap says."""

    def lie(packed: PackedTensor) -> PackedTensor:
        nnz = packed.layout.nnz + change
        values = torch.zeros(nnz, dtype=torch.bfloat16)
        return replace_section(packed, {"values": values}, nnz=nnz)

    return lie


LIES: dict[str, Callable[[PackedTensor], PackedTensor]] = {
    "first-offset-not-zero": with_offset(0, 1),
    "first-offset-negative": with_offset(0, -1),
    "last-offset-wrong": with_offset(6, 1),
    "offset-negative": with_offset(3, -(2**31)),
    "offset-huge": with_offset(3, HUGE),
    "offsets-decrease": with_offset(3, 1),
    "bit-flipped": with_bitmap(20, 5, 1),
    "all-bits-of-a-byte-flipped": with_bitmap(44, 80, 0xFF),
    "bit-in-padding": with_bitmap(20, 700 // 8, 0x80),
    "value-missing": with_values(-1),
    "value-left-over": with_values(1),
    "all-values-missing": lambda packed: with_values(-packed.layout.nnz)(packed),
}


@pytest.mark.parametrize("lie", list(LIES.values()), ids=list(LIES))
@pytest.mark.parametrize("x_rows", [1, 8])
def test_lie_is_refused(isa: str, lie: Callable[[PackedTensor], PackedTensor], x_rows: int) -> None:
    packed = lie(encode(weight_of((45, 700)), values="raw"))  # six row blocks of eight rows, the last of five
    with pytest.raises(FormatError, match=r"row block \d"):
        matmul.linear(torch.ones(x_rows, 700), packed, isa=isa)


@pytest.mark.parametrize("codec", ["exponent", "int8", "int4"])
@pytest.mark.parametrize("lie", [name for name in LIES if "value" not in name])
def test_lie_about_the_mask_is_refused_for_every_codec(isa: str, codec: str, lie: str) -> None:
    packed = LIES[lie](encode(weight_of((45, 700)), values=codec, mask="bitmap"))
    with pytest.raises(FormatError, match=r"row block \d"):
        matmul.linear(torch.ones(1, 700), packed, isa=isa)


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
def test_first_row_block_that_lies_is_named(isa: str, codec: str, threads: Callable[[int], None]) -> None:
    threads(2)
    honest = encode(weight_of((1000, 700)), values=codec, mask="bitmap")
    packed = with_bitmap(999, 3, 1)(with_bitmap(200, 3, 1)(honest))
    with pytest.raises(FormatError, match=f"row block {200 // honest.layout.geometry.row_block}:"):
        matmul.linear(torch.ones(1, 700), packed, isa=isa)


HOSTILE = {
    "raw": ("bitmap", "row_offsets"),
    "exponent": ("bitmap", "row_offsets", "exponent_offsets", "exponents"),
    "int8": ("bitmap", "row_offsets", "scales", "codes"),
    "int4": ("bitmap", "row_offsets", "scales", "codes", "codebook"),
}


@pytest.mark.parametrize("codec", list(HOSTILE))
@given(data=st.data())
def test_flipped_bytes_are_refused_as_by_a_decode(isa: str, codec: str, data: st.DataObject) -> None:
    packed = encode(weight_of((45, 700)), values=codec, mask="bitmap")
    changed = {name: section.clone() for name, section in packed.sections.items()}
    for _ in range(data.draw(st.integers(1, 4))):
        flat = changed[data.draw(st.sampled_from(HOSTILE[codec]))].view(torch.uint8).view(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    lying = PackedTensor(packed.layout, changed)
    x = unit((1, 700), 3, torch.float32)
    try:
        dense = decode(lying)
    except FormatError:
        with pytest.raises(FormatError):
            matmul.linear(x, lying, isa=isa)
    else:
        expected = x @ dense.float().T
        torch.testing.assert_close(product(x, lying, isa=isa), expected, equal_nan=True)


def test_a_tensor_that_takes_the_place_of_another_is_not_taken_for_it() -> None:
    """Addresses are remembered per tensor, which may lie where one before it lay."""
    x = torch.ones(1, 64)
    for value in range(1, 20):
        packed = encode(torch.full((4, 64), float(value)).bfloat16(), values="raw", mask="bitmap")
        assert product(x, packed).tolist() == [[64.0 * value] * 4]
        del packed


def test_what_is_not_supported_is_left_to_the_caller() -> None:
    packed = encode(weight_of((8, 64)))
    assert matmul.linear(torch.ones(1, 64), packed) is not None
    limit = matmul.MAX_ROWS[matmul.instruction_sets()[0]][packed.layout.codec]
    assert matmul.linear(torch.ones(limit + 1, 64), packed) is None
    assert matmul.linear(torch.ones(1, 64, dtype=torch.float16), packed) is None
    assert matmul.linear(torch.ones(1, 65), packed) is None
    assert matmul.linear(torch.ones(1, 64), encode(torch.ones(8, 64))) is None
    assert matmul.linear(torch.ones(1, 64), encode(weight_of((8, 64)), values="raw", mask="dense")) is None
    assert not matmul.supports(torch.ones(1, 64, device="meta"), packed)


@pytest.mark.parametrize(
    "bias", [torch.ones(7), torch.ones(8, 1), torch.ones(8, dtype=torch.float64)], ids=str
)
def test_bias_that_does_not_fit_is_refused(bias: Tensor) -> None:
    with pytest.raises(KernelError, match=r"bias must be torch\.float32 \[8\]"):
        matmul.linear(torch.ones(1, 64), encode(weight_of((8, 64))), bias)


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(KernelError, match="unknown instruction set 'mmx'"):
        matmul.linear(torch.ones(1, 64), encode(weight_of((8, 64))), isa="mmx")

"""Triton decodes every codec to the bits that the reference gives, and writes nowhere else."""

from __future__ import annotations

import pytest
import torch

from endor.errors import KernelError
from endor.formats.codecs.exponent import Levels
from endor.formats.dtypes import PACKABLE
from endor.formats.packed import MASKS, PackedTensor
from endor.kernels import backends, decode, decode_rows, encode
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import poisoned, random_bits, replace_section, special_values
from tests.support.triton import DEVICE, MARKS, assert_decodes, on_device, sparse_normal

pytestmark = MARKS
SHAPES = {
    "one": (1,),
    "no-elements": (0,),
    "no-rows": (0, 64),
    "no-cols": (7, 0),
    "one-col": (70, 1),
    "ragged": (9, 1025),
    "row-of-many-tiles": (2, 9000),
    "aligned": (3, 4096),
    "experts": (2, 6, 200),
}
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
LOSSY = {**HALVES, "f32": torch.float32}


def pack(weight: torch.Tensor, codec: str = "raw", mask: str = "bitmap") -> PackedTensor:
    return encode(weight, values=codec, mask=mask, backend="reference")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("density", [0.02, 0.97])
def test_every_shape_of_raw_values_comes_back(shape: tuple[int, ...], density: float) -> None:
    weight = random_bits(shape, torch.bfloat16, density)
    assert_decodes(pack(weight), weight)


@pytest.mark.parametrize("dtype", PACKABLE, ids=str)
def test_every_element_size_and_special_value_comes_back(dtype: torch.dtype) -> None:
    special = special_values(dtype)
    weight = torch.stack([special.roll(i).repeat(13) for i in range(len(special))])
    assert_decodes(pack(weight), weight)
    assert_decodes(pack(random_bits((5, 999), dtype, 0.5)), random_bits((5, 999), dtype, 0.5))


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
def test_rows_that_are_empty_or_full(codec: str) -> None:
    weight = sparse_normal((6, 1000), density=1.0)
    weight[::2] = 0
    assert_decodes(pack(weight, codec), decode(pack(weight, codec), backend="reference"))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("shape", [(1,), (3, 31), (5, 700), (1, 9000)], ids=str)
def test_exponents_of_weights_come_back(shape: tuple[int, ...], dtype: torch.dtype, mask: str) -> None:
    weight = sparse_normal(shape, dtype)
    assert_decodes(pack(weight, "exponent", mask), weight)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_exponents_of_arbitrary_bits_come_back(dtype: torch.dtype, mask: str) -> None:
    weight = torch.cat([random_bits((3, 260), dtype, 0.5), special_values(dtype).repeat(52)[None, :260]])
    assert_decodes(pack(weight, "exponent", mask), weight)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("levels", [Levels(1, 0), Levels(2, 1), Levels(0, 8), Levels(2, 8)], ids=str)
def test_every_kind_of_levels(levels: Levels, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("endor.kernels.reference_exponent.choose_levels", lambda *_: levels)
    weight = torch.cat([sparse_normal((2, 330)), random_bits((2, 330), torch.bfloat16, 0.5)])
    assert_decodes(pack(weight, "exponent", mask), weight)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", LOSSY.values(), ids=LOSSY)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_lossy_codecs_give_the_bits_of_the_reference(codec: str, dtype: torch.dtype, mask: str) -> None:
    packed = pack(sparse_normal((3, 1500), dtype), codec, mask)
    assert_decodes(packed, decode(packed, backend="reference"))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, in the interpreter
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_products_at_the_ends_of_the_range_round_as_in_the_reference(codec: str) -> None:
    """Overflow to infinity, subnormal results, and halves between two numbers."""
    for dtype in LOSSY.values():
        weight = torch.arange(1, 513, dtype=torch.float32).view(4, 128).to(dtype)
        packed = pack(weight, codec)
        scales = torch.tensor([3.3e38, 1.2e-38, 0.0, 0.00390625]).bfloat16().view(4, 1)
        packed = replace_section(packed, {"scales": scales})
        assert_decodes(packed, decode(packed, backend="reference"))


def test_an_odd_first_value_of_int4_is_the_upper_half_of_its_byte() -> None:
    weight = sparse_normal((40, 1000), density=0.5)
    weight[:, 0] = 0
    packed = pack(weight, "int4")
    assert packed.sections["row_offsets"][1:-1].remainder(2).any()
    assert_decodes(packed, decode(packed, backend="reference"))


@pytest.mark.parametrize("codec", ["raw", "exponent"])
def test_any_run_of_row_blocks_decodes_alone(codec: str) -> None:
    weight = sparse_normal((37, 700))
    packed = pack(weight, codec)
    device, g = on_device(packed), packed.layout.geometry
    assert (g.row_block, g.row_blocks) == (8, 5)
    for start, stop in ((0, 1), (1, 3), (4, 5), (2, 2)):
        part = weight[start * 8 : stop * 8]
        out = poisoned(tuple(part.shape), part.dtype, device=DEVICE)
        decode_rows(device, start, stop, out.tensor, backend="triton")
        assert_bitwise_equal(out.tensor.cpu(), part)
        out.assert_guards_intact()


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8"])
def test_sections_and_output_on_no_particular_boundary(codec: str) -> None:
    weight = sparse_normal((7, 600))
    packed = pack(weight, codec)
    shifted = {name: _shifted(section) for name, section in packed.sections.items()}
    out = poisoned((7, 600), weight.dtype, shift_bytes=2, device=DEVICE)
    decode(PackedTensor(packed.layout, shifted), out=out.tensor, backend="triton")
    assert_bitwise_equal(out.tensor.cpu(), decode(packed, backend="reference"))
    out.assert_guards_intact()


def _shifted(section: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element behind an aligned address."""
    memory = torch.zeros(section.numel() + 1, dtype=section.dtype, device=DEVICE)
    memory[1:] = section.flatten().to(DEVICE)
    return memory[1:].view(section.shape)


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(_n: int) -> torch.dtype:
        return torch.int64

    for module in ("formats.packed", "kernels.reference"):
        monkeypatch.setattr(f"endor.{module}.offsets_dtype", wide)
    weight = random_bits((9, 600), torch.bfloat16, 0.5)
    assert_decodes(pack(weight), weight)


def test_rows_too_long_for_32_bits_are_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("endor.kernels.triton_launch.MAX_BLOCK_ELEMENTS", 4096)
    monkeypatch.setattr("endor.kernels.triton_launch.launch_decode", None)
    weight = random_bits((1, 5000), torch.bfloat16, 0.5)
    assert_decodes(pack(weight), weight)


def test_triton_is_one_of_the_backends_and_encodes_as_the_reference_does() -> None:
    assert "triton" in backends()
    weight = sparse_normal((9, 100)).to(DEVICE)
    packed = encode(weight, values="exponent", backend="triton")
    for name, section in pack(weight.cpu(), "exponent").sections.items():
        assert_bitwise_equal(packed.sections[name].cpu(), section)


def test_it_is_the_default_where_it_is_fast_and_only_there() -> None:
    from endor.kernels import active_backend

    assert (active_backend(DEVICE) == "triton") == (DEVICE.type == "cuda")
    with pytest.raises(KernelError, match="backend triton cannot run"):
        decode(pack(sparse_normal((2, 64))).to(torch.device("meta")), backend="triton")

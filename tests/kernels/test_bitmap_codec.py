"""What every backend owes: the same sections as the reference, and the same bits back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from endor.errors import KernelError
from endor.formats.dtypes import PACKABLE
from endor.kernels import decode, decode_rows, encode
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import Case, cases, poisoned, random_bits, replace_section, special_values

SHAPES = {
    "one": (1,),
    "vector": (1000,),
    "no-elements": (0,),
    "no-rows": (0, 64),
    "no-cols": (7, 0),
    "one-col": (300, 1),
    "word": (3, 64),
    "word-and-one": (5, 65),
    "ragged": (33, 1025),
    "aligned": (64, 2048),
    "many-blocks": (513, 320),
    "experts": (3, 6, 200),
    "no-experts": (0, 6, 200),
}
DTYPE_IDS = {dtype: str(dtype).removeprefix("torch.") for dtype in PACKABLE}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    value: tuple[int, ...] = request.param
    return value


@pytest.fixture(params=PACKABLE, ids=list(DTYPE_IDS.values()))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


class TestEncode:
    """A backend's sections are those of the reference, byte for byte."""

    @pytest.mark.parametrize("density", [0.02, 1.0])
    def test_sections_equal_the_reference(
        self, backend: str, shape: tuple[int, ...], dtype: torch.dtype, density: float
    ) -> None:
        weight = random_bits(shape, dtype, density)
        actual, expected = encode(weight, backend=backend), encode(weight, backend="reference")
        assert actual.layout == expected.layout
        for name, section in expected.sections.items():
            assert_bitwise_equal(actual.sections[name], section)

    def test_what_it_wrote_passes_the_format_check(
        self, backend: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        encode(random_bits(shape, dtype, 0.5), backend=backend).check()

    def test_strides_do_not_matter(self, backend: str) -> None:
        weight = random_bits((65, 40), torch.bfloat16, 0.5)
        packed = encode(weight.t(), backend=backend)
        assert_bitwise_equal(decode(packed, backend="reference"), weight.t().contiguous())

    def test_weight_is_neither_changed_nor_kept(self, backend: str) -> None:
        weight = random_bits((16, 64), torch.float32, 1.0)
        before = weight.clone()
        packed = encode(weight, backend=backend)
        assert_bitwise_equal(weight, before)
        weight.zero_()
        assert_bitwise_equal(decode(packed, backend="reference"), before)

    def test_weight_in_the_middle_of_an_element_of_memory(self, backend: str) -> None:
        memory = torch.frombuffer(bytearray(1 + 4 * 640), dtype=torch.float32, offset=1, count=640)
        memory.copy_(random_bits((640,), torch.float32, 0.5))
        assert memory.data_ptr() % 4 != 0
        assert_bitwise_equal(
            decode(encode(memory.view(10, 64), backend=backend)), memory.clone().view(10, 64)
        )

    def test_only_kept_values_are_held_in_memory(self, backend: str) -> None:
        values = encode(random_bits((64, 640), torch.float32, 0.25), backend=backend).sections["values"]
        assert values.untyped_storage().nbytes() == values.nbytes


class TestDecode:
    """A backend gives back every bit and touches nothing else."""

    @pytest.mark.parametrize("density", [0.0, 0.5, 0.97])
    def test_bits_come_back(
        self, backend: str, shape: tuple[int, ...], dtype: torch.dtype, density: float
    ) -> None:
        weight = random_bits(shape, dtype, density, seed=1)
        packed = encode(weight, backend="reference")
        out = poisoned(shape, dtype)
        assert decode(packed, out=out.tensor, backend=backend) is out.tensor
        assert_bitwise_equal(out.tensor, weight)
        out.assert_guards_intact()

    @given(case=cases())
    def test_any_tensor_comes_back(self, backend: str, case: Case) -> None:
        weight = case.tensor()
        packed = encode(weight, backend=backend)
        out = poisoned(case.shape, case.dtype)
        decode(packed, out=out.tensor, backend=backend)
        assert_bitwise_equal(out.tensor, weight)
        out.assert_guards_intact()

    def test_every_special_value_survives_in_every_lane(self, backend: str, dtype: torch.dtype) -> None:
        special = special_values(dtype)
        weight = torch.stack([special.roll(i).repeat(13) for i in range(len(special))])
        packed = encode(weight, backend=backend)
        assert packed.layout.nnz == weight.numel() * (len(special) - 1) // len(special), (
            "only +0.0 is dropped"
        )
        assert_bitwise_equal(decode(packed, backend=backend), weight)

    def test_rows_that_are_empty_or_full(self, backend: str, dtype: torch.dtype) -> None:
        weight = random_bits((40, 200), dtype, 1.0)
        weight[::3] = 0
        assert_bitwise_equal(decode(encode(weight, backend=backend), backend=backend), weight)

    def test_output_on_no_particular_boundary(self, backend: str, dtype: torch.dtype) -> None:
        weight = random_bits((64, 256), dtype, 0.5)
        packed = encode(weight, backend=backend)
        out = poisoned((64, 256), dtype, shift_bytes=dtype.itemsize)
        decode(packed, out=out.tensor, backend=backend)
        assert_bitwise_equal(out.tensor, weight)
        out.assert_guards_intact()

    @pytest.mark.parametrize("streaming_bytes", [0, 1 << 60], ids=["streaming", "cached"])
    def test_streaming_stores_write_the_same(
        self, backend: str, dtype: torch.dtype, streaming_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("endor.kernels.native_backend.STREAMING_BYTES", streaming_bytes)
        for shape in ((128, 512), (50, 333)):
            weight = random_bits(shape, dtype, 0.5)
            assert_bitwise_equal(decode(encode(weight, backend=backend), backend=backend), weight)

    def test_values_that_start_in_the_middle_of_an_element(self, backend: str) -> None:
        weight = random_bits((10, 64), torch.float32, 0.5)
        packed = encode(weight)
        values = packed.sections["values"]
        shifted = torch.frombuffer(
            bytearray(1 + values.nbytes), dtype=torch.float32, offset=1, count=len(values)
        )
        shifted.copy_(values)
        assert_bitwise_equal(decode(replace_section(packed, {"values": shifted}), backend=backend), weight)


class TestDecodeRows:
    """Any run of row blocks can be decoded alone."""

    def test_every_run_of_blocks(self, backend: str, dtype: torch.dtype) -> None:
        weight = random_bits((45, 700), dtype, 0.5)
        packed = encode(weight, backend=backend)
        g = packed.layout.geometry
        assert (g.row_block, g.row_blocks) == (8, 6)
        for start in range(g.row_blocks + 1):
            for stop in range(start, g.row_blocks + 1):
                expected = weight[start * 8 : stop * 8]
                out = poisoned(tuple(expected.shape), dtype)
                decode_rows(packed, start, stop, out.tensor, backend=backend)
                assert_bitwise_equal(out.tensor, expected)
                out.assert_guards_intact()

    def test_one_expert_of_a_stack(self, backend: str) -> None:
        weight = random_bits((5, 6, 300), torch.bfloat16, 0.5)
        packed = encode(weight, backend=backend)
        blocks_per_expert = packed.layout.geometry.row_blocks // 5
        out = torch.empty(6, 300, dtype=torch.bfloat16)
        decode_rows(packed, 3 * blocks_per_expert, 4 * blocks_per_expert, out, backend=backend)
        assert_bitwise_equal(out, weight[3])

    def test_of_an_unmasked_tensor(self) -> None:
        weight = random_bits((45, 700), torch.float16, 0.5)
        out = torch.empty(16, 700, dtype=torch.float16)
        decode_rows(encode(weight, mask="dense"), 1, 3, out)
        assert_bitwise_equal(out, weight[8:24])

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 7)])
    def test_blocks_that_do_not_exist_are_refused(self, start: int, stop: int) -> None:
        packed = encode(random_bits((45, 700), torch.bfloat16, 0.5))
        with pytest.raises(KernelError, match=f"row blocks {start} to {stop} of 6"):
            decode_rows(packed, start, stop, torch.empty(0, 700, dtype=torch.bfloat16))


class TestDenseMask:
    """Mask `dense` with codec `raw` is a copy."""

    @pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=["scalar", "empty", "matrix"])
    def test_is_a_copy(self, shape: tuple[int, ...]) -> None:
        weight = random_bits(shape, torch.float32, 1.0)
        packed = encode(weight, mask="dense")
        before = weight.clone()
        weight.zero_()
        assert_bitwise_equal(decode(packed), before)
        assert_bitwise_equal(decode(packed, out=torch.empty(shape)), before)

    def test_holds_dtypes_that_a_bitmap_cannot(self) -> None:
        weight = torch.arange(10)
        assert_bitwise_equal(decode(encode(weight, mask="dense")), weight)

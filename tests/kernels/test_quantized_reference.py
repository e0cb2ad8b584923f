"""Codecs `int8` and `int4`: codes and decoded values follow the rules exactly, and the loss is small."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from endor.errors import KernelError
from endor.formats.packed import MASKS, PackedTensor
from endor.kernels import decode, decode_rows, encode
from endor.kernels.quantize import fit_codebook, fit_scales_int4, fit_scales_int8, int4_codes, int8_codes
from tests.support.bits import assert_bitwise_equal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
by_codec = pytest.mark.parametrize("codec", ["int8", "int4"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "fp16", "fp32"))
by_mask = pytest.mark.parametrize("mask", MASKS)


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16, prune: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator) * 0.02
    if prune:
        weight[weight.abs() < weight.abs().median()] = 0
    return weight.to(dtype)


def pack(weight: torch.Tensor, codec: str, mask: str = "bitmap") -> PackedTensor:
    packed = encode(weight, values=codec, mask=mask, backend="reference")
    packed.check()
    return packed


def unpacked(weight: torch.Tensor, codec: str, mask: str = "bitmap") -> torch.Tensor:
    return decode(pack(weight, codec, mask), backend="reference")


def loss_db(weight: torch.Tensor, restored: torch.Tensor) -> float:
    error = (weight.double() - restored.double()).square().sum()
    return 10 * math.log10(float(weight.double().square().sum() / error))


def by_hand(packed: PackedTensor, kept: torch.Tensor) -> torch.Tensor:
    """Decoding in double precision, one rounding at the end."""
    codes = packed.sections["codes"].numpy()
    integers = codes
    if packed.layout.codec == "int4":
        indices = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)[: packed.layout.nnz]
        integers = packed.sections["codebook"].numpy()[indices]
    row, column = kept.nonzero(as_tuple=True)
    scales = packed.sections["scales"].double()[row, column // 128]
    out = torch.zeros(kept.shape, dtype=torch.float64)
    out[kept] = torch.from_numpy(integers.astype(np.float64)) * scales
    return out.to(packed.layout.dtype)


@by_codec
@by_dtype
@by_mask
@pytest.mark.parametrize("cols", [64, 128, 300])
def test_decoding_rounds_the_exact_product_once(codec: str, dtype: torch.dtype, mask: str, cols: int) -> None:
    weight = gaussian(33, cols, dtype=dtype)
    kept = weight != 0 if mask == "bitmap" else torch.ones_like(weight, dtype=torch.bool)
    packed = pack(weight, codec, mask)
    assert_bitwise_equal(decode(packed, backend="reference"), by_hand(packed, kept))


def test_int8_codes_are_the_nearest_integers() -> None:
    weight = gaussian(20, 300, prune=False)
    scales = fit_scales_int8(weight)
    wide = scales.float().repeat_interleave(128, 1)[:, :300].numpy()
    expected = np.clip(np.rint(weight.float().numpy() / wide), -127, 127)
    assert np.array_equal(int8_codes(weight, scales).numpy(), expected)


def test_int4_codes_are_the_nearest_entries() -> None:
    weight = gaussian(20, 300, prune=False)
    codebook = fit_codebook(weight)
    scales = fit_scales_int4(weight, codebook)
    ratios = (weight.float() / scales.float().repeat_interleave(128, 1)[:, :300]).numpy()
    entries = codebook[int4_codes(weight, scales, codebook).long()].numpy()
    distance = np.abs(ratios[..., None] - codebook.float().numpy()).min(axis=-1)
    assert np.array_equal(np.abs(ratios - entries), distance)


def test_a_value_in_the_middle_takes_the_smaller_entry() -> None:
    codebook = torch.tensor(
        [1, 2, 4, 8, 16, 32, 64, 127, -1, -2, -4, -8, -16, -32, -64, -127], dtype=torch.int8
    )
    weight = torch.tensor([[1.5, 3.0, -12.0, -95.5, 127.0, 1000.0, -1.500001]])
    codes = int4_codes(weight, torch.ones(1, 1, dtype=torch.bfloat16), codebook)
    assert codes.tolist() == [[0, 1, 11, 14, 7, 7, 9]]


def test_a_codebook_is_symmetric_and_increasing() -> None:
    for weight in (gaussian(64, 512), torch.zeros(4, 64), torch.ones(4, 64), gaussian(1, 5)):
        codebook = fit_codebook(weight).tolist()
        assert codebook[8:] == [-entry for entry in codebook[:8]]
        assert codebook[:8] == sorted(set(codebook[:8]))
        assert codebook[0] >= 0
        assert codebook[7] == 127


@by_codec
def test_zeros_stay_zeros_and_signs_stay(codec: str) -> None:
    weight = gaussian(40, 300)
    restored = unpacked(weight, codec)
    assert torch.equal(restored != 0, weight != 0)
    assert torch.equal(restored.sign(), weight.sign())


@by_codec
@by_mask
def test_a_group_of_zeros_has_scale_zero(codec: str, mask: str) -> None:
    weight = gaussian(6, 384)
    weight[2, 128:256] = 0
    weight[4] = -0.0
    packed = pack(weight, codec, mask)
    assert packed.sections["scales"][2].tolist()[1] == 0
    assert packed.sections["scales"][4].tolist() == [0, 0, 0]
    restored = decode(packed, backend="reference")
    assert torch.equal(restored[4], torch.zeros(384, dtype=weight.dtype))
    assert restored.isfinite().all()


@by_codec
@by_dtype
def test_the_largest_and_the_smallest_numbers_stay_finite(codec: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    weight = torch.full((2, 128), info.max, dtype=dtype)
    weight[1] = info.tiny
    weight[1, ::2] = info.smallest_normal / 4
    weight[0, ::2] = -info.max
    restored = unpacked(weight, codec)
    assert restored.isfinite().all()
    assert torch.equal(restored[0].sign(), weight[0].sign())
    assert (restored[0].double() / weight[0].double() - 1).abs().max() < 0.02


@by_codec
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_infinity_are_refused(codec: str, value: float) -> None:
    weight = gaussian(4, 64)
    weight[1, 7] = value
    with pytest.raises(KernelError, match="cannot hold NaN or infinity"):
        pack(weight, codec)


@by_codec
@by_mask
def test_any_run_of_row_blocks_decodes_alone(codec: str, mask: str) -> None:
    weight = gaussian(37, 701)
    packed = pack(weight, codec, mask)
    whole, g = decode(packed, backend="reference"), packed.layout.geometry
    for start in range(g.row_blocks + 1):
        for stop in range(start, g.row_blocks + 1):
            part = whole[start * g.row_block : stop * g.row_block]
            out = torch.full_like(part, 7)
            decode_rows(packed, start, stop, out, backend="reference")
            assert_bitwise_equal(out, part)


@by_codec
@pytest.mark.parametrize("shape", [(1,), (0,), (0, 64), (7, 0), (3, 6, 200), (300, 1)], ids=str)
def test_any_shape_can_be_packed(codec: str, shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape, prune=False)
    assert unpacked(weight, codec).shape == shape


@pytest.mark.parametrize(
    ("codec", "prune", "least_db", "most_bits"),
    [
        ("int8", True, 45.5, 5.14),
        ("int8", False, 43.0, 8.13),
        ("int4", True, 24.9, 3.14),
        ("int4", False, 20.7, 4.13),
    ],
)
def test_loss_and_bits_per_weight(codec: str, prune: bool, least_db: float, most_bits: float) -> None:
    weight = gaussian(256, 4096, prune=prune)
    packed = pack(weight, codec, "bitmap" if prune else "dense")
    assert packed.layout.bits_per_weight <= most_bits
    assert loss_db(weight, decode(packed, backend="reference")) >= least_db


def test_searching_scales_loses_less_than_reaching_the_largest_value() -> None:
    weight = gaussian(64, 512)
    codebook = fit_codebook(weight)
    largest = weight.float().view(64, -1, 128).abs().amax(2)
    widest = (largest / 127).bfloat16()
    for scales, codes, entries in (
        (fit_scales_int8(weight), int8_codes, torch.arange(-128, 128)),
        (fit_scales_int4(weight, codebook), lambda w, s: int4_codes(w, s, codebook), codebook),
    ):
        losses = []
        for candidate in (scales, widest):
            found = codes(weight, candidate).long() + (128 if len(entries) == 256 else 0)
            wide = candidate.float().repeat_interleave(128, 1)
            losses.append(loss_db(weight, entries[found].float() * wide * (weight != 0)))
        assert losses[0] > losses[1]

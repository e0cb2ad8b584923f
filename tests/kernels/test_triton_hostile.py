"""Sections that lie are refused by the Triton kernels too, and nothing but sections and output is touched.

In the interpreter addresses are real ones: here sections end or begin at memory that nobody may read, so that
a kernel that strays ends the process.
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from endor.errors import FormatError
from endor.formats.codecs.exponent import Levels
from endor.formats.packed import PackedTensor
from endor.kernels import decode, decode_rows, encode
from tests.kernels.test_hostile_sections import CLEAR_BIT, LIES, WEIGHT, with_bit
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import poisoned, random_bits, replace_section
from tests.support.triton import DEVICE, MARKS, on_device, sparse_normal

pytestmark = MARKS
PAGE = mmap.PAGESIZE
_kept_alive: list[mmap.mmap] = []


def beside_unreadable(section: torch.Tensor, *, at_end: bool) -> torch.Tensor:
    """A copy between two unreadable pages, as close to one of them as 16-byte alignment allows."""
    if DEVICE.type != "cpu":
        return section.to(DEVICE)
    pages = -(-max(section.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    _kept_alive.append(memory)
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    address = ctypes.addressof(view)
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (address, address + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    offset = PAGE
    if at_end:
        offset += (pages * PAGE - section.nbytes) // 16 * 16
    if not section.numel():
        return section
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=section.nbytes)
    copy.copy_(section.contiguous().view(-1).view(torch.uint8))
    return copy.view(section.dtype).view(section.shape)


def guarded(packed: PackedTensor, *, at_end: bool) -> PackedTensor:
    sections = {name: beside_unreadable(section, at_end=at_end) for name, section in packed.sections.items()}
    return PackedTensor(packed.layout, sections)


def is_refused(packed: PackedTensor, backend: str) -> bool:
    """Whether decoding raises FormatError; writes outside the output fail the test."""
    out = poisoned(packed.layout.shape, packed.layout.dtype, device=packed.device)
    try:
        decode(packed, out=out.tensor, backend=backend)
    except FormatError:
        return True
    finally:
        out.assert_guards_intact()
    return False


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_honest_sections_are_never_left(codec: str, dtype: torch.dtype, at_end: bool) -> None:
    packed = encode(sparse_normal((7, 777), dtype), values=codec, backend="reference")
    out = decode(guarded(packed, at_end=at_end), backend="triton")
    assert_bitwise_equal(out.cpu(), decode(packed, backend="reference"))


@pytest.mark.parametrize("mask", ["bitmap", "dense"])
@pytest.mark.parametrize("codec", ["exponent", "int8", "int4"])
def test_nothing_behind_the_last_value_is_read(codec: str, mask: str) -> None:
    """128 values: every section of values ends exactly where memory does."""
    weight = sparse_normal((1, 128), torch.float16, density=1.0)
    if mask == "bitmap":
        weight = torch.stack([weight[0], torch.zeros_like(weight[0])]).T.reshape(2, 128).contiguous()
    packed = encode(weight, values=codec, mask=mask, backend="reference")
    assert packed.layout.nnz == 128
    out = decode(guarded(packed, at_end=True), backend="triton")
    assert_bitwise_equal(out.cpu(), decode(packed, backend="reference"))


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
def test_more_bits_than_values_read_nothing_behind_them(codec: str) -> None:
    packed = encode(sparse_normal((9, 1000), density=0.1), values=codec, backend="reference")
    bitmap = packed.sections["bitmap"].clone()
    bitmap[-1, :125] = 255
    assert is_refused(guarded(replace_section(packed, {"bitmap": bitmap}), at_end=True), "triton")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # numpy, in the interpreter
@pytest.mark.parametrize("scale", [-1.0, 1e-40, torch.inf, torch.nan])
@pytest.mark.parametrize(("codec", "mask"), [("int8", "bitmap"), ("int4", "dense")])
def test_scales_that_are_no_scales_are_refused(codec: str, mask: str, scale: float) -> None:
    packed = encode(sparse_normal((3, 300)), values=codec, mask=mask, backend="reference")
    scales = packed.sections["scales"].clone()
    scales[2, 1] = scale
    lying = replace_section(packed, {"scales": scales})
    assert is_refused(lying, "reference")
    assert is_refused(guarded(lying, at_end=True), "triton")


@pytest.mark.parametrize("pairs", [0, 1])
def test_bits_behind_the_last_value_of_a_level_are_refused(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = Levels(pairs, 2)
    monkeypatch.setattr("endor.kernels.reference_exponent.choose_levels", lambda *_: levels)
    packed = encode(sparse_normal((1, 77), density=1.0), values="exponent", backend="reference")
    assert not is_refused(guarded(packed, at_end=True), "triton")
    exponents = packed.sections["exponents"].clone()
    exponents[levels.table_bytes + 9] |= 0x80  # of the ten bytes for 77 values
    lying = replace_section(packed, {"exponents": exponents})
    assert is_refused(lying, "reference")
    assert is_refused(guarded(lying, at_end=True), "triton")


@pytest.mark.parametrize("name", list(LIES))
def test_lie_is_refused(name: str) -> None:
    lying = LIES[name](encode(WEIGHT, backend="reference"))
    assert is_refused(guarded(lying, at_end="negative" not in name), "triton")


def test_the_first_row_block_that_lies_is_named() -> None:
    packed = with_bit(20, CLEAR_BIT, 1)(encode(WEIGHT, backend="reference"))
    device = on_device(packed)
    out = torch.empty(16, 700, dtype=torch.bfloat16, device=DEVICE)
    decode_rows(device, 0, 2, out, backend="triton")
    with pytest.raises(FormatError, match="row block 2: row_offsets and the number of bits"):
        decode_rows(device, 1, 3, out, backend="triton")


def test_offset_of_a_tensor_without_rows_must_be_zero() -> None:
    packed = encode(torch.empty(0, 64), backend="reference")
    lying = replace_section(packed, {"row_offsets": torch.tensor([5], dtype=torch.int32)})
    with pytest.raises(FormatError):
        decode(on_device(lying), backend="triton")


@pytest.mark.parametrize("mask", ["bitmap", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_flipped_bytes_are_refused_where_the_reference_refuses_them(mask: str, dtype: torch.dtype) -> None:
    weight = torch.cat([sparse_normal((3, 300), dtype), random_bits((2, 300), dtype, 0.5)])
    packed = encode(weight, values="exponent", mask=mask, backend="reference")
    names = [name for name in packed.sections if name not in {"sign_mantissa", "mantissa_low"}]
    generator = torch.Generator().manual_seed(1)
    refused = 0
    for turn in range(8):
        changed = {name: section.clone() for name, section in packed.sections.items()}
        flat = changed[names[turn % len(names)]].view(-1).view(torch.uint8)
        used = len(flat) - 64 * (names[turn % len(names)] == "exponents")
        flat[int(torch.randint(0, used, (), generator=generator))] ^= int(2 ** (turn % 8))
        lying = PackedTensor(packed.layout, changed)
        expected = is_refused(lying, "reference")
        assert is_refused(guarded(lying, at_end=turn % 2 == 0), "triton") == expected
        refused += expected
    assert refused


@pytest.mark.parametrize("offset", [-(2**31), -1, 1, 2**30, 2**31 - 1])
def test_exponent_offsets_are_not_trusted(offset: int) -> None:
    packed = encode(sparse_normal((9, 1000)), values="exponent", backend="reference")
    offsets = packed.sections["exponent_offsets"].clone()
    offsets[1] = offset
    lying = replace_section(packed, {"exponent_offsets": offsets})
    for at_end in (True, False):
        assert is_refused(guarded(lying, at_end=at_end), "triton")

"""Many matrices in one launch: the same bits, one kernel per kind, 64-bit addresses, damage named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from endor.errors import FormatError, KernelError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import random_bits
from tests.support.triton import DEVICE, MARKS, on_device, sparse_normal

pytestmark = MARKS


def jobs_of(*packed: PackedTensor) -> list[tuple[PackedTensor, torch.Tensor]]:
    return [
        (on_device(p), torch.full(p.layout.shape, -1.0, device=DEVICE).to(p.layout.dtype)) for p in packed
    ]


def test_a_block_of_matrices_is_decoded_by_one_kernel_per_kind() -> None:
    from endor.kernels.triton_launch import DecodeGroup

    packed = [
        encode(sparse_normal((5, 700)), values="raw", backend="reference"),
        encode(sparse_normal((3, 1000), seed=1), values="exponent", backend="reference"),
        encode(sparse_normal((1, 500), seed=2), values="raw", backend="reference"),
        encode(sparse_normal((9, 64), seed=3), values="int4", backend="reference"),
        encode(sparse_normal((2, 2100), seed=4), values="exponent", backend="reference"),
        encode(random_bits((0, 64), torch.bfloat16, 0.5), backend="reference"),
        encode(sparse_normal((9, 64), seed=3), values="int8", mask="dense", backend="reference"),
    ]
    jobs = jobs_of(*packed)
    group = DecodeGroup(jobs)
    for _ in range(2):
        for _, out in jobs:
            out.fill_(-1.0)
        group.launch()
        group.raise_for()
        for p, (_, out) in zip(packed, jobs, strict=True):
            assert_bitwise_equal(out.cpu(), decode(p, backend="reference"))
    assert group.launches <= 5


def test_damage_is_reported_for_the_entry_that_has_it() -> None:
    from endor.kernels.triton_launch import DecodeGroup

    packed = [encode(random_bits((9, 1000), torch.bfloat16, 0.5), backend="reference") for _ in range(3)]
    packed[1].sections["row_offsets"][1] += 1
    group = DecodeGroup(jobs_of(*packed))
    group.launch()
    with pytest.raises(FormatError, match="entry 1: row block 0: row_offsets and the number of bits"):
        group.raise_for()


def test_what_cannot_be_in_a_group_is_refused() -> None:
    from endor.kernels.triton_launch import DecodeGroup

    weight = sparse_normal((4, 64))
    with pytest.raises(KernelError, match="cannot be in a DecodeGroup"):
        DecodeGroup(jobs_of(encode(weight, mask="dense")))
    packed = on_device(encode(weight, backend="reference"))
    with pytest.raises(KernelError, match=r"expected a contiguous torch\.bfloat16\[4, 64\]"):
        DecodeGroup([(packed, torch.empty(4, 63, dtype=torch.bfloat16, device=DEVICE))])
    memory = torch.empty(4 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(KernelError, match="aligned to 16 bytes"):
        DecodeGroup([(packed, memory[1:].view(4, 64))])


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
def test_addresses_beyond_32_bits(codec: str) -> None:
    """One row block far inside a tensor of 2^36 elements, of which only this row block is in memory.

    Sections and output are given addresses so far in front that only exact 64-bit arithmetic comes back.
    """
    import triton.language as tl

    from endor.kernels import triton_launch
    from endor.kernels.triton_kernels.decode import FIELDS, decode_group_kernel

    rows, cols, block = 1 << 24, 4096, (1 << 24) - 12345
    packed = on_device(encode(sparse_normal((1, cols)), values=codec, backend="reference"))
    start = 5 * 10**9  # values before the row block, and bytes of records
    sections, params = dict(packed.sections), dict(packed.layout.params)
    sections["row_offsets"] = torch.tensor([start, start + packed.layout.nnz], device=DEVICE)
    if codec == "exponent":
        sections["exponent_offsets"] = sections["exponent_offsets"].to(torch.int64) + start
        params["exponent_bytes"] = 2**40
    out = torch.full((1, cols), -1.0, dtype=torch.bfloat16, device=DEVICE)
    row = dict(zip(FIELDS, triton_launch.table_row(packed, out, first_program=-block), strict=True))
    value_bytes = {"raw": 2 * start, "exponent": start, "int8": start, "int4": start // 2}[codec]
    groups = -(-cols // params.get("group_columns", cols))
    row |= {"rows": rows, "row_block": 1, "nnz": 2**40}
    row["bitmap"] -= block * cols // 8
    row["row_offsets"] = sections["row_offsets"].data_ptr() - 8 * block
    row["values"] -= value_bytes
    row["out"] -= block * cols * 2
    if codec == "exponent":
        row["exponent_offsets"] = sections["exponent_offsets"].data_ptr() - 8 * block
        row["exponents"] -= start
        row["exponent_bytes"] = params["exponent_bytes"]
    elif codec != "raw":
        row["extra"] -= block * groups * 2
    status = triton_launch.new_status(DEVICE)
    constants = triton_launch.Launch(packed.layout).constants
    types: dict[str, Any] = {"OFFSET": tl.int64, "RECORD_OFFSET": tl.int64, "ENTRIES": 1}
    types = triton_launch.group_types(packed) | types
    table = torch.tensor([list(row.values())], device=DEVICE)
    options = triton_launch.tile_options(128)
    decode_group_kernel[(1,)](table, status, 1, **options, **constants, **types)
    triton_launch.raise_for(status)
    assert_bitwise_equal(out.cpu(), decode(packed, backend="reference").cpu())

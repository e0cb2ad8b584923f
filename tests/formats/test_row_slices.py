"""A run of row blocks, read by ranges of its sections, decodes to the same rows as the whole tensor does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from endor.errors import FormatError
from endor.formats import PackedTensor, TensorEntry
from endor.formats.entries import Section
from endor.formats.slices import RowIndex, RowSlice, index_sections
from endor.kernels import decode, encode
from tests.support.bits import assert_bitwise_equal

CODINGS = [
    ("raw", "bitmap"),
    ("raw", "dense"),
    ("exponent", "bitmap"),
    ("exponent", "dense"),
    ("int8", "bitmap"),
    ("int8", "dense"),
    ("int4", "bitmap"),
    ("int4", "dense"),
]


class InMemory:
    """An entry and its payload, as a shard has them."""

    def __init__(self, packed: PackedTensor) -> None:
        sections, payload = [], b""
        for spec in packed.layout.sections:
            payload += bytes(-len(payload) % 64)
            data = packed.sections[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes()
            sections.append(Section(spec.name, len(payload), len(payload) + len(data), 0))
            payload += data
        self.payload = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self.entry = TensorEntry("w", (), packed.layout, tuple(sections))
        self.index = {name: packed.sections[name] for name in index_sections(packed.layout)}

    def read(self, rows: RowSlice) -> PackedTensor:
        return rows.assemble([self.payload[part.begin : part.end].clone() for part in rows.ranges])


def weight(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator)
    dense[torch.rand(shape, generator=generator) >= density] = 0
    return dense.to(dtype)


weights = st.builds(
    weight,
    st.tuples(st.integers(1, 40), st.sampled_from([1, 63, 300, 1025, 4096])),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 1000),
)


@pytest.mark.parametrize(("values", "mask"), CODINGS)
@settings(max_examples=40, deadline=None)
@given(dense=weights, data=st.data())
def test_a_run_of_row_blocks_decodes_to_its_rows(
    values: str, mask: str, dense: torch.Tensor, data: st.DataObject
) -> None:
    packed = encode(dense, values=values, mask=mask)
    stored = InMemory(packed)
    blocks = packed.layout.geometry.row_blocks
    start = data.draw(st.integers(0, blocks - 1))
    stop = data.draw(st.integers(start + 1, blocks))
    run = RowIndex(stored.entry, stored.index).row_blocks(start, stop)
    rows = slice(run.first_row, run.first_row + run.layout.shape[0])
    assert_bitwise_equal(decode(stored.read(run)), decode(packed)[rows])


@pytest.mark.parametrize(("values", "mask"), CODINGS)
@pytest.mark.parametrize("shape", [(5, 96, 32), (3, 7, 130), (4, 64, 5000)])
def test_an_expert_decodes_to_its_matrix(values: str, mask: str, shape: tuple[int, ...]) -> None:
    packed = encode(weight(shape, torch.bfloat16, 0.5), values=values, mask=mask)
    stored = InMemory(packed)
    index = RowIndex(stored.entry, stored.index)
    for expert in range(shape[0]):
        one = index.matrices(expert, expert + 1)
        assert one.layout.shape == (1, *shape[1:])
        assert_bitwise_equal(decode(stored.read(one)), decode(packed)[expert : expert + 1])


@pytest.mark.parametrize(("values", "mask"), CODINGS)
def test_runs_read_no_more_than_their_share(values: str, mask: str) -> None:
    packed = encode(weight((64, 4096), torch.bfloat16, 0.5), values=values, mask=mask)
    stored = InMemory(packed)
    index = RowIndex(stored.entry, stored.index)
    read = sum(index.row_blocks(i, i + 8).nbytes for i in range(0, 64, 8))
    assert read <= packed.layout.nbytes + 8 * 70


def test_offsets_that_lie_are_refused() -> None:
    packed = encode(weight((8, 4096), torch.bfloat16, 0.5), values="exponent", mask="bitmap")
    stored = InMemory(packed)
    lying = {name: section.clone() for name, section in stored.index.items()}
    lying["row_offsets"][3] = 2**30
    with pytest.raises(FormatError, match=r"row_offsets must rise.*F18"):
        RowIndex(stored.entry, lying)
    lying = {name: section.clone() for name, section in stored.index.items()}
    lying["exponent_offsets"][3] = 2**30
    with pytest.raises(FormatError, match=r"exponent_offsets decrease or leave the section \[F26\]"):
        RowIndex(stored.entry, lying).row_blocks(2, 3)


def test_a_part_of_an_expert_is_refused() -> None:
    packed = encode(weight((2, 8, 4096), torch.bfloat16, 0.5), values="raw", mask="bitmap")
    stored = InMemory(packed)
    with pytest.raises(ValueError, match="whole matrices"):
        RowIndex(stored.entry, stored.index).row_blocks(0, 3)

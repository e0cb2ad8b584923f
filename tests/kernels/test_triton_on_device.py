"""What only a GPU can show of the Triton kernels: streams, no hidden waiting, memory beyond 2^31 elements.

The other test_triton_*.py run in the interpreter too; these need a CUDA device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from endor.errors import FormatError
from endor.formats.packed import PackedTensor
from endor.kernels import decode, encode
from tests.kernels.test_hostile_sections import CLEAR_BIT, WEIGHT, with_bit
from tests.support.bits import assert_bitwise_equal
from tests.support.triton import sparse_normal

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
LARGE_BYTES = 20 << 30


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where tuning remembers; nothing is timed unless a test allows it."""
    from endor.kernels import triton_matmul, triton_tuning

    monkeypatch.setattr(triton_matmul, "_choices", triton_tuning.Choices(tmp_path / "tiles.json"))
    triton_matmul.set_tuning(allowed=False)
    yield tmp_path / "tiles.json"
    triton_matmul.set_tuning(allowed=True)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever makes Python wait for the device raises inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed_of(shape: tuple[int, int], codec: str = "raw", mask: str = "bitmap") -> PackedTensor:
    return encode(sparse_normal(shape), values=codec, mask=mask, backend="reference").to(CUDA)


def decode_of(packed: PackedTensor, status: torch.Tensor) -> tuple[torch.Tensor, Callable[[], object]]:
    """An output, and what starts decoding to it."""
    from endor.kernels.triton_launch import launch_decode

    out = torch.full(packed.layout.shape, -1.0, dtype=packed.layout.dtype, device=CUDA)
    return out, lambda: launch_decode(packed, 0, packed.layout.geometry.row_blocks, out, status)


@pytest.mark.parametrize("codec", ["raw", "exponent", "int8", "int4"])
def test_launches_are_ordered_by_the_stream_that_is_current(codec: str) -> None:
    """The sections arrive late on another stream: a launch that goes elsewhere decodes zeros or damage."""
    from endor.kernels.triton_launch import new_status, raise_for

    packed = packed_of((64, 4096), codec)
    expected = decode(packed, backend="reference")
    empty = PackedTensor(packed.layout, {name: torch.zeros_like(s) for name, s in packed.sections.items()})
    status, stream = new_status(CUDA), torch.cuda.Stream()
    out, launch = decode_of(empty, status)
    _, warm = decode_of(packed, new_status(CUDA))
    warm()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1 << 26)
        for name, section in packed.sections.items():
            empty.sections[name].copy_(section)
        launch()
    stream.synchronize()
    raise_for(status)
    assert_bitwise_equal(out, expected)


@pytest.mark.parametrize("codec", ["raw", "exponent"])
def test_decoding_waits_for_nothing_and_damage_is_read_late(codec: str) -> None:
    from endor.kernels.triton_launch import DecodeGroup, new_status, raise_for

    good, bad = packed_of((64, 4096), codec), with_bit(20, CLEAR_BIT, 1)(encode(WEIGHT, backend="reference"))
    status, late = new_status(CUDA), new_status(CUDA)
    out, launch = decode_of(good, status)
    _, launch_bad = decode_of(bad.to(CUDA), late)
    group = DecodeGroup([(good, torch.empty_like(out))])
    for run in (launch, launch_bad, group.launch):
        run()  # compiles
    with waiting_is_an_error():
        launch()
        launch_bad()
        group.launch()
    raise_for(status)
    group.raise_for()
    with pytest.raises(FormatError, match="row block 2"):
        raise_for(late)


@pytest.mark.parametrize("x_rows", [1, 16])
def test_products_wait_for_nothing_and_damage_is_read_late(x_rows: int) -> None:
    from endor.kernels.triton_launch import new_status, raise_for
    from endor.kernels.triton_matmul import linear

    bad = with_bit(20, CLEAR_BIT, 1)(encode(WEIGHT, backend="reference")).to(CUDA)
    x, status = torch.ones(x_rows, 700, dtype=torch.bfloat16, device=CUDA), new_status(CUDA)
    linear(x, bad, status=new_status(CUDA))  # compiles
    with waiting_is_an_error():
        assert linear(x, bad, status=status) is not None
    with pytest.raises(FormatError, match="row block 2"):
        raise_for(status)


def test_products_are_ordered_by_the_stream_that_is_current() -> None:
    from endor.kernels.triton_launch import new_status
    from endor.kernels.triton_matmul import linear

    packed, status, stream = packed_of((64, 4096)), new_status(CUDA), torch.cuda.Stream()
    x = torch.zeros(1, 4096, dtype=torch.bfloat16, device=CUDA)
    linear(x, packed, status=status)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1 << 26)
        x.fill_(1.0)
        y = linear(x, packed, status=status)
    stream.synchronize()
    assert y is not None
    assert y.any()


def test_the_first_product_times_and_the_next_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    from endor.kernels import triton_matmul, triton_tuning
    from endor.kernels.triton_launch import new_status

    triton_matmul.set_tuning(allowed=True)
    packed, status = packed_of((256, 4096)), new_status(CUDA)
    x = torch.ones(1, 4096, dtype=torch.bfloat16, device=CUDA)
    triton_matmul.linear(x, packed, status=status)
    assert len(json.loads(file.read_text())["content"]) == 1
    monkeypatch.setattr(triton_matmul, "EventClock", None)
    with waiting_is_an_error():
        triton_matmul.linear(x, packed, status=status)
    monkeypatch.setattr(triton_matmul, "_choices", triton_tuning.Choices(file))
    triton_matmul.linear(x, packed, status=status)


def test_more_than_2_31_elements_come_back() -> None:
    """Real memory: the last rows of a weight whose elements and values do not fit 32-bit numbers."""
    from endor.kernels.triton_launch import launch_decode, new_status, raise_for

    if torch.cuda.mem_get_info()[0] < LARGE_BYTES:
        pytest.skip(f"needs {LARGE_BYTES >> 30} GiB of free device memory")
    cols, repeats = 8192, (1 << 18) // 128 + 1
    small = sparse_normal((128, cols), density=1.0)
    packed = repeated(encode(small, values="raw", backend="reference"), repeats)
    assert packed.layout.nnz > 2**31
    out = torch.full(packed.layout.shape, -1.0, dtype=torch.bfloat16, device=CUDA)
    status = new_status(CUDA)
    launch_decode(packed, 0, packed.layout.geometry.row_blocks, out, status)
    raise_for(status)
    for at in (0, repeats // 2, repeats - 1):
        assert_bitwise_equal(out[at * 128 : (at + 1) * 128].cpu(), small)


def repeated(packed: PackedTensor, times: int) -> PackedTensor:
    """`packed`, whose row blocks are full, so many times below itself, on the device."""
    from endor.formats.packed import TensorLayout

    layout = packed.layout
    rows, cols = layout.shape
    assert rows % layout.geometry.row_block == 0
    tall = TensorLayout((rows * times, cols), layout.dtype, layout.mask, layout.codec, layout.nnz * times)
    offsets = packed.sections["row_offsets"][:-1].to(CUDA, torch.int64)
    starts = torch.arange(times, device=CUDA).unsqueeze(1) * layout.nnz + offsets
    end = torch.tensor([tall.nnz], device=CUDA)
    sections = {
        "bitmap": packed.sections["bitmap"].to(CUDA).repeat(times, 1),
        "row_offsets": torch.cat([starts.flatten(), end]),
        "values": packed.sections["values"].to(CUDA).repeat(times),
    }
    return PackedTensor(tall, sections)

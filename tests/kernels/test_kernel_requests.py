"""Requests that cannot be met are refused before a kernel runs, with what would have been accepted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from endor.errors import FormatError, KernelError
from endor.formats.layout import WORD_BITS
from endor.kernels import active_backend, backends, decode, encode
from tests.support.kernels import random_bits

WEIGHT = random_bits((16, 64), torch.bfloat16, 0.5)


def test_reference_is_always_there() -> None:
    assert backends()[-1] == "reference"


def test_the_fastest_backend_is_the_default() -> None:
    assert active_backend("cpu") == backends()[0]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(KernelError, match=r"unknown backend 'fpga'; this machine has .*reference"):
        encode(WEIGHT, backend="fpga")


def test_unknown_codec_is_refused() -> None:
    with pytest.raises(KernelError, match=r"cannot encode torch\.bfloat16 with values 'zip'"):
        encode(WEIGHT, values="zip")


def test_unknown_mask_is_refused() -> None:
    with pytest.raises(KernelError, match="mask 'stripes'"):
        encode(WEIGHT, mask="stripes")


def test_dtype_that_cannot_be_masked_is_refused() -> None:
    with pytest.raises(KernelError, match=r"cannot encode torch\.int64"):
        encode(torch.arange(4))


def test_scalar_is_refused() -> None:
    with pytest.raises(FormatError, match="scalar"):
        encode(torch.tensor(1.0))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(16, 65, dtype=torch.bfloat16),
        torch.empty(16, 64, dtype=torch.float16),
        torch.empty(64, 16, dtype=torch.bfloat16).t(),
        torch.empty(16, 64, dtype=torch.bfloat16, device="meta"),
    ],
    ids=["shape", "dtype", "strides", "device"],
)
def test_out_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    with pytest.raises(KernelError, match=r"contiguous torch\.bfloat16 tensor of shape \[16, 64\]"):
        decode(encode(WEIGHT), out=out)


def test_without_the_extension_reference_works_and_says_so_once() -> None:
    program = """
import sys, warnings
sys.modules["endor.kernels._native"] = None
import torch
from endor.kernels import backends, decode, encode
assert not [name for name in backends() if name.startswith("native")]
weight = torch.eye(8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for _ in range(3):
        assert torch.equal(decode(encode(weight)), weight)
assert [str(w.message) for w in caught if "native extension" in str(w.message)] != []
assert len(caught) == 1, [str(w.message) for w in caught]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_kernels_and_the_format_agree_on_the_word(repository: Path) -> None:
    header = (repository / "endor/kernels/native/bitmap.h").read_text()
    assert f"constexpr int64_t kWordBits = {WORD_BITS};" in header

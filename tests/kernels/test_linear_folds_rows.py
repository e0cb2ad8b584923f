"""`F.linear` with a packed weight is one product over all rows of the input, however they lie in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import endor


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(48, 32, generator=generator)
    return torch.where(dense.abs() > 0.6, dense, torch.zeros(())).bfloat16()


def test_last_token_of_a_prompt_is_not_a_batched_product(weight: torch.Tensor) -> None:
    last = torch.randn(1, 8, 32).bfloat16()[:, -1:]
    packed = endor.encode(weight, values="raw", mask="bitmap")
    with torch.no_grad(), Recorder() as recorder:
        F.linear(last, packed)

    assert "bmm" not in recorder.names  # it would first copy the weight


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (2, 2, 3, 32), (0, 32), (2, 0, 32)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_any_number_of_leading_dimensions_works(
    weight: torch.Tensor, shape: tuple[int, ...], with_bias: bool
) -> None:
    x = torch.randn(shape).bfloat16()
    bias = torch.randn(48).bfloat16() if with_bias else None
    packed = endor.encode(weight, values="raw", mask="bitmap")

    assert torch.equal(F.linear(x, packed, bias), F.linear(x, weight.clone().requires_grad_(), bias))

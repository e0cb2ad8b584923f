"""Every kernel test runs once per backend and instruction set that this machine has for CPU tensors.

The kernels for GPUs have tests of their own: test_triton_*.py.
"""

from __future__ import annotations

import pytest

from endor.kernels import backends


@pytest.fixture(scope="session", params=[name for name in backends() if name != "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend of this machine."""
    name: str = request.param
    return name

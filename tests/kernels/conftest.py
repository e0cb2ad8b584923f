"""Every kernel test runs once per backend and instruction set that this machine has."""

from __future__ import annotations

import pytest

from endor.kernels import backends


@pytest.fixture(scope="session", params=backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend of this machine."""
    name: str = request.param
    return name

"""What every test can rely on: the shipped model and texts, no network, and a skip where a GPU is needed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before transformers is imported anywhere: no test may depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The first example of a property pays for imports, and a loaded machine for everything: no deadlines. The
# same examples in every run, so that a failure in CI is a failure at home.
settings.register_profile(
    "endor", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("endor")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Tests that do not ask for a GPU are of the CPU, which `auto` would not take where there is a GPU."""
    if "gpu" not in str(config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device, or not asked for: pytest -m gpu"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small trained checkpoint that ships; read-only."""
    return ROOT / "endor" / "assets" / "demo_model"


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """The calibration text that ships."""
    return ROOT / "endor" / "assets" / "calibration.txt"


@pytest.fixture(scope="session")
def held_out_text() -> Path:
    """Text that neither training nor calibration of the demo model ever saw."""
    return ROOT / "endor" / "assets" / "heldout.txt"

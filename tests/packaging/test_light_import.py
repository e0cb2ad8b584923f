"""`import endor` is light, and so are the lower packages: what is heavy comes with its first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("accelerate", "kvikio", "transformers", "triton")


def modules_after(statement: str) -> set[str]:
    """The top-level modules of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_endor_loads_no_third_party_package() -> None:
    """Under 0.15 s is only possible without torch, which alone takes a second; names are exported lazily."""
    assert not modules_after("import endor") & {*HEAVY, "torch", "numpy", "rich", "click", "safetensors"}


@pytest.mark.parametrize("package", ["endor.errors", "endor.formats", "endor.loaders", "endor.kernels"])
def test_lower_packages_load_no_model_library(package: str) -> None:
    assert not modules_after(f"import {package}") & set(HEAVY)


@pytest.mark.parametrize("module", ["endor.cli", "endor.cli.convert", "endor.cli.run"])
def test_help_needs_no_model_library(module: str) -> None:
    """`--help` and usage errors answer at once: commands import what they need when they run."""
    assert not modules_after(f"import {module}") & {*HEAVY, "torch"}


def test_version_is_a_plain_constant() -> None:
    import endor

    assert endor.__version__.count(".") == 2

"""Imports run one way only: a package may import what stands below it, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each package and what it may import besides itself; `endor.errors` imports nothing of ours.
ALLOWED: dict[str, frozenset[str]] = {
    "endor.errors": frozenset(),
    "endor.formats": frozenset({"endor.errors"}),
    "endor.loaders": frozenset({"endor.errors", "endor.formats"}),
    "endor.kernels": frozenset({"endor.errors", "endor.formats"}),
    "endor.pruning": frozenset({"endor.errors"}),
    "endor.models": frozenset({"endor.errors"}),
    "endor.checkpoint": frozenset({"endor.errors", "endor.formats", "endor.kernels"}),
    "endor.convert": frozenset(
        {
            "endor.errors",
            "endor.formats",
            "endor.kernels",
            "endor.pruning",
            "endor.checkpoint",
            "endor.models",
        }
    ),
    "endor.runtime": frozenset(
        {
            "endor.errors",
            "endor.formats",
            "endor.kernels",
            "endor.loaders",
            "endor.checkpoint",
            "endor.models",
        }
    ),
    "endor.integrations": frozenset(
        {
            "endor.errors",
            "endor.formats",
            "endor.kernels",
            "endor.loaders",
            "endor.checkpoint",
            "endor.models",
            "endor.runtime",
        }
    ),
}
# The command line and the top of the package see everything; scripts and tests are outside.
UNRESTRICTED = frozenset({"endor.cli", "endor"})
# The version is a constant that the top of the package has before anything else is imported.
CONSTANTS = frozenset({"endor.__version__"})


def module_name(path: Path, root: Path) -> str:
    """The import name of a source file: formats/x.py is endor.formats.x."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "endor" else ["endor", *parts])


def package_of(module: str) -> str:
    """`endor.formats.codecs.raw` belongs to `endor.formats`; `endor.__version__` to `endor`."""
    parts = module.split(".")
    name = ".".join(parts[:2])
    return name if name in ALLOWED or name in UNRESTRICTED else "endor"


def imported_names(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every absolute name an import statement of `source` reaches, with its line."""
    base = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [anchor, node.module]))
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def source_files(root: Path) -> list[Path]:
    """Our sources, each once: the links endor/formats and endor/loaders are not followed."""
    inside = [path for path in (root / "endor").rglob("*.py") if not {"formats", "loaders"} & set(path.parts)]
    return sorted(inside + [path for name in ("formats", "loaders") for path in (root / name).rglob("*.py")])


def violations(source: str, module: str, *, is_package: bool) -> list[str]:
    """The imports of one file that its package must not have."""
    package = package_of(module)
    if package in UNRESTRICTED:
        return []
    reached = {
        (line, package_of(name))
        for line, name in imported_names(source, module, is_package=is_package)
        if name.split(".")[0] == "endor" and name not in CONSTANTS
    }
    return [
        f"{module}:{line} imports {target}"
        for line, target in sorted(reached)
        if target != package and target not in ALLOWED[package]
    ]


def test_packages_import_only_what_stands_below_them(repository: Path) -> None:
    found = [
        violation
        for path in source_files(repository)
        for violation in violations(
            path.read_text(encoding="utf-8"),
            module_name(path, repository),
            is_package=path.name == "__init__.py",
        )
    ]
    assert not found, "\n".join(found)


def test_every_package_has_a_rule(repository: Path) -> None:
    folders = [path for path in (repository / "endor").iterdir() if (path / "__init__.py").exists()]
    packages = {f"endor.{path.name}" for path in folders}
    assert packages <= ALLOWED.keys() | UNRESTRICTED


def test_formats_and_loaders_use_no_model_library(repository: Path) -> None:
    """Bytes know nothing of models: transformers and accelerate stay out, even inside functions."""
    for folder in ("formats", "loaders"):
        for path in (repository / folder).rglob("*.py"):
            names = imported_names(
                path.read_text(encoding="utf-8"), module_name(path, repository), is_package=False
            )
            foreign = {name.split(".")[0] for _, name in names} & {"transformers", "accelerate", "triton"}
            assert not foreign, f"{path}: {foreign}"


@pytest.mark.parametrize(
    ("source", "module"),
    [
        pytest.param("import endor.runtime", "endor.formats.reader", id="absolute"),
        pytest.param("from endor.runtime import load", "endor.kernels.native", id="from"),
        pytest.param("from endor import convert", "endor.loaders.plan", id="package-from-top"),
        pytest.param("from ..loaders import plan", "endor.formats.reader", id="relative"),
        pytest.param("from .. import kernels", "endor.formats.reader", id="relative-package"),
        pytest.param(
            "def f():\n    from endor.cli import main", "endor.runtime.model", id="inside-a-function"
        ),
        pytest.param("from endor import load", "endor.convert.pipeline", id="top-of-package"),
    ],
)
def test_upward_import_is_found(source: str, module: str) -> None:
    assert violations(source, module, is_package=False)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        pytest.param("from endor.errors import FormatError", "endor.formats.reader", False, id="errors"),
        pytest.param("from endor import __version__", "endor.convert.pipeline", False, id="version"),
        pytest.param("from .layout import ALIGNMENT", "endor.formats.reader", False, id="sibling"),
        pytest.param("from .reader import Checkpoint", "endor.formats", True, id="inside-init"),
        pytest.param("from ..formats import layout", "endor.loaders.plan", False, id="downward-relative"),
        pytest.param("import torch", "endor.formats.reader", False, id="third-party"),
        pytest.param("from endor.runtime import load", "endor.cli.run", False, id="command-line"),
    ],
)
def test_downward_import_is_allowed(source: str, module: str, is_package: bool) -> None:
    assert not violations(source, module, is_package=is_package)

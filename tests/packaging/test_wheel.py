"""The wheel holds exactly the tree: nothing forgotten, nothing doubled through the links, no tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LINKS = {"endor/formats": "../formats", "endor/loaders": "../loaders"}
# What belongs into a wheel besides Python sources; C++ sources do not.
DATA_SUFFIXES = {".pyi", ".typed"}


def expected_files(root: Path) -> set[str]:
    """Our files under their import path."""
    folders = {"endor": root / "endor", "endor/formats": root / "formats", "endor/loaders": root / "loaders"}
    found = set()
    for prefix, folder in folders.items():
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if (
                not path.is_file()
                or "__pycache__" in inside.parts
                or (prefix == "endor" and is_linked(inside))
            ):
                continue
            if path.suffix in {".py", *DATA_SUFFIXES} or inside.parts[0] == "assets":
                found.add(f"{prefix}/{inside.as_posix()}")
    return found


def is_linked(inside: Path) -> bool:
    return inside.parts[0] in {"formats", "loaders"}


def copy_of_tree(root: Path, target: Path) -> Path:
    """The files a build reads; weights and sources are copied, caches and build results are not."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("endor", "formats", "loaders"):
        shutil.copytree(root / folder, target / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, target / name)
    return target


def build_wheel(source: Path, target: Path) -> Path:
    """Build without isolation or network; the C++ compiler is switched off, which the build must survive."""
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-q"]
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    done = subprocess.run(
        [*command, "-w", str(target)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("endor_offload-*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith(".so")}


def lose(root: Path, kind: str) -> None:
    """What a zip archive or a Windows checkout does to the links."""
    for link, target in LINKS.items():
        if kind != "kept":
            (root / link).unlink()
        if kind == "text":
            (root / link).write_text(target, encoding="utf-8")


@pytest.mark.parametrize("links", ["kept", "deleted", "text"])
def test_wheel_holds_exactly_the_tree_whatever_became_of_the_links(
    links: str, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    source = copy_of_tree(repository, tmp_path / "source")
    expected = expected_files(source)
    lose(source, links)
    assert files_of(build_wheel(source, tmp_path)) == expected
    assert {"endor/formats/__init__.py", "endor/assets/demo_model/model.safetensors"} <= expected


@pytest.mark.parametrize(("link", "target"), LINKS.items(), ids=["formats", "loaders"])
def test_links_of_a_bare_checkout_resolve(link: str, target: str, repository: Path) -> None:
    """A checkout without an installation, type checkers and editors find the packages through them."""
    path = repository / link
    assert path.is_symlink(), f"{link} is not a symbolic link: check it out again with core.symlinks=true"
    assert str(path.readlink()) == target
    assert (path / "__init__.py").is_file()


def test_both_names_are_one_module() -> None:
    """`endor.formats` comes from formats/, and nothing put a second copy under a top-level name."""
    import endor.formats
    import endor.loaders

    for module in (endor.formats, endor.loaders):
        assert module.__file__ is not None
        assert Path(module.__file__).resolve().parent.parent == Path(__file__).resolve().parents[2]
    assert not {"formats", "loaders"} & sys.modules.keys()

"""What pyproject.toml cannot say: which folders are which packages, and the optional native extension.

`formats/` and `loaders/` lie at the top of the repository and are imported as `endor.formats` and
`endor.loaders`. The package list is computed without following the links `endor/formats` and
`endor/loaders`, so that a checkout whose links were lost (a zip archive, Windows without developer mode)
builds the same wheel.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
MAPPED = {"endor.formats": "formats", "endor.loaders": "loaders"}


def packages() -> list[str]:
    """Every package under its import name."""
    linked = [pattern for name in MAPPED for pattern in (name, f"{name}.*")]
    found = find_packages(str(ROOT), include=["endor", "endor.*"], exclude=linked)
    for name, folder in MAPPED.items():
        found += [name, *(f"{name}.{inner}" for inner in find_packages(str(ROOT / folder)))]
    return found


def native_extension() -> list[Extension]:
    """`endor.kernels._native`, whatever sources endor/kernels/native holds.

    Code for one instruction set carries a target attribute and is chosen at run time: no -march here, one
    binary runs on every machine of an architecture. The limited API makes it serve every Python from 3.11 on.
    """
    native = Path("endor/kernels/native")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / native).glob("*.cpp"))
    if not sources:
        return []
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / native).glob("*.h*"))
    windows = sys.platform == "win32"
    return [
        Extension(
            "endor.kernels._native",
            sources,
            depends=headers,
            include_dirs=[str(native)],
            extra_compile_args=["/O2", "/std:c++17"] if windows else ["-O3", "-std=c++17", "-pthread"],
            extra_link_args=[] if windows else ["-pthread"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            # Without a compiler the package still installs and decodes with torch alone.
            optional=True,
        )
    ]


EXTENSIONS = native_extension()

setup(
    packages=packages(),
    package_dir=MAPPED,
    ext_modules=EXTENSIONS,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS else {},
)

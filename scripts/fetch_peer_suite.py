"""Fetch accelerate's own tests, which Endor's dispatch has to pass, into build/peer, if there is an index.

They are in accelerate's source distribution and not in its wheel. Without a package index the tests that run
them are skipped and say why.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "peer"
FILES = ("test_big_modeling.py", "test_modeling_utils.py", "test_offload.py", "test_hooks.py")
PARAMETERIZED = "parameterized==0.9.0"
"""What the tests import beside pytest."""


def suite_directory() -> Path:
    """Where the tests of the installed accelerate are, once they are fetched."""
    return CACHE / f"accelerate-{version('accelerate')}"


def pip(*words: str) -> None:
    """Run pip quietly and without patience."""
    options = ("--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "10")
    subprocess.run(
        [sys.executable, "-m", "pip", words[0], *options, *words[1:]],
        check=True,
        capture_output=True,
        text=True,
        timeout=180,
    )


def fetch() -> Path:
    """Download what is missing; the directory appears when it is complete."""
    target = suite_directory()
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        part = Path(scratch) / "part"
        (part / "tests").mkdir(parents=True)
        name = f"accelerate=={version('accelerate')}"
        pip("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", scratch, name)
        pip("install", "--no-deps", "--target", str(part / "packages"), PARAMETERIZED)
        (archive,) = Path(scratch).glob("accelerate-*.tar.gz")
        with tarfile.open(archive) as opened:
            for member in opened.getmembers():
                path = Path(member.name)
                if path.parent.name == "tests" and path.name in FILES:
                    source = opened.extractfile(member)
                    assert source is not None
                    (part / "tests" / path.name).write_bytes(source.read())
        shutil.move(part, target)
    return target


def main() -> int:
    """Exit status 0 in any case: without the suite its tests are skipped."""
    reason = CACHE / "unavailable.txt"
    try:
        fetch()
        reason.unlink(missing_ok=True)
    except (subprocess.SubprocessError, OSError, ValueError, tarfile.TarError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        why = (said.strip().splitlines() or [type(error).__name__])[-1]
        CACHE.mkdir(parents=True, exist_ok=True)
        reason.write_text(why, encoding="utf-8")
        print(f"Note: accelerate's own tests could not be fetched: {why}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

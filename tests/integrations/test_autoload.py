"""transformers knows Endor whatever is imported first, and neither it nor torch can fail because of Endor."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.models import tiny_llama, write_endor_checkpoint

GROUP = "torch.backends"
ENTRY = {"endor": "endor.integrations.autoload:install"}
LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj.weight).__name__)
"""
KNOWS = """
import transformers.modeling_utils
from transformers.quantizers import auto
print("endor" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and "endor" in auto.AUTO_QUANTIZER_MAPPING)
"""
NO_PLUGINS = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # an Endor that is installed here must not help


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endor_checkpoint(tiny_llama(layers=1), tmp_path_factory.mktemp("autoload"))


def run(code: str, *arguments: object, path: list[Path], **environment: str) -> str:
    """What a fresh interpreter prints; warnings are errors in it."""
    joined = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": joined, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata that an installed Endor has, whatever is installed here."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "endor_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: endor-probe\nVersion: 1.0\n")
    points = "".join(f"{name} = {target}\n" for name, target in ENTRY.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}")
    return folder


@pytest.mark.parametrize(
    "first",
    [
        "import endor",
        "import transformers; import endor",
        "import transformers.quantizers.auto; import endor",
        "import endor.integrations.transformers",
    ],
)
def test_transformers_knows_endor_whichever_is_imported_first(first: str, repository: Path) -> None:
    assert run(first + KNOWS, path=[repository], **NO_PLUGINS) == "True"


@pytest.mark.parametrize("first", ["", "import torch", "import transformers.quantizers.auto"])
def test_installed_endor_is_known_without_being_imported(
    first: str, repository: Path, installed: Path
) -> None:
    assert run(first + KNOWS, path=[repository, installed]) == "True"


def test_checkpoint_loads_after_import_endor(checkpoint: Path, repository: Path) -> None:
    assert run("import endor" + LOAD, checkpoint, path=[repository], **NO_PLUGINS) == "BitmapTensor"


def test_checkpoint_loads_without_import_endor_where_it_is_installed(
    checkpoint: Path, repository: Path, installed: Path
) -> None:
    assert run(LOAD, checkpoint, path=[repository, installed]) == "BitmapTensor"


def test_entry_point_is_declared(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {GROUP: ENTRY}


def test_torch_brings_nothing_of_endor_but_the_hook(repository: Path, installed: Path) -> None:
    code = """
import sys, torch
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("endor", "transformers")))
"""
    expected = "endor endor.integrations endor.integrations.autoload"
    assert run(code, path=[repository, installed]) == expected


def test_hook_leaves_no_trace_on_the_module_it_waited_for(repository: Path) -> None:
    code = """
import endor, inspect
import transformers.quantizers.auto as auto
assert type(auto.__spec__.loader) is type(auto.__loader__) is type(endor.__loader__)
assert "def get_hf_quantizer" in inspect.getsource(auto)
assert list(auto.AUTO_QUANTIZER_MAPPING).count("endor") == 1
endor.integrations.autoload.install()
print("ok")
"""
    assert run(code, path=[repository], **NO_PLUGINS) == "ok"


def test_transformers_imports_with_a_warning_where_endor_cannot_register(repository: Path) -> None:
    code = """
import sys, warnings
import endor
sys.modules["endor.errors"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto as auto
assert "endor" not in auto.AUTO_QUANTIZER_MAPPING
print(*(str(warning.message) for warning in caught))
"""
    printed = run(code, path=[repository], **NO_PLUGINS)
    assert "Endor cannot register" in printed
    assert "endor.load" in printed

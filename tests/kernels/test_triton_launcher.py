"""A kernel that is launched again gets the arguments Triton would give it, and is compiled again if need be.

There is no GPU in these tests: kernels are compiled for one, and what would start them is recorded. In a
process of their own, because Triton must not be interpreted here and is told of a driver that there is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDriver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


calls, looked_up = [], [0]

def start(x, y, z, stream, function, metadata, launch, enter, leave, *arguments):
    shown = [a.data_ptr() if isinstance(a, torch.Tensor) else str(a) for a in arguments]
    calls.append([x, y, z, stream, shown])

def no_handles(kernel):
    kernel._run, kernel.function = start, 1

def counted(self, *args, run=JITFunction.run, **kwargs):
    looked_up[0] += 1
    return run(self, *args, **kwargs)

driver.set_active(NoDriver())
CompiledKernel._init_handles = no_handles
JITFunction.run = counted

from endor.kernels import encode, triton_launch, triton_matmul
from endor.kernels.triton_operand import operand_of

weight = torch.where(torch.rand(8, 512) < 0.5, torch.randn(8, 512), 0.0).bfloat16()
packed = encode(weight, values="exponent", backend="reference")
operand = operand_of(packed)
product = operand.product = triton_matmul._Product(operand)
product.possible = True  # as on a GPU
triton_matmul.set_tuning(allowed=False)
out, status = torch.empty_like(weight), triton_launch.new_status(torch.device("cpu"))
memory = torch.ones(520, dtype=torch.bfloat16)
group = triton_launch.DecodeGroup([(packed, out)])
y = torch.empty(1, 8, dtype=torch.bfloat16)
tile = triton_matmul.tiles(1)[0]

def multiply(x, bias=None):
    triton_matmul._launch(x, product, bias, y, x_rows=1, status=status, tile=tile)

runs = {
    "decode": lambda: triton_launch.launch_decode(packed, 0, 2, out, status),
    "decode other blocks": lambda: triton_launch.launch_decode(packed, 1, 2, out, status),
    "group": group.launch,
    "product": lambda: multiply(memory[:512].view(1, 512)),
    "product of other x": lambda: multiply(memory[8:].view(1, 512)),
    "product of unaligned x": lambda: multiply(memory[1:513].view(1, 512)),
    "product with bias": lambda: multiply(memory[:512].view(1, 512), memory[:8]),
}
report = {}
for name, run in runs.items():
    calls.clear()
    looked_up[0] = 0
    run()
    run()
    report[name] = {"calls": list(calls), "looked_up": looked_up[0]}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What started kernels, twice each; and how often Triton looked at the arguments."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["decode", "decode other blocks", "group", "product", "product with bias"])
def test_the_second_launch_passes_what_triton_passed_in_the_first(
    name: str, report: dict[str, dict[str, object]]
) -> None:
    calls = report[name]["calls"]
    assert isinstance(calls, list)
    first, second = calls
    assert first == second
    assert first[3] == 7


@pytest.mark.parametrize(("name", "times"), [("decode", 1), ("decode other blocks", 0), ("group", 1)])
def test_triton_looks_at_the_arguments_of_a_decode_once(
    name: str, times: int, report: dict[str, dict[str, object]]
) -> None:
    assert report[name]["looked_up"] == times


def test_triton_looks_again_only_where_another_kernel_may_be_needed(
    report: dict[str, dict[str, object]],
) -> None:
    """The one that is compiled for aligned addresses reads 16 bytes at once."""
    assert report["product"]["looked_up"] == 1
    assert report["product of other x"]["looked_up"] == 0
    assert report["product of unaligned x"]["looked_up"] == 2
    assert report["product with bias"]["looked_up"] == 1


def test_what_changes_between_launches_is_passed_on(report: dict[str, dict[str, object]]) -> None:
    def arguments(name: str) -> list[object]:
        calls = report[name]["calls"]
        assert isinstance(calls, list)
        shown: list[object] = calls[1][4]
        return shown

    assert arguments("decode") != arguments("decode other blocks")
    x, other = arguments("product")[0], arguments("product of other x")[0]
    assert isinstance(x, int)
    assert other == x + 16

"""Any number of threads gives the same bits, called from several at once, after a fork, without the GIL."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from endor.kernels import backends, decode, encode
from endor.kernels.openmp import parallel_address
from tests.support.bits import assert_bitwise_equal
from tests.support.kernels import random_bits

NATIVE = backends()[0]
needs_native = pytest.mark.skipif(NATIVE == "reference", reason="the native extension is not built")
SHAPE = (512, 4096)  # many chunks for each thread


@pytest.fixture(params=["openmp", "own"])
def team(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kinds of threads: those of torch's OpenMP runtime, and our own."""
    native = importlib.import_module("endor.kernels._native")
    address = parallel_address()
    if request.param == "openmp" and address == 0:
        pytest.skip("torch is not built on an OpenMP runtime that can be shared")
    native.set_openmp(address if request.param == "openmp" else 0)
    yield request.param
    native.set_openmp(address)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_native
def test_any_number_of_threads_gives_the_same_bits(team: str, threads: int) -> None:
    weight = random_bits(SHAPE, torch.bfloat16, 0.5)
    expected = encode(weight, backend="reference")
    for _ in range(5):
        packed = encode(weight, backend=NATIVE)
        for name, section in expected.sections.items():
            assert_bitwise_equal(packed.sections[name], section)
        assert_bitwise_equal(decode(packed, backend=NATIVE), weight)


@needs_native
def test_several_python_threads_at_once(team: str) -> None:
    weights = [random_bits(SHAPE, torch.bfloat16, 0.5, seed=seed) for seed in range(4)]

    def round_trips(weight: torch.Tensor) -> None:
        for _ in range(10):
            assert_bitwise_equal(decode(encode(weight, backend=NATIVE), backend=NATIVE), weight)

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(round_trips, weights))


FORK = """
import os, signal, torch
import endor.kernels._native as native
from endor.kernels import decode, encode
if {own_threads}:
    native.set_openmp(0)
torch.set_num_threads(2)
weight = torch.randn(512, 4096)
packed = encode(weight)
assert torch.equal(decode(packed), weight)
child = os.fork()
if child == 0:
    signal.alarm(60)
    # Not torch.equal: torch's own parallel operators hang in a forked child.
    os._exit(0 if (decode(encode(weight)).numpy() == weight.numpy()).all() else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(decode(packed), weight)
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("own_threads", [False, True], ids=["openmp", "own"])
def test_a_forked_child_can_encode_and_decode(own_threads: bool) -> None:
    program = FORK.format(own_threads=own_threads)
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


@needs_native
def test_other_python_threads_run_during_a_call() -> None:
    packed = encode(random_bits((4096, 8192), torch.float32, 0.5))
    out = torch.empty(4096, 8192)

    def overlaps() -> bool:
        started, finished = threading.Event(), []

        def work() -> None:
            started.set()
            decode(packed, out=out, backend="native-scalar")
            finished.append(time.perf_counter())

        worker = threading.Thread(target=work)
        worker.start()
        started.wait()
        seen = time.perf_counter()
        worker.join()
        return finished[0] - seen > 0.005

    # A busy machine may not run this thread in time; holding the GIL would fail every time.
    assert any(overlaps() for _ in range(20))

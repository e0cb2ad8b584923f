"""Run accelerate's own tests, against accelerate itself or with another module's functions in their place.

    python runner.py --tests DIR --device cpu --out accelerate.json
    python runner.py --tests DIR --device fakedev --impl endor.integrations.accelerate --out endor.json

The public names of the module are bound wherever accelerate and transformers have theirs, before the tests
are collected; so both what the tests import and what accelerate calls itself reach the replacement. Calls are
counted, so that a run that tested nothing can be told.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

FILES = ("test_big_modeling.py", "test_modeling_utils.py", "test_offload.py", "test_hooks.py")
FAKEDEV = Path(__file__).parent / "fakedev"

CALLS: Counter[str] = Counter()


def use_fake_accelerator() -> None:
    """Make accelerate's test helpers believe in two accelerators."""
    importlib.import_module("fakedev")
    import torch
    from accelerate import test_utils
    from accelerate.state import PartialState
    from accelerate.test_utils import testing

    fakedev: Any = vars(torch)["fakedev"]
    for module in (testing, test_utils):
        vars(module).update(
            torch_device="fakedev",
            device_count=2,
            memory_allocated_func=fakedev.memory_allocated,
            require_cuda_or_xpu=lambda test: test,
            require_multi_gpu_or_xpu=lambda test: test,
        )
    PartialState.default_device = property(lambda _: torch.device("fakedev:0"))
    module_class: Any = torch.nn.Module
    module_class.to = _keeping_ties(module_class.to)


def _keeping_ties(to: Any) -> Any:
    """`Module.to` makes new parameters for a device of this kind and so unties them; for CUDA it does not."""
    from accelerate.utils.modeling import find_tied_parameters, retie_parameters

    @functools.wraps(to)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        tied = find_tied_parameters(self)
        moved = to(self, *args, **kwargs)
        retie_parameters(self, tied)
        return moved

    return wrapper


def replace(implementation: str) -> dict[str, int]:
    """Bind the module's names in place of accelerate's; how many places each was bound in."""
    impl = importlib.import_module(implementation)
    users = [
        module
        for name, module in sys.modules.items()
        if name.split(".")[0] == "accelerate" or name == "transformers.integrations.accelerate"
    ]
    places: dict[str, int] = {}
    for name in impl.__all__:
        originals = {id(vars(module)[name]) for module in users if name in vars(module)}
        if originals:
            places[name] = _bind(users, originals, _counted(name, getattr(impl, name)))
    return places


def _bind(users: list[types.ModuleType], originals: set[int], value: Any) -> int:
    bound = 0
    for module in users:
        for key, found in list(vars(module).items()):
            if id(found) in originals:
                setattr(module, key, value)
                bound += 1
    return bound


def _counted(name: str, value: Any) -> Any:
    """A function or class whose uses are counted; a class stays the class it is."""
    function = value.__init__ if inspect.isclass(value) else value
    if not isinstance(function, types.FunctionType):
        return value

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return function(*args, **kwargs)

    if not inspect.isclass(value):
        return wrapper
    type.__setattr__(value, "__init__", wrapper)
    return value


class Recorder:
    """A pytest plugin that keeps each test's outcome."""

    def __init__(self, *, fake: bool) -> None:
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self._fake = fake

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module for item in items} if self._fake else ():
            if module.__name__.endswith("test_hooks"):
                module.is_xpu_available = lambda: True  # two tests skip themselves by it

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("/")[-1]
            self.outcomes[name] = report.outcome
            if report.outcome == "failed":
                self.messages[name] = str(report.longrepr).strip().splitlines()[-1][:300]


def main() -> int:
    """Exit status 0 when the tests could be run, whatever came of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "fakedev"], required=True)
    parser.add_argument("--impl", default="")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import accelerate.big_modeling
    import accelerate.hooks
    import accelerate.utils.modeling
    import accelerate.utils.offload  # noqa: F401
    import pytest
    import transformers.integrations.accelerate  # noqa: F401  # has its own binding of dispatch_model

    if arguments.device == "fakedev":
        use_fake_accelerator()
    places = replace(arguments.impl) if arguments.impl else {}
    recorder = Recorder(fake=arguments.device == "fakedev")
    options = [
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(arguments.tests),
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    code = pytest.main(
        [*options, "--tb=short", *(str(arguments.tests / name) for name in FILES)], plugins=[recorder]
    )
    report = {
        "outcomes": recorder.outcomes,
        "messages": recorder.messages,
        "calls": dict(CALLS),
        "places": places,
    }
    arguments.out.write_text(json.dumps(report), encoding="utf-8")
    return 0 if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else int(code)


if __name__ == "__main__":
    sys.exit(main())

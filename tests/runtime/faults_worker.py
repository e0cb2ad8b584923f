"""Makes faults happen to models that stream, one scenario after the other, and says what came of each.

Usage: faults_worker.py FOLDER; one JSON object per scenario on standard output. Run by
test_streaming_faults.py with the shim of tests/loaders/faults/preload.c in front of the C library.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import endor
from endor.errors import EndorError
from endor.loaders import drop_from_page_cache
from endor.runtime import runtime_of
from tests.support.models import tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7]])
BROKEN_BLOCK = "model.layers.3"

Outcome = dict[str, Any]
Scenario = Callable[["Scene"], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def tokens(model: Any) -> list[int]:
    with torch.inference_mode():
        made = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return [int(token) for token in made[0]]


class Scene:
    """A checkpoint of its own, and what happened to the models loaded from it."""

    def __init__(self, checkpoint: Path, expected: list[int]) -> None:
        self.checkpoint = checkpoint
        self.expected = expected
        self.outcome: Outcome = {"errors": [], "again": [], "leases": 0}
        with endor.open(checkpoint) as opened:
            homes = {home.block.name: home for home in opened.blocks}
        home = homes[BROKEN_BLOCK]
        self.shard, self.offset, self.nbytes = home.file, home.offset, home.nbytes

    def load(self, **options: Any) -> Any:
        options.setdefault("host_memory", 0)
        return endor.load(self.checkpoint, **options)

    def fails(self, action: Callable[[], object]) -> None:
        """Note the error with which `action` ends."""
        try:
            action()
        except (EndorError, RuntimeError, KeyboardInterrupt) as error:
            kind = type(error)
            self.outcome["errors"].append(
                {
                    "type": kind.__name__,
                    "typed": isinstance(error, EndorError),
                    "message": str(error),
                    "notes": getattr(error, "__notes__", []),
                    "errno": getattr(error, "errno", None),
                }
            )
            del error
        else:
            self.outcome["errors"].append(None)

    def works(self, model: Any) -> None:
        """Note whether the model makes the tokens it should, and holds nothing between two calls."""
        try:
            self.outcome["again"].append(tokens(model) == self.expected)
        except EndorError as error:
            self.outcome["again"].append(str(error))
        if threading.current_thread() is threading.main_thread():  # else it may be another thread's turn
            self.outcome["leases"] += len(runtime_of(model)._leases)

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """Reads of the broken block's shard fail meanwhile."""
        beside = self.shard.with_name(self.shard.name + ".fault")
        beside.write_text(name)
        try:
            yield
        finally:
            beside.unlink()


@scenario
def bad_sector(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    with scene.fault(f"eio@{scene.offset + 5000}"):
        scene.fails(lambda: tokens(model))
        scene.fails(lambda: tokens(model))
    scene.works(model)


@scenario
def bad_sector_while_resident_blocks_are_read(scene: Scene) -> None:
    with scene.fault(f"eio@{scene.offset + 5000}"):
        scene.fails(lambda: scene.load(host_memory=1 << 30))


@scenario
def short_reads(scene: Scene) -> None:
    with scene.fault("short"):
        model = scene.load()
        scene.works(model)


@scenario
def truncated_while_running(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    content = scene.shard.read_bytes()
    os.truncate(scene.shard, scene.offset + 100)
    scene.fails(lambda: tokens(model))
    scene.shard.write_bytes(content)
    scene.fails(lambda: tokens(model))


@scenario
def replaced_while_running(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    other = scene.shard.with_suffix(".new")
    shutil.copyfile(scene.shard, other)
    other.rename(scene.shard)
    scene.fails(lambda: tokens(model))
    scene.fails(lambda: tokens(model))


@scenario
def damaged_before_the_first_read(scene: Scene) -> None:
    model = scene.load()
    with flipped(scene):
        scene.fails(lambda: tokens(model))
    scene.works(model)


@scenario
def damaged_after_the_first_read(scene: Scene) -> None:
    model = scene.load(verify="always")
    scene.works(model)
    with flipped(scene):
        scene.fails(lambda: tokens(model))
    scene.works(model)


@contextmanager
def flipped(scene: Scene) -> Iterator[None]:
    """One bit in the middle of the block is wrong, and the file's time does not tell."""
    status = scene.shard.stat()
    times = (status.st_atime_ns, status.st_mtime_ns)
    content = scene.shard.read_bytes()
    wrong = bytearray(content)
    wrong[scene.offset + scene.nbytes // 2] ^= 4
    for version in (bytes(wrong), content):
        with scene.shard.open("r+b") as file:
            file.write(version)
        os.utime(scene.shard, ns=times)
        if version is not content:
            yield


@scenario
def disk_that_dies(scene: Scene) -> None:
    """A file system on a file that is cut short: a real error of a block device, for root only."""
    with loop_device(scene.checkpoint.with_name("loop")) as mounted:
        if mounted is None:
            scene.outcome["skipped"] = "a loop device cannot be mounted"
            return
        folder, backing = mounted
        copy = Scene(Path(shutil.copytree(scene.checkpoint, folder / "model")), scene.expected)
        copy.outcome = scene.outcome
        model = copy.load()
        copy.works(model)
        for path in copy.checkpoint.iterdir():
            drop_from_page_cache(path)
        os.truncate(backing, 1 << 20)
        copy.fails(lambda: tokens(model))
        scene.outcome["disk"] = str(copy.checkpoint)
        runtime_of(model).close()
        scene.outcome["left on it"] = sorted(
            held(copy.checkpoint) - {p.name for p in copy.checkpoint.iterdir()}
        )


@contextmanager
def loop_device(base: Path) -> Iterator[tuple[Path, Path] | None]:
    """A folder on a block device, and the device's backing file."""
    folder, backing = base / "disk", base / "disk.img"
    folder.mkdir(parents=True)
    with backing.open("wb") as disk:
        disk.truncate(16 << 20)
    try:
        for command in (
            ["mkfs.ext4", "-q", "-O", "^has_journal", str(backing)],
            ["mount", "-o", "loop", str(backing), str(folder)],
        ):
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder, backing
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@scenario
def permission_lost(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    for folder in scene.shard.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(0o755)
    scene.shard.chmod(0)
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
        scene.works(model)  # what is open stays open
        scene.fails(scene.load)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        scene.shard.chmod(0o644)


@scenario
def no_memory_for_the_arena(scene: Scene) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 20), hard))
    try:
        scene.fails(lambda: scene.load(host_memory=1 << 30))
        scene.fails(scene.load)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@scenario
def exception_in_a_layer(scene: Scene) -> None:
    model = scene.load()

    def explode(*_: object) -> None:
        raise RuntimeError("a layer of the test's")

    for layer in (0, 2, 4):
        handle = model.model.layers[layer].mlp.register_forward_hook(explode)
        scene.fails(lambda: tokens(model))
        handle.remove()
        scene.works(model)


@scenario
def ctrl_c_in_generation(scene: Scene) -> None:
    model = scene.load()
    began = time.perf_counter()
    scene.works(model)
    whole_s = time.perf_counter() - began
    for number in range(10):
        delay_s = random.Random(number).uniform(0.1, 0.9) * whole_s
        timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        scene.fails(lambda: [tokens(model) for _ in range(50)])
        timer.join()
    scene.works(model)


@scenario
def ctrl_c_while_the_disk_is_slow(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    with scene.fault("slow"):
        for delay_s in (0.03, 0.12):
            timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            scene.fails(lambda: [tokens(model) for _ in range(50)])
            timer.join()
    scene.works(model)


@scenario
def used_in_a_forked_process(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        signal.alarm(20)  # a hang is a failure, not one of the whole test
        try:
            tokens(model)
            said = "it worked"
        except (EndorError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
        os.write(sender, said.encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        scene.outcome["child"] = pipe.read().decode()
    os.waitpid(child, 0)
    scene.works(model)


@scenario
def fault_while_two_threads_use_the_model(scene: Scene) -> None:
    model = scene.load()
    scene.works(model)
    with scene.fault(f"eio@{scene.offset + 5000}"):
        in_threads([lambda: scene.fails(lambda: tokens(model))] * 2)
    in_threads([lambda: scene.works(model)] * 2)
    scene.works(model)


@scenario
def two_models_share_a_checkpoint(scene: Scene) -> None:
    first, second = scene.load(), scene.load(depth=1)
    in_threads([lambda: scene.works(first), lambda: scene.works(second)])
    with scene.fault(f"eio@{scene.offset + 5000}"):
        scene.fails(lambda: tokens(first))
        scene.fails(lambda: tokens(second))
    scene.works(second)
    runtime_of(first).close()
    scene.works(second)


def in_threads(actions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def held(folder: Path) -> set[str]:
    """Threads of ours, descriptors of the checkpoint, and files that were not in it."""
    found = {thread.name for thread in threading.enumerate() if thread.name.startswith("endor-")}
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        found |= {f"{link.name} -> {target}"} if target.startswith(str(folder)) else set()
    return found | {path.name for path in folder.iterdir()}


def play(name: str, base: Path, expected: list[int]) -> Outcome:
    checkpoint = base.with_name(name)
    shutil.copytree(base, checkpoint)
    before = held(checkpoint)
    scene = Scene(checkpoint, expected)
    SCENARIOS[name](scene)
    gc.collect()
    scene.outcome["left"] = sorted(held(checkpoint) - before)
    with scene_restored(base, checkpoint):
        scene.outcome["fresh"] = tokens(endor.load(checkpoint, host_memory=0)) == expected
    gc.collect()
    return scene.outcome | {
        "shard": str(scene.shard),
        "begin": scene.offset,
        "end": scene.offset + scene.nbytes,
        "left": scene.outcome["left"] + sorted(held(checkpoint) - before),
    }


@contextmanager
def scene_restored(base: Path, checkpoint: Path) -> Iterator[None]:
    for path in base.iterdir():
        if (checkpoint / path.name).read_bytes() != path.read_bytes():
            shutil.copyfile(path, checkpoint / path.name)
    yield


def main(folder: Path) -> None:
    warnings.simplefilter("error", ResourceWarning)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    base = write_endor_checkpoint(tiny_llama(), folder / "base")
    expected = tokens(endor.load(base))
    for name in SCENARIOS:
        sys.stdout.write(json.dumps({"scenario": name, **play(name, base, expected)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

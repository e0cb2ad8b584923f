"""How much memory it takes to load and run a model from disk: not that of its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, WIDTH = 48, 1024
MODEL_BYTES = LAYERS * WIDTH * WIDTH * 4  # 192 MiB
BLOCKS_BYTES = 92 << 20
"""Three blocks of 16 MiB and more, and room for what glibc keeps."""

SCRIPT = """
import json, sys, threading, time, torch
from torch import nn
from endor.integrations.accelerate import init_empty_weights, load_checkpoint_and_dispatch
from endor.runtime.filemap import MappedFile

MappedFile.cached_fraction = lambda *_: 0.0  # as if nothing were in the page cache

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

layers, width = int(sys.argv[3]), int(sys.argv[4])
with init_empty_weights():
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).eval()
x = torch.ones(1, width)
torch.nn.functional.linear(x, torch.ones(width, width))
before = peak = anonymous_bytes()
done = False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
load_checkpoint_and_dispatch(model, sys.argv[1], {"": "disk"}, offload_folder=sys.argv[2])
with torch.no_grad():
    for _ in range(2):
        output = model(x)
done = True
watcher.join()
print(json.dumps({"grown_bytes": peak - before, "output": output.sum().item()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the measure is Linux's")
def test_loading_and_running_from_disk_takes_blocks_not_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"{number}.weight": torch.randn(WIDTH, WIDTH) / 32 for number in range(LAYERS)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = [tmp_path / "model.safetensors", tmp_path / "offload", LAYERS, WIDTH]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    x = torch.ones(1, WIDTH)
    for weight in weights.values():
        x = torch.nn.functional.linear(x, weight)
    assert found["output"] == pytest.approx(x.sum().item(), rel=1e-3)
    assert found["grown_bytes"] < BLOCKS_BYTES < MODEL_BYTES / 2, found
    assert [path.name for path in (tmp_path / "offload").iterdir()] == ["index.json"]

"""Measures the converter: MB/s of source and peak memory, on a random 1.1 B Llama in bf16 from a warm page
cache.

    python scripts/bench_convert.py --model DIR

DIR gets the model on the first run and is used again afterwards. Every conversion runs in a fresh process,
whose peak resident memory (VmHWM) and anonymous memory (RssAnon, sampled) are compared with the converter's
default bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys, threading, endor
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
peak, done = 0, threading.Event()
def sample():
    global peak
    while not done.wait(0.01):
        peak = max(peak, status("RssAnon"))
sampler = threading.Thread(target=sample)
sampler.start()
report = endor.convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
done.set()
sampler.join()
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime
print(json.dumps({**report.to_json(), "peak": status("VmHWM"), "peak_anonymous": peak, "cpu": cpu}))
"""


def build_model(directory: Path, *, layers: int) -> None:
    """A random Llama, 1.1 B parameters with 22 layers, in shards of 500 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="500MB")


def warm(directory: Path) -> int:
    """Read every weight file once; returns their bytes."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                total += len(chunk)
    return total


def measure(model: Path, out: Path, options: dict[str, object]) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, str(model), str(out), json.dumps(options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="kept between runs; default: a temporary directory")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--options", type=json.loads, default={"method": "magnitude"}, help="of endor.convert, as JSON"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endor-bench-") as scratch:
        model = arguments.model or Path(scratch) / "model"
        if not (model / "config.json").exists():
            build_model(model, layers=arguments.layers)
        nbytes = warm(model)
        results = [measure(model, Path(scratch) / "out", arguments.options) for _ in range(arguments.runs)]
    report(nbytes, results)


def report(nbytes: int, results: list[dict[str, float]]) -> None:
    """Print a line per run and the median; the rate counts everything from the first look to the last
    write."""
    for r in results:
        print(
            f"{r['source_bytes'] / r['seconds'] / 1e6:7.0f} MB/s  {r['seconds']:6.2f} s, {r['cpu']:.2f} s "
            "of CPU  "
            f"{r['bits_per_weight']:.2f} b/w  sparsity {r['sparsity']:.4f}  output "
            f"{r['output_bytes'] / 1e9:.2f} GB  "
            f"peak {r['peak'] / 2**20:.0f} MiB ({r['peak_anonymous'] / 2**20:.0f} MiB anonymous)"
        )
    rate = statistics.median(r["source_bytes"] / r["seconds"] for r in results)
    print(
        f"median {rate / 1e6:.0f} MB/s of {nbytes / 1e9:.2f} GB on {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()

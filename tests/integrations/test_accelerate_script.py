"""A program written for accelerate, with one import changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import transformers

SCRIPT = """
import sys, torch, transformers
from {package} import disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
source, folder = sys.argv[1], sys.argv[2]
prompt = torch.arange(1, 9)[None]

def show(model):
    print(model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist())

load = transformers.AutoModelForCausalLM.from_pretrained
show(disk_offload(load(source), folder + "/a"))
device_map = {{f"model.layers.{{n}}": "disk" if n % 2 else "cpu" for n in range(3)}}
device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
show(dispatch_model(load(source), device_map, offload_dir=folder + "/b"))
with init_empty_weights():
    config = transformers.AutoConfig.from_pretrained(source)
    empty = transformers.AutoModelForCausalLM.from_config(config).eval()
empty.tie_weights()
show(load_checkpoint_and_dispatch(empty, source, device_map=device_map, offload_folder=folder + "/c"))
"""


def test_a_script_for_accelerate_runs_unchanged_but_for_the_import(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="600KB")
    said = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT.format(package=package), tmp_path / "model", tmp_path / package],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for package in ("accelerate", "endor")
    ]
    assert said[0] == said[1]
    assert said[0].count("\n") == 3

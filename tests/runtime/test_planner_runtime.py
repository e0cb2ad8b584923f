"""What is planned is what loading does: placement, memory by part, bytes per token; never more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import endor
from endor.errors import PlanError
from endor.loaders import BlockingAccelerator
from endor.runtime import runtime_of
from endor.runtime.planner import Budgets, Plan, Rates, decide, plan
from endor.runtime.survey import context_sizes, keeps_latent, survey
from endor.runtime.work import measure_work
from tests.support.models import tiny_llama, write_endor_checkpoint

RATES = Rates(disk_bytes_per_s=2e9, work_bytes_per_s=8e9)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planner") / "endor"
    return write_endor_checkpoint(tiny_llama(tied=request.param), folder)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("moe")
    config = transformers.Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=300,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base / "dense")
    endor.convert(base / "dense", base / "endor", method="magnitude", sparsity=0.5)
    return base / "endor"


def planned(directory: Path, host_memory: int, *, depth: int = 2, matmul: str = "auto") -> Plan:
    sizes = survey(directory, dtype=None, matmul=matmul).sizes
    return plan(sizes, Budgets(host_memory), RATES, depth=depth)


def assert_same_memory(found: Plan, model: Any) -> None:
    runtime, memory = runtime_of(model), found.decision.memory
    assert found.decision.placement == runtime.placement
    assert memory.ring + memory.experts == runtime.ring_bytes
    assert memory.resident == runtime.resident_bytes
    assert memory.scratch == runtime.scratch_bytes
    assert memory.dense == runtime.dense_bytes


@pytest.mark.parametrize("matmul", ["auto", "decode"])
@pytest.mark.parametrize("host_memory", [0, 41_000, 90_000, 1 << 30])
@pytest.mark.parametrize("depth", [0, 2])
def test_memory_and_bytes_are_those_of_the_runtime(
    checkpoint: Path, host_memory: int, depth: int, matmul: str
) -> None:
    found = planned(checkpoint, host_memory, depth=depth, matmul=matmul)
    model = endor.load(checkpoint, host_memory=host_memory, depth=depth, matmul=matmul)
    assert_same_memory(found, model)
    with torch.inference_mode():
        before = runtime_of(model).stats()
        model(torch.tensor([[7]]))
        moved = runtime_of(model).stats() - before
    assert (moved.disk_bytes, moved.host_bytes) == (found.traffic.disk, found.traffic.host)
    runtime_of(model).close()


@pytest.mark.parametrize("host_memory", [0, 60_000, 200_000, 400_000, 1 << 30])
def test_memory_of_experts_is_that_of_the_runtime(moe: Path, host_memory: int) -> None:
    found, model = planned(moe, host_memory), endor.load(moe, host_memory=host_memory)
    assert_same_memory(found, model)
    runtime_of(model).close()


def test_routed_experts_are_what_a_token_moves(moe: Path) -> None:
    found, model = planned(moe, 0), endor.load(moe, host_memory=0)
    with torch.inference_mode():
        model(torch.tensor([[7]]))
        before = runtime_of(model).stats()
        model(torch.tensor([[8]]))
        moved = runtime_of(model).stats() - before
    assert moved.disk_bytes + moved.host_bytes == pytest.approx(
        found.traffic.disk, rel=0.05
    )  # a few may be hit
    runtime_of(model).close()


@pytest.mark.parametrize("device_memory", [0, 60_000, 200_000, 1 << 30])
@pytest.mark.parametrize("host_memory", [0, 1 << 30])
def test_memory_of_experts_on_a_device_is_that_of_the_runtime(
    moe: Path, host_memory: int, device_memory: int
) -> None:
    sizes = survey(moe, dtype=None, matmul="auto", own_memory=True).sizes
    decision = decide(sizes, Budgets(host_memory, device_memory), depth=2, context_tokens=64)
    model = endor.load(
        moe,
        device=BlockingAccelerator(torch.device("cpu")),
        device_memory=device_memory,
        host_memory=host_memory,
        context_length=64,
    )
    runtime, memory = runtime_of(model), decision.memory
    assert runtime.placement == decision.placement
    assert runtime.ring_bytes == memory.ring + memory.experts
    assert runtime.scratch_bytes == memory.scratch
    assert decision.host_memory is not None
    assert runtime.pinned_bytes == decision.host_memory.total
    runtime.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scratch_for_another_dtype_is_planned(checkpoint: Path, dtype: torch.dtype) -> None:
    sizes = survey(checkpoint, dtype=dtype, matmul="auto").sizes
    model = endor.load(checkpoint, host_memory=0, dtype=dtype)
    assert_same_memory(plan(sizes, Budgets(0), RATES, depth=2), model)
    runtime_of(model).close()


def test_a_survey_reads_no_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endor.checkpoint.Checkpoint, "read", None)
    assert survey(checkpoint, dtype=None, matmul="auto").sizes.nbytes > 0


def test_every_kind_of_weight_has_its_work_measured(checkpoint: Path, moe: Path) -> None:
    assert set(measure_work(survey(moe, dtype=None, matmul="auto"), matmul="auto")) >= {"bitmap/exponent"}
    rates = measure_work(survey(checkpoint, dtype=None, matmul="auto"), matmul="auto")
    assert {"bitmap/raw", "dense/raw"} == set(rates)
    assert all(rate > 0 for rate in rates.values())


def test_more_than_the_free_memory_is_refused_at_load(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("endor.runtime.place.available_bytes", lambda: 1 << 20)
    with pytest.raises(PlanError, match=r"bytes of memory are needed, 1048576 are free: ring .* at least"):
        endor.load(checkpoint, host_memory=0)


# Memory of a process that loads, seen from a thread of it.

_LOAD = """
import json, sys, threading, time
import endor
from endor.runtime import runtime_of
from endor.runtime.stats import anonymous_bytes

endor.load(sys.argv[1], host_memory=0)  # libraries, and what they make at first use
before, peak, done = anonymous_bytes(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
model = endor.load(sys.argv[2], host_memory=int(sys.argv[3]))
import torch
with torch.inference_mode():
    model(torch.tensor([[5]]))
done.set()
watcher.join()
print(json.dumps(peak[0] - before))
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 MB of weights, of which 65 are an embedding and 65 a head."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return write_endor_checkpoint(model, tmp_path_factory.mktemp("middling") / "endor", shards=1)


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_anonymous_memory_stays_within_the_plan(moe: Path, middling: Path, share: float) -> None:
    sizes = survey(middling, dtype=None, matmul="auto").sizes
    budget = int(sizes.nbytes * share)
    expected = plan(sizes, Budgets(budget), RATES, depth=2).decision.memory.total
    command = [sys.executable, "-c", _LOAD, str(moe), str(middling), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    peak_bytes = json.loads(done.stdout)
    assert peak_bytes <= 1.05 * expected + 50e6
    assert peak_bytes >= 0.8 * expected


# What a context takes.


def _small(config_class: type, **fields: Any) -> Any:
    usual = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "dtype": torch.float32,
    }
    return config_class(**usual | fields)


CONFIGS = {
    "grouped": _small(transformers.LlamaConfig),
    "each head its own": _small(transformers.LlamaConfig, num_key_value_heads=4),
    "wide heads": _small(transformers.Qwen3Config, head_dim=32),
    "low rank": _small(
        transformers.DeepseekV3Config,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=3,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_cache_of_a_token_is_what_transformers_keeps(config: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.inference_mode():
        cache = model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = context_sizes(config, torch.float32, latent=keeps_latent(model))
    assert found.cache_bytes_per_token == kept / 5

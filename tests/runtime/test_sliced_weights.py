"""Weights of which only parts are in memory: experts, rows of embeddings, tiles of heads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import endor
from endor.errors import ChecksumError, KernelError
from endor.runtime import runtime_of
from endor.runtime.sliced import SlicedWeight
from tests.support.models import dense_reference, tiny_llama, write_endor_checkpoint

IDS = torch.tensor([[5, 17, 20, 3, 99, 42, 7]])
SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def mixtral() -> Any:
    config = transformers.MixtralConfig(num_local_experts=8, intermediate_size=96, **SMALL)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        num_experts=8,
        moe_intermediate_size=48,
        intermediate_size=96,
        mlp_only_layers=[0],
        **SMALL,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe() -> Any:
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(num_experts=8, intermediate_size=40, **SMALL)
    )


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=48,
        intermediate_size=96,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        **{**SMALL, "num_key_value_heads": 4},
    )
    return transformers.DeepseekV3ForCausalLM(config)


def converted(model: Any, base: Path, **options: Any) -> tuple[Path, Any]:
    """An Endor checkpoint of a model, and the dense model of the same weights, experts one by one."""
    torch.manual_seed(0)
    model.to(torch.bfloat16).save_pretrained(base / "dense")
    endor.convert(base / "dense", base / "endor", **{"method": "magnitude", "sparsity": 0.5, **options})
    with endor.open(base / "endor") as checkpoint:
        state = {name: checkpoint.read_dense(name) for name in checkpoint}
    dense = type(model).from_pretrained(base / "dense", experts_implementation="eager")
    dense.load_state_dict(state, strict=False)
    dense.tie_weights()
    return base / "endor", dense.eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found = model(ids).logits
    assert isinstance(found, torch.Tensor)
    return found


def expert_bytes(directory: Path) -> int:
    with endor.open(directory) as checkpoint:
        return sum(e.nbytes for e in checkpoint.entries.values() if len(e.layout.shape) == 3)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    return converted(mixtral(), tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, olmoe, deepseek])
@pytest.mark.parametrize("host_memory", [0, None])
def test_experts_are_used_one_by_one_and_bit_for_bit(
    family: Any, host_memory: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directory, dense = converted(family(), tmp_path)
    model = endor.load(directory, host_memory=host_memory, matmul="decode")
    stacks = [p for p in model.parameters() if p.dim() == 3]
    assert stacks
    assert all(isinstance(p, SlicedWeight) for p in stacks)
    assert torch.equal(logits(model), logits(dense))
    assert torch.equal(logits(model, IDS[:, :1]), logits(dense, IDS[:, :1]))


@pytest.mark.parametrize("values", ["raw", "exponent", "int8", "int4"])
def test_experts_of_every_codec_equal_the_dense_ones(values: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory, dense = converted(mixtral(), tmp_path, values=values)
    assert torch.equal(logits(endor.load(directory, host_memory=0, matmul="decode")), logits(dense))


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_depth_does_not_change_tokens(moe: tuple[Path, Any], depth: int) -> None:
    directory, dense = moe
    model = endor.load(directory, host_memory=0, matmul="decode", depth=depth)
    expected = dense.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)


def test_one_token_reads_only_the_experts_it_is_routed_to(moe: tuple[Path, Any]) -> None:
    directory, _ = moe
    model = endor.load(directory, host_memory=0)
    runtime = runtime_of(model)
    logits(model, IDS[:, :1])
    shared = runtime.streamed_bytes + model.model.embed_tokens.weight.shape[1] * 2
    from_experts = runtime.stats().disk_bytes - shared
    two_of_eight = expert_bytes(directory) * 2 / 8
    assert 0.8 * two_of_eight < from_experts < 1.2 * two_of_eight


def test_experts_that_fit_are_read_once(moe: tuple[Path, Any]) -> None:
    model = endor.load(moe[0], host_memory=None)
    runtime = runtime_of(model)
    logits(model)
    first = runtime.stats().disk_bytes
    assert first > 0
    logits(model)
    assert runtime.stats().disk_bytes == first


def test_hot_experts_stay_within_the_budget(moe: tuple[Path, Any]) -> None:
    directory, _ = moe
    streaming = runtime_of(endor.load(directory, host_memory=0))
    tables_bytes = 2 * 120 * 64 * 2
    budget = streaming.streamed_bytes + tables_bytes + 5 * streaming._experts[0].expert_bytes
    model = endor.load(directory, host_memory=budget)
    runtime = runtime_of(model)
    for _ in range(3):
        logits(model, IDS[:, :1])  # the same experts each time: two in each of two layers
    assert runtime.per_forward()[0].disk_bytes > 0
    assert runtime.per_forward()[2].disk_bytes == 0


def test_a_damaged_expert_is_found_before_it_is_used(tmp_path: Path) -> None:
    directory, _ = converted(mixtral(), tmp_path)
    with endor.open(directory) as checkpoint:
        name = next(n for n, e in checkpoint.entries.items() if len(e.layout.shape) == 3)
        home, section = checkpoint.home(name), checkpoint.entry(name).sections[-1]
    with home.file.open("r+b") as file:
        file.seek(home.offset - home.block.begin + section.begin + section.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ChecksumError, match=name):
        endor.load(directory, host_memory=0)
    logits(endor.load(directory, host_memory=0, verify="never"))


def test_an_embedding_reads_only_the_rows_of_its_tokens(tmp_path: Path) -> None:
    source = tiny_llama(layers=1)
    model = endor.load(write_endor_checkpoint(source, tmp_path / "endor"), host_memory=0)
    runtime = runtime_of(model)
    with torch.inference_mode():
        found = model.model.embed_tokens(torch.tensor([[7, 8, 200, 7]]))
    assert torch.equal(found, source.model.embed_tokens.weight[[7, 8, 200, 7]].unsqueeze(0))
    assert runtime.stats().disk_bytes == 3 * 64 * 2


def test_an_index_outside_an_embedding_is_refused(tmp_path: Path) -> None:
    model = endor.load(write_endor_checkpoint(tiny_llama(layers=1), tmp_path / "endor"), host_memory=0)
    with pytest.raises(IndexError, match="300 rows"):
        model.model.embed_tokens(torch.tensor([[300]]))
    with pytest.raises(IndexError, match="300 rows"):
        model.model.embed_tokens(torch.tensor([[-1]]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_head_goes_tile_by_tile(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 5000, "tie_word_embeddings": tied})
    config.intermediate_size = 96
    directory, dense = converted(transformers.LlamaForCausalLM(config), tmp_path)
    model = endor.load(directory, host_memory=0, matmul="decode")
    runtime = runtime_of(model)
    assert isinstance(model.lm_head.weight, SlicedWeight)
    assert not model.lm_head.weight.is_attached
    assert torch.equal(logits(model), logits(dense))
    assert runtime.ring_bytes < model.lm_head.weight.nbytes * 2 + (2 << 20)
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, dense.generate(IDS, max_new_tokens=5, do_sample=False))
    assert [s.disk_bytes for s in runtime.per_forward()[2:]] == [runtime.streamed_bytes + 128] * 4


def test_other_uses_of_a_sliced_weight_see_all_of_it(tmp_path: Path) -> None:
    source = tiny_llama(layers=1, tied=True)
    model = endor.load(write_endor_checkpoint(source, tmp_path / "endor"), host_memory=0)
    weight, dense = model.lm_head.weight, source.lm_head.weight
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(x @ weight.t(), x @ dense.t())
    assert torch.equal(weight[3:5] + 0, dense[3:5])
    x.requires_grad_()
    F.linear(x, weight).sum().backward()
    assert x.grad is not None


def test_after_close_a_sliced_weight_says_so(moe: tuple[Path, Any]) -> None:
    model = endor.load(moe[0], host_memory=0)
    weight = next(p for p in model.parameters() if p.dim() == 3)
    runtime_of(model).close()
    with pytest.raises(KernelError, match="after its runtime was closed"):
        weight[0]


def test_experts_ask_again_after_an_error(moe: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = endor.load(moe[0], host_memory=0, matmul="decode")
    runtime = runtime_of(model)
    submit, fail = runtime.reader.submit, {"on": True}

    def failing(op: Any, destination: memoryview) -> Any:
        if fail["on"] and len(destination) < 9000:
            raise endor.errors.LoadError(f"{op.file}: injected")
        return submit(op, destination)

    monkeypatch.setattr(runtime.reader, "submit", failing)
    with pytest.raises(endor.errors.LoadError, match="injected"):
        logits(model)
    fail["on"] = False
    assert torch.equal(logits(model), logits(moe[1]))


def test_threads_that_call_layers_by_themselves_take_turns(moe: tuple[Path, Any]) -> None:
    with endor.open(moe[0]) as checkpoint:
        blocks = sum(home.nbytes for home in checkpoint.blocks) - expert_bytes(moe[0])
    model = endor.load(moe[0], host_memory=blocks, matmul="decode")
    assert runtime_of(model).placement.counts()["disk"] == 0
    inputs = [torch.tensor([[n, n + 9, n + 30, n + 50]]) for n in range(3, 7)]

    def answers(number: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model.model(inputs[number]).last_hidden_state for _ in range(10)]

    with torch.inference_mode():
        expected = [moe[1].model(ids).last_hidden_state for ids in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        found = list(pool.map(answers, range(len(inputs))))
    assert all(torch.equal(a, e) for got, e in zip(found, expected, strict=True) for a in got)


def test_dense_reference_is_what_transformers_loads(tmp_path: Path) -> None:
    source = tiny_llama(layers=1, tied=True)
    model = endor.load(write_endor_checkpoint(source, tmp_path / "endor"), host_memory=0, matmul="decode")
    assert torch.equal(logits(model), logits(dense_reference(source, tmp_path / "dense")))


def test_an_expert_that_is_held_too_long_is_an_error_in_words(moe: tuple[Path, Any]) -> None:
    model = endor.load(moe[0], host_memory=0, depth=2)
    weight = next(p for p in model.parameters() if p.dim() == 3)
    first, *_ = [weight[i] for i in range(8)]
    with pytest.raises(KernelError, match="used while its block is not running"):
        F.linear(torch.randn(1, weight.shape[2], dtype=torch.bfloat16), first)


def test_interrupted_launches_lose_no_slot(moe: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = endor.load(moe[0], host_memory=0)
    cache = runtime_of(model)._tiers.experts
    assert cache is not None
    expert_of, slots = cache._expert_of, cache.slots

    def interrupted(key: Any) -> Any:
        raise KeyboardInterrupt

    for _ in range(4):
        monkeypatch.setattr(cache, "_expert_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    monkeypatch.setattr(cache, "_expert_of", expert_of)
    assert torch.equal(logits(model), logits(moe[1]))
    assert cache.slots == slots


def test_a_stack_that_is_read_whole_counts_as_read(moe: tuple[Path, Any]) -> None:
    model = endor.load(moe[0], host_memory=0)
    weight = next(p for p in model.parameters() if p.dim() == 3)
    before = model.endor_stats().disk_bytes
    weight.to_dense()
    assert model.endor_stats().disk_bytes - before >= 0.9 * weight.nbytes

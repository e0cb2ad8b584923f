"""A device with its own memory: what is where, what that takes of both memories, and what would fit."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from endor.errors import PlanError
from endor.loaders.plan import PAGE_BYTES, round_up
from endor.runtime.planner import (
    BlockSize,
    Budgets,
    ExpertSize,
    ModelSizes,
    Piece,
    TableSize,
    check_room,
    decide,
    default_device_bytes,
    default_pinned_bytes,
)
from endor.runtime.room import DEVICE_MARGIN_BYTES, DEVICE_MARGIN_SHARE, device_margin
from endor.runtime.survey import context_sizes

MIB, GIB = 1 << 20, 1 << 30
MARGIN = DEVICE_MARGIN_BYTES


def piece(nbytes: int, *, stored: int = 0) -> Piece:
    return Piece(nbytes, round_up(nbytes, PAGE_BYTES), stored, 0, {"bitmap/raw": nbytes})


def layers(*mib: int) -> ModelSizes:
    """Layers of so many MiB, whose largest weight is 4 MiB dense."""
    blocks = (BlockSize(f"layer.{i}", piece(n * MIB, stored=4 * MIB)) for i, n in enumerate(mib))
    return ModelSizes(
        tuple(blocks),
        dense_bytes=2 * MIB,
        cache_bytes_per_token=64 << 10,
        activation_bytes_per_token=32 << 10,
        logits_bytes=1 * MIB,
    )


EIGHT = layers(*[10] * 8)
FIXED = (4 + 2 + 1) * MIB
"""Of `EIGHT` on a device: scratch, dense parameters, logits."""


def asked(message: str, name: str) -> int:
    found = re.search(rf"{name}=(\d+)", message)
    assert found is not None, message
    return int(found[1])


# Memory by part.


def test_device_has_room_for_the_context_and_a_cpu_is_not_planned_for_it() -> None:
    memory = decide(EIGHT, Budgets(0, 0), depth=2, context_tokens=1000).memory
    assert memory.cache == 1000 * (64 << 10)
    assert memory.activations == 1000 * (32 << 10) + MIB
    assert memory.total == 30 * MIB + FIXED + 1000 * (96 << 10)
    cpu = decide(EIGHT, Budgets(0), depth=2, context_tokens=1000).memory
    assert (cpu.cache, cpu.activations) == (0, 0)


def test_disk_has_a_ring_of_its_own_in_host_memory_if_something_comes_from_there() -> None:
    """Two units that are copied and `depth` others; no more than one in use and once around."""
    from_disk = decide(EIGHT, Budgets(30 * MIB, 20 * MIB), depth=2)
    assert from_disk.host_memory is not None
    assert (from_disk.host_memory.ring, from_disk.memory.ring) == (40 * MIB, 30 * MIB)
    assert from_disk.host_memory.resident == 30 * MIB
    two, one = (decide(EIGHT, Budgets(n * MIB, 20 * MIB), depth=2).host_memory for n in (40, 50))
    assert two is not None
    assert one is not None
    assert (two.ring, one.ring) == (30 * MIB, 20 * MIB)
    from_host = decide(EIGHT, Budgets(60 * MIB, 20 * MIB), depth=2)
    assert from_host.host_memory is not None
    assert (from_host.host_memory.ring, from_host.memory.ring) == (0, 30 * MIB)
    assert from_host.host_memory.total == 60 * MIB


def test_tiles_of_a_tied_head_that_is_not_dense_come_from_disk() -> None:
    tied = TableSize("embed", 40 * MIB, 40 * MIB, 4096, tuple(piece(10 * MIB) for _ in range(4)))
    away = decide(replace(EIGHT, tables=(tied,)), Budgets(80 * MIB, 0), depth=1)
    assert away.host_memory is not None
    assert (away.host_memory.ring, away.memory.ring) == (30 * MIB, 20 * MIB)
    dense = decide(replace(EIGHT, tables=(tied,)), Budgets(0, 120 * MIB), depth=1)
    assert dense.host_memory is not None
    assert (dense.memory.dense, dense.memory.ring, dense.host_memory.total) == (42 * MIB, 0, 0)


def test_tied_head_is_kept_before_blocks_which_host_memory_can_hold() -> None:
    tied = TableSize("embed", 40 * MIB, 40 * MIB, 4096, (piece(40 * MIB),))
    rows = TableSize("rows", 5 * MIB, 5 * MIB, 4096)
    sizes = replace(EIGHT, tables=(rows, tied))
    found = decide(sizes, Budgets(80 * MIB, 50 * MIB), depth=1)
    assert found.dense_tables == {"embed"}
    assert len(found.placement.device) == 1
    assert decide(sizes, Budgets(80 * MIB, 45 * MIB), depth=1).dense_tables == {"embed", "rows"}
    assert decide(sizes, Budgets(80 * MIB, 45 * MIB), depth=1).placement.device == ()
    small = decide(sizes, Budgets(80 * MIB, 35 * MIB), depth=1)
    assert small.dense_tables == {"rows"}
    assert len(small.placement.device) == 3
    assert decide(sizes, Budgets(50 * MIB), depth=1).placement.counts()["host"] == 5  # a CPU: bytes are bytes


def test_head_in_host_memory_is_copied_whole_and_read_from_disk_in_tiles() -> None:
    head = BlockSize("head", piece(40 * MIB), tuple(piece(10 * MIB) for _ in range(4)))
    sizes = replace(EIGHT, blocks=(*EIGHT.blocks, head))
    assert decide(sizes, Budgets(0, 0), depth=1).memory.ring == 20 * MIB
    assert decide(sizes, Budgets(120 * MIB, 0), depth=1).memory.ring >= 50 * MIB


def test_experts_have_slots_on_the_device_and_are_read_through_a_few_buffers() -> None:
    experts = tuple(ExpertSize(8, 2, piece(2 * MIB)) for _ in range(4))
    found = decide(replace(EIGHT, experts=experts), Budgets(0, 80 * MIB + 20 * MIB), depth=2)
    assert found.expert_slots == 10
    assert found.host_memory is not None
    assert (found.memory.experts, found.host_memory.experts) == (20 * MIB, 6 * MIB)  # one, and two ahead
    assert found.host_memory.ring == 0


MOE = replace(EIGHT, experts=tuple(ExpertSize(8, 2, piece(2 * MIB)) for _ in range(4)))
"""64 MiB of experts beside 80 MiB of blocks."""


@pytest.mark.parametrize(
    ("left_mib", "held", "pinned_mib"),
    [
        (0, (0, 0, 0, 0), 6),
        (1, (0, 0, 0, 0), 6),
        (2, (1, 0, 0, 0), 6 + 2),
        (21, (3, 3, 2, 2), 6 + 20),
        (63, (8, 8, 8, 7), 6 + 62),
        (64, (8, 8, 8, 8), 64),  # nothing is read, so no buffers
        (99, (8, 8, 8, 8), 64),
    ],
)
def test_what_blocks_leave_of_host_memory_holds_experts_as_many_of_each_layer(
    left_mib: int, held: tuple[int, ...], pinned_mib: int
) -> None:
    found = decide(MOE, Budgets((80 + left_mib) * MIB, 0), depth=2)
    assert len(found.placement.host) == 8
    assert found.host_experts == held
    assert found.host_memory is not None
    assert found.host_memory.experts == pinned_mib * MIB
    assert found.host_memory.total == (80 + pinned_mib) * MIB
    assert found.memory.experts == 6 * MIB


def test_experts_have_all_of_host_memory_where_blocks_are_on_the_device() -> None:
    found = decide(MOE, Budgets(21 * MIB, 80 * MIB), depth=2)
    assert found.placement.counts() == {"device": 8, "host": 0, "disk": 0}
    assert found.host_experts == (3, 3, 2, 2)


def test_device_with_slots_for_all_experts_needs_none_in_host_memory() -> None:
    all_but_one = decide(MOE, Budgets(GIB, (80 + 62) * MIB), depth=2)
    assert (all_but_one.expert_slots, all_but_one.host_experts) == (31, (8, 8, 8, 8))
    every = decide(MOE, Budgets(GIB, (80 + 64) * MIB), depth=2)
    assert (every.expert_slots, every.host_experts) == (32, (0, 0, 0, 0))
    assert every.host_memory is not None
    assert every.host_memory.total == 6 * MIB


def test_cpu_has_experts_in_its_slots_and_nowhere_else() -> None:
    assert decide(MOE, Budgets(GIB), depth=2).host_experts == ()


def test_experts_in_host_memory_take_what_each_spans() -> None:
    layer = ExpertSize(4, 1, piece(2 * MIB), spans=(2 * MIB, 1 * MIB, 1 * MIB, 2 * MIB))
    found = decide(replace(EIGHT, experts=(layer, layer)), Budgets((80 + 7) * MIB, 0), depth=2)
    assert found.host_experts == (3, 2)  # 2 + 2, 1 + 1, 1
    assert found.host_memory is not None
    assert found.host_memory.experts == (6 + 8) * MIB  # three buffers, and seven in whole huge pages
    with pytest.raises(PlanError, match="of 4 experts each has a span, found 1 of them"):
        ExpertSize(4, 1, piece(2 * MIB), spans=(2 * MIB,))


def test_host_budget_that_holds_only_a_block_of_the_device_is_no_error() -> None:
    found = decide(layers(10, 10, 40, 40), Budgets(15 * MIB, 20 * MIB), depth=1)
    assert found.placement.counts() == {"device": 2, "host": 0, "disk": 2}
    with pytest.raises(PlanError, match="holds no block"):
        decide(layers(10, 10, 40, 40), Budgets(5 * MIB, 20 * MIB), depth=1)


# The default budget.


def test_margin_is_a_share_of_a_large_device_and_never_less_than_a_small_one_needs() -> None:
    assert device_margin(2 * GIB) == DEVICE_MARGIN_BYTES
    assert device_margin(80 * GIB) == int(DEVICE_MARGIN_SHARE * 80 * GIB)


def default(sizes: ModelSizes, free_mib: int, *, depth: int = 2, tokens: int = 0) -> int:
    """With so much free beside the margin, before the dense parameters are there."""
    free_bytes = MARGIN + free_mib * MIB - sizes.dense_bytes
    return default_device_bytes(sizes, depth=depth, context_tokens=tokens, free_bytes=free_bytes)


@pytest.mark.parametrize(("free_mib", "resident"), [(37, 0), (46, 0), (47, 1), (57, 2), (86, 4), (87, 8)])
def test_default_is_what_is_left_beside_everything_else(free_mib: int, resident: int) -> None:
    budget = default(EIGHT, free_mib)
    found = decide(EIGHT, Budgets(0, budget), depth=2)
    assert len(found.placement.device) == resident
    assert found.memory.total <= free_mib * MIB


def test_default_leaves_room_for_the_context() -> None:
    without, with_context = (default(EIGHT, 77, tokens=tokens) for tokens in (0, 320))
    assert decide(EIGHT, Budgets(0, without), depth=2).memory.resident == 40 * MIB
    assert decide(EIGHT, Budgets(0, with_context), depth=2).memory.resident == 10 * MIB  # 320 take 30 MiB


def test_default_of_a_small_model_is_all_of_it() -> None:
    sizes = replace(EIGHT, tables=(TableSize("embed", 4 * MIB, 4 * MIB, 64),))
    budget = default(sizes, 10_000)
    found = decide(sizes, Budgets(0, budget), depth=2)
    assert found.placement.disk == ()
    assert found.dense_tables == {"embed"}


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 400), st.integers(0, 3), st.integers(0, 500), st.booleans())
def test_default_fits_whatever_the_host_holds(
    mib: list[int], free_mib: int, depth: int, tokens: int, with_head: bool
) -> None:
    sizes = layers(*mib)
    if with_head:
        head = BlockSize("head", piece(50 * MIB, stored=9 * MIB), tuple(piece(10 * MIB) for _ in range(5)))
        sizes = replace(sizes, blocks=(*sizes.blocks, head))
    try:
        budget = default(sizes, free_mib, depth=depth, tokens=tokens)
    except PlanError:
        least = decide(sizes, Budgets(0, 0), depth=depth, context_tokens=tokens).memory.total
        assert with_head or least > free_mib * MIB
        return
    for host in (0, sizes.nbytes):
        budgets = Budgets(host, budget)
        check_room(
            sizes,
            budgets,
            depth=depth,
            free_bytes=None,
            context_tokens=tokens,
            device_free_bytes=MARGIN + free_mib * MIB - sizes.dense_bytes,
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(30, 200), st.integers(0, 2))
def test_default_keeps_as_many_equal_blocks_as_fit(count: int, free_mib: int, depth: int) -> None:
    sizes = layers(*[10] * count)
    fitting = [
        n
        for n in range(count + 1)
        if decide(sizes, Budgets(0, n * 10 * MIB), depth=depth).memory.total <= free_mib * MIB
    ]
    if not fitting:
        with pytest.raises(PlanError, match="at least"):
            default(sizes, free_mib, depth=depth)
        return
    found = decide(sizes, Budgets(0, default(sizes, free_mib, depth=depth)), depth=depth)
    assert len(found.placement.device) == max(fitting)


def test_default_of_pinned_memory_leaves_room_for_what_is_read_from_disk() -> None:
    def found(sizes: ModelSizes, device_mib: int, free_mib: int) -> int:
        device, free = device_mib * MIB, free_mib * MIB
        budget = default_pinned_bytes(sizes, device, depth=2, free_bytes=free)
        check_room(sizes, Budgets(budget, device), depth=2, free_bytes=free)
        return len(decide(sizes, Budgets(budget, device), depth=2).placement.host)

    assert found(EIGHT, 20, 60) == 6  # nothing from disk
    assert found(EIGHT, 20, 59) == 1  # four units of a ring beside it
    assert found(EIGHT, 0, 79) == 3
    experts = (ExpertSize(8, 2, piece(2 * MIB)),) * 4
    assert found(replace(EIGHT, experts=experts), 80 + 20, 20) == 0
    assert found(replace(EIGHT, experts=experts), 20, 60 + 6) == 6  # three slots for experts
    assert default_pinned_bytes(EIGHT, 0, depth=2, free_bytes=MIB) == 0


@pytest.mark.parametrize(
    ("free_mib", "held"), [(6, 0), (7, 0), (26, 10), (27, 10), (63, 28), (64, 32), (999, 32)]
)
def test_default_of_pinned_memory_holds_the_experts_for_which_there_is_room(free_mib: int, held: int) -> None:
    budget = default_pinned_bytes(MOE, 80 * MIB, depth=2, free_bytes=free_mib * MIB)
    check_room(MOE, Budgets(budget, 80 * MIB), depth=2, free_bytes=free_mib * MIB)
    assert sum(decide(MOE, Budgets(budget, 80 * MIB), depth=2).host_experts) == held


@settings(max_examples=60, deadline=None)
@given(SIZES, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 900), st.integers(0, 400))
def test_default_of_pinned_memory_fits_with_experts(
    mib: list[int], experts: list[int], free_mib: int, device_mib: int
) -> None:
    sizes = replace(layers(*mib), experts=tuple(ExpertSize(8, 2, piece(n * MIB)) for n in experts))
    device = device_mib * MIB if device_mib >= min(mib) else 0
    free = free_mib * MIB
    budget = default_pinned_bytes(sizes, device, depth=2, free_bytes=free)
    found = decide(sizes, Budgets(budget, device), depth=2).host_memory
    assert found is not None
    if found.total > free:  # only if nothing does
        assert budget == 0
        with pytest.raises(PlanError, match="at least"):
            check_room(sizes, Budgets(0, device), depth=2, free_bytes=free)


# What does not fit.


def test_experts_that_the_host_has_no_room_for_are_refused_with_a_budget_that_fits() -> None:
    with pytest.raises(PlanError, match="ring of the disk 0, resident 0, experts 67108864; ") as error:
        check_room(MOE, Budgets(64 * MIB, 80 * MIB), depth=2, free_bytes=40 * MIB)
    fits = asked(str(error.value), "host_memory")
    assert sum(decide(MOE, Budgets(fits, 80 * MIB), depth=2).host_experts) == 17
    check_room(MOE, Budgets(fits, 80 * MIB), depth=2, free_bytes=40 * MIB)


def test_device_too_small_says_what_is_needed_at_least_and_at_which_depth_or_context_it_would_do() -> None:
    with pytest.raises(PlanError, match=r"bytes of device memory are needed, \d+ are free: ring") as error:
        default(EIGHT, 46, tokens=320)  # ring 30, fixed 7, context 30
    message = str(error.value)
    for part in (
        "ring 31457280",
        "scratch 4194304",
        "embeddings 0",
        f"cache {320 << 16}",
        f"margin {MARGIN}",
    ):
        assert part in message
    assert "for 320 tokens" in message
    assert f"at least {MARGIN + 15 * MIB + (96 << 10)} bytes are needed" in message
    assert "with device_memory=0, context_length=96 or depth=0 with context_length=309 would fit" in message
    assert default(EIGHT, 46, tokens=96) == 0
    assert default(EIGHT, 46, depth=0, tokens=309) == 0
    with pytest.raises(PlanError):
        default(EIGHT, 46, tokens=97)
    with pytest.raises(PlanError):
        default(EIGHT, 46, depth=0, tokens=310)


def test_device_that_holds_the_context_at_a_smaller_depth_says_so() -> None:
    with pytest.raises(PlanError, match="with device_memory=0, context_length=309 or depth=0 would fit"):
        default(EIGHT, 66, tokens=320)
    assert default(EIGHT, 66, depth=0, tokens=320) >= 10 * MIB
    with pytest.raises(PlanError, match="with device_memory=0, depth=0 would fit"):
        default(EIGHT, 20)


def test_device_for_no_plan_says_only_what_is_needed_at_least() -> None:
    with pytest.raises(PlanError, match=r"depth=0 and context_length=1$"):
        default(EIGHT, 10, tokens=100)
    with pytest.raises(PlanError, match=r"at least \d+ bytes are needed, with device_memory=0, depth=0$"):
        default(EIGHT, 10)


def room(
    budgets: Budgets, *, device_mib: int | None = None, host_mib: int | None = None, depth: int = 2
) -> None:
    check_room(
        EIGHT,
        budgets,
        depth=depth,
        free_bytes=None if host_mib is None else host_mib * MIB,
        context_tokens=320,
        device_free_bytes=None if device_mib is None else MARGIN + device_mib * MIB - EIGHT.dense_bytes,
    )


def test_budget_that_the_device_has_no_room_for_is_refused_with_one_that_fits() -> None:
    with pytest.raises(PlanError, match="bytes of device memory are needed") as error:
        room(Budgets(0, 50 * MIB), device_mib=100)
    fits = asked(str(error.value), "device_memory")
    assert 30 * MIB <= fits < 50 * MIB
    assert "a shorter context_length or a smaller depth leaves more room" in str(error.value)
    room(Budgets(0, fits), device_mib=100)
    room(Budgets(0, 50 * MIB))  # nobody knows what is free


def test_no_budget_that_the_device_has_room_for_is_refused_with_what_would_do() -> None:
    with pytest.raises(PlanError, match="device_memory=0, context_length=309 or depth=0 would fit"):
        room(Budgets(0, 50 * MIB), device_mib=66)


def test_budget_that_the_host_has_no_room_for_is_refused_with_one_that_fits() -> None:
    with pytest.raises(
        PlanError, match=r"73400320 bytes of pinned host memory are needed, .* are free"
    ) as error:
        room(Budgets(50 * MIB, 20 * MIB), host_mib=60)
    assert "ring of the disk 20971520, resident 52428800, experts 0" in str(error.value)
    fits = asked(str(error.value), "host_memory")
    assert fits == 20 * MIB
    room(Budgets(fits, 20 * MIB), host_mib=60)
    room(Budgets(60 * MIB, 20 * MIB), host_mib=60)  # nothing from disk, no ring


def test_host_for_no_plan_says_what_is_needed_at_least() -> None:
    with pytest.raises(PlanError, match="at least 20971520 bytes are needed, with host_memory=0 and depth=0"):
        room(Budgets(0, 20 * MIB), host_mib=20)
    with pytest.raises(PlanError, match="20971520 bytes of pinned host memory are needed, 19922944 are free"):
        room(Budgets(0, 20 * MIB), host_mib=19, depth=0)
    room(Budgets(0, 20 * MIB), host_mib=20, depth=0)


# What a context takes, from the config.


def config(**fields: object) -> SimpleNamespace:
    usual = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    }
    return SimpleNamespace(**usual | fields)


def test_cache_is_keys_and_values_of_every_layer() -> None:
    found = context_sizes(config(), torch.bfloat16)
    assert found.cache_bytes_per_token == 32 * 2 * 8 * 128 * 2  # Llama 3.1 8B: 128 KiB
    assert found.logits_bytes == 128_256 * 4
    assert context_sizes(config(head_dim=256), torch.bfloat16).cache_bytes_per_token == 32 * 2 * 8 * 256 * 2
    assert context_sizes(config(), torch.float32).cache_bytes_per_token == 2 * found.cache_bytes_per_token
    without_groups = context_sizes(config(num_key_value_heads=None), torch.bfloat16)
    assert without_groups.cache_bytes_per_token == 4 * found.cache_bytes_per_token


def test_heads_whose_keys_are_wider_than_their_values_are_counted_as_they_are() -> None:
    low_rank = config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, head_dim=64)
    assert context_sizes(low_rank, torch.bfloat16).cache_bytes_per_token == 32 * 8 * (192 + 128) * 2


def test_latent_vectors_are_small_and_what_is_made_from_them_is_an_activation() -> None:
    low_rank = config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
    whole, latent = (context_sizes(low_rank, torch.bfloat16, latent=latent) for latent in (False, True))
    assert latent.cache_bytes_per_token == 32 * (512 + 64) * 2
    one_layer = 8 * (192 + 128) * 2
    assert latent.activation_bytes_per_token == whole.activation_bytes_per_token + one_layer


def test_activations_grow_with_the_widths_of_the_model() -> None:
    found = context_sizes(config(), torch.bfloat16).activation_bytes_per_token
    assert found >= 2 * (4096 * 2 + 14336 * 2)
    assert (
        context_sizes(config(moe_intermediate_size=20_000), torch.bfloat16).activation_bytes_per_token > found
    )


def test_config_that_says_nothing_counts_as_nothing() -> None:
    found = context_sizes(SimpleNamespace(num_key_value_heads=[1, 2]), torch.bfloat16)
    assert (found.cache_bytes_per_token, found.activation_bytes_per_token, found.logits_bytes) == (0, 0, 0)

"""What SGLang's own configurator builds under the flag, for each kind of model, and without it."""

from __future__ import annotations

from functools import cache

import pytest

from sglang_jenga.testing.tiny_models import write_tiny_model

BUDGET = 1 << 20
MODELS = {
    "llama": {},
    "gemma3_text": {"page_size": 16},
    "qwen3_next": {},
    "jet_nemotron": {"window": 63, "mamba_radix_cache_strategy": "no_buffer"},
    "mamba": {},
    "ministral_windows": {},
}


@pytest.fixture(scope="module")
def build(launcher, tmp_path_factory):
    """What is built for a family's tiny model on a machine with so many bytes left."""
    folder = tmp_path_factory.mktemp("models")
    model = cache(lambda family: str(write_tiny_model(family, folder / family)))

    def build(family: str, backend: str, budget: int = BUDGET, **arguments):
        arguments = {**MODELS[family], **arguments, "memory_backend": backend}
        return launcher.run(
            "from sglang_jenga.testing.built_pools import built\n"
            f"answer = built({model(family)!r}, {budget}, **{arguments!r})"
        )

    return build


OURS = {
    "llama": ("JengaTokenAllocator", "JengaMHAPool", "ReqToTokenPool"),
    "gemma3_text": ("JengaSWAAllocator", "JengaSWAPool", "ReqToTokenPool"),
    "qwen3_next": ("JengaTokenAllocator", "JengaHybridPool", "JengaStateRows"),
    "jet_nemotron": ("JengaSWAAllocator", "JengaSWAPool", "JengaStateRows"),
    "mamba": ("JengaTokenAllocator", "JengaHybridPool", "JengaStateRows"),
    "ministral_windows": ("JengaSWAAllocator", "JengaSWAPool", "ReqToTokenPool"),
}


@pytest.mark.parametrize("family", OURS)
def test_under_the_flag_pools_allocator_and_cache_are_ours_and_take_the_budget(build, family: str):
    made = build(family, "jenga")

    assert (made["allocator"], made["kv"], made["rows"]) == OURS[family]
    assert made["cache"] == "JengaRadixCache"
    assert BUDGET // 2 < made["bytes"] <= BUDGET
    states_fill_large_pages = made["rows"] == "JengaStateRows" and made["smalls"][-1] == 1
    assert made["taken"] == made["null"] == 1 + states_fill_large_pages
    assert made["requests"] == 32  # as asked for: memory decides, no number of states


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_without_the_flag_sglang_builds_its_own_in_a_process_that_is_patched(build, family: str):
    assert build(family, "jenga")["cache"] == "JengaRadixCache"

    made = build(family, "default")

    assert not any("Jenga" in str(made[part]) for part in ("allocator", "kv", "rows", "cache"))
    assert made["warnings"] == []


def test_stock_keeps_its_share_for_states_where_the_flag_is_not_given(build):
    way = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}
    stock = build("qwen3_next", "default", **way)

    assert stock["rows"] == "HybridReqToTokenPool"
    assert stock["requests"] < 32  # by the states that it has cut off
    assert stock["tokens"] < build("qwen3_next", "jenga", **way)["tokens"]


def test_a_dense_model_has_room_for_as_many_tokens_as_in_stock(build):
    """Stock's padding page lies on top of the budget, ours in it."""
    assert build("llama", "default")["tokens"] - build("llama", "jenga")["tokens"] == 1


def test_a_window_makes_room_for_longer_requests_than_full_kv(build):
    stock, jenga = (build("gemma3_text", backend)["tokens"] for backend in ("default", "jenga"))

    assert jenga > 3 * stock


def test_a_token_limit_is_a_limit_in_the_bytes_that_stock_would_take(build):
    made = build("llama", "jenga", max_total_tokens=100)

    assert made["bytes"] == 101 * (BUDGET // 1024)  # and a padding slot, of 1 KiB each


def test_a_token_limit_beyond_the_memory_is_told_and_the_memory_is_used(build):
    made = build("llama", "jenga", max_total_tokens=5000)

    assert made["bytes"] == BUDGET
    assert any("more than the 1048576 bytes profiled" in line for line in made["warnings"])


def test_a_pool_shorter_than_the_context_is_told(build):
    warnings = build("llama", "jenga", context_length=4096)["warnings"]

    assert any("one request of at most 1023 tokens" in line for line in warnings)


def test_a_scheduler_that_has_too_little_memory_leaves_one_line_and_ends(build):
    made = build("llama", "jenga", budget=2000)

    assert made["status"] == 1
    assert made["refused"].startswith("--memory-backend jenga: pool of 1.95 KiB holds ")
    assert "\n" not in made["refused"]


GUARDS = """
from sglang_jenga.boot import construction
from sglang_jenga.testing.built_pools import cache_of, configurator

said = []
with configurator({model!r}, 1 << 20, memory_backend="jenga") as made:
    construction.flags.is_on, is_on = (lambda *_: False), construction.flags.is_on
    try:
        stock = made.configure(pre_model_load_memory=0)
    finally:
        construction.flags.is_on = is_on
    for act in (
        lambda: construction.configure(stock, made),
        lambda: cache_of(made, stock.req_to_token_pool, stock.token_to_kv_pool_allocator),
    ):
        try:
            act()
        except RuntimeError as error:
            said.append(str(error))
answer = {{"said": said}}
"""


def test_neither_pools_nor_cache_serve_beside_stock_ones_under_the_flag(launcher, tmp_path):
    model = str(write_tiny_model("llama", tmp_path))

    pools, tree = launcher.run(GUARDS.format(model=model))["said"]

    assert "SGLang built TokenToKVPoolAllocator; refusing to serve with it" in pools
    assert "the jenga radix cache needs the jenga pool, got TokenToKVPoolAllocator" in tree

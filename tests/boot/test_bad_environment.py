"""SGLang's environment variables under --memory-backend jenga: refused, or one warning line."""

from __future__ import annotations

import pytest

from tests.boot.lines import WITH

LAYOUT = "jenga brings its own layout"
CHECKS = (
    "its checks are in code that jenga replaces (SGLANG_CHECK_KV_PAGE_INVARIANTS=1 with "
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY=1 checks jenga's)"
)
REFUSED = [
    ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1", "a jenga buffer has one size for life"),
    ("SGLANG_USE_HND_KVCACHE=true", LAYOUT),
    ("SGLANG_AITER_KV_CACHE_LAYOUT=vectorized_5d", LAYOUT),
    ("SGLANG_MOONCAKE_CUSTOM_MEM_POOL=True", "the one buffer comes from torch's own allocator"),
    (
        "SGLANG_PP_COMM_OVERLAP=1",
        "a stage would change the map of windows while a step reads it",
    ),
    ("SGLANG_DEBUG_MEMORY_POOL=1", CHECKS),
    ("SGLANG_MAMBA_DEBUG_ASSERTS=1", CHECKS),
]
IGNORED = [
    (
        "SGLANG_SWA_EVICTION_INTERVAL=33",
        "windows give back what lies behind them every 32 tokens at the latest",
    ),
    (
        "SGLANG_VLM_CACHE_SIZE_MB=200",
        "what a vision tower makes of images lies in idle pages of the pool, where nothing is set "
        "aside for it and nothing but the pool bounds it; 0 turns that off",
    ),
    (
        "SGLANG_OPT_MAMBA_SKIP_DECODE_LOCK=1",
        "a running request never locks the cached state that it began with",
    ),
    (
        "SGLANG_OPT_UNIFIED_CACHE_FREE_OUT_OF_WINDOW_SLOTS=0",
        "what lies behind a window is kept until memory is short, and then freed",
    ),
    (
        "SGLANG_OPT_RELEASE_PREFILL_SWA=1",
        "a window always unlocks the part of the prefix that it has left behind",
    ),
    (
        "SGLANG_OPT_SWA_RELEASE_LEAF_LOCK_AFTER_WINDOW=1",  # the name it had before
        "a window always unlocks the part of the prefix that it has left behind",
    ),
    ("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python", "jenga brings its own radix trees"),
    (
        "SGLANG_DISABLE_FUSED_MAMBA_SLOT_OPS=1",
        "a whole state is one row of the buffer, cleared and copied at once",
    ),
]
SERVED = [
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=0",
    "SGLANG_AITER_KV_CACHE_LAYOUT=nhd",
    "SGLANG_SWA_EVICTION_INTERVAL=32",
    "SGLANG_VLM_CACHE_SIZE_MB=0",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=rust",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS=1",
]
JENGA = ("--memory-backend", "jenga", "--model-path")


@pytest.mark.parametrize(("setting", "why"), REFUSED)
def test_variable_that_asks_for_an_effect_is_refused_in_one_line(launcher, llama, setting, why):
    name, value = setting.split("=")

    outcome = launcher.command_line(*JENGA, llama, **{name: value})

    line = f"{WITH}{setting}: {why}; unset {name} or drop --memory-backend"
    assert outcome[:2] == ("SystemExit", line)


@pytest.mark.parametrize(("setting", "why"), IGNORED)
def test_variable_that_only_tunes_is_one_warning(launcher, llama, setting, why):
    name, value = setting.split("=")

    found = launcher.warnings(*JENGA, llama, **{name: value})

    assert found == [f"--memory-backend jenga ignores {setting}: {why}"]


@pytest.mark.parametrize("setting", SERVED)
def test_variable_with_a_served_value_is_no_matter(launcher, llama, setting):
    name, value = setting.split("=")

    assert launcher.warnings(*JENGA, llama, **{name: value}) == []


@pytest.mark.parametrize(("setting", "_"), REFUSED)
def test_no_variable_matters_without_the_flag(launcher, llama, setting, _):
    name, value = setting.split("=")

    outcome = launcher.command_line("--model-path", llama, **{name: value})

    assert outcome.end == "resolved", outcome.text


def test_rounds_that_are_no_number_are_one_line(launcher, llama):
    outcome = launcher.command_line(*JENGA, llama, SGLANG_JENGA_COMPARE_RANKS="often")

    assert outcome.end == "SystemExit"
    assert outcome.text == (
        "sglang-jenga: SGLANG_JENGA_COMPARE_RANKS: a number of rounds is needed, 0 for never, "
        "got 'often'"
    )


def test_unknown_part_to_switch_off_is_one_line(launcher, llama):
    outcome = launcher.command_line(*JENGA, llama, SGLANG_JENGA_ABLATE="balanced,luck")

    assert outcome.end == "SystemExit"
    assert outcome.text.startswith("sglang-jenga: SGLANG_JENGA_ABLATE: unknown luck, known are ")

"""A retracted request resumes from what it had computed; stock SGLang computes it again."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT
from sglang_jenga.testing.pressure import (
    admit_too_many,
    all_have,
    go_on,
    interrupt,
    pause,
    retract_every,
)
from sglang_jenga.testing.tiny_models import STATE_FAMILIES, VOCAB_SIZE
from tests.servers.parity import model_of

pytestmark = pytest.mark.slow
STRANGERS = 12
"""Prompts with nothing in common: whatever hits is a request's own."""


def strangers(count: int, length: int = 70) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


# ---- memory runs short: the longer it stays so, the less is left ----------------------------


def answered(family: str, folder, tokens: int, backend: str) -> Run:
    return run_engine(
        model_of(family, folder),
        [strangers(STRANGERS, 24)],
        max_new_tokens=100,
        prepare=admit_too_many,
        memory_backend=backend,
        max_total_tokens=tokens,
        chunked_prefill_size=256,
    )


@pytest.mark.parametrize(("family", "tokens"), [("llama", 500), ("gemma3_text", 300)])
def test_a_request_retracted_for_want_of_memory_resumes_from_what_is_left(tmp_path, family, tokens):
    roomy = answered(family, tmp_path, 8192, "jenga")

    run = answered(family, tmp_path, tokens, "jenga")

    assert run.retractions > 0
    assert run.outputs == roomy.outputs
    assert roomy.hit_tokens == 0
    assert run.hit_tokens > 0


def test_stock_sglang_computes_it_again(tmp_path):
    run = answered("llama", tmp_path, 500, "default")

    assert run.retractions > 0
    assert run.hit_tokens == 0


# ---- requests are retracted on demand -------------------------------------------------------

WAYS = {
    "llama": {},
    "gemma3_text": {"page_size": 16},
    "qwen3_next": {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True},
    "falcon_h1": {"mamba_radix_cache_strategy": "extra_buffer"},
    "jamba": {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True},
}
NEW_TOKENS = 100


def disturbed(family: str, folder, prepare: Callable[[], None] | None, count: int = 3) -> Run:
    """So many answers in a pool that is large enough."""
    states = {"max_mamba_cache_size": 60} if family in STATE_FAMILIES else {}
    return run_engine(
        model_of(family, folder),
        [strangers(count)],
        max_new_tokens=NEW_TOKENS,
        env=EXACT,
        prepare=prepare,
        memory_backend="jenga",
        max_total_tokens=4096,
        **(WAYS[family] | states),
    )


def prepare(family: str, folder: Path):
    """The folder with the model, and what is answered where nothing happens."""
    return folder, disturbed(family, folder, None)


@pytest.mark.parametrize("family", WAYS)
def test_a_retracted_request_resumes_from_its_last_token_or_state(prepared, family: str):
    folder, undisturbed = prepared(family)

    run = disturbed(family, folder, lambda: retract_every(40))

    assert run.outputs == undisturbed.outputs
    assert run.retractions >= 2
    # States are tracked every so many tokens; everything else is there to the last whole page.
    assert run.hit_tokens >= run.retractions * (64 if family == "falcon_h1" else 70 + 20)


@pytest.mark.parametrize("family", WAYS)
def test_after_a_pause_requests_resume_from_their_prompts(prepared, family: str):
    """The weights may have changed: answers are computed again."""
    folder, undisturbed = prepared(family)

    def pause_and_go_on(scheduler) -> None:
        pause(scheduler)
        go_on(scheduler)

    run = disturbed(family, folder, lambda: interrupt(all_have(3, 20), pause_and_go_on))

    assert run.outputs == undisturbed.outputs
    assert run.hit_tokens == 3 * (64 if family in ("gemma3_text", "falcon_h1") else 70)


def test_of_thoughts_that_sglang_strips_nothing_is_left(tmp_path):
    """Under --strip-thinking-cache a request leaves its prompt alone, and so if it is retracted."""

    def prepare() -> None:
        count_every_token_as_a_thought()
        retract_every(40)

    def answers(**arguments) -> Run:
        return run_engine(
            model_of("llama", tmp_path),
            [strangers(3)],
            max_new_tokens=NEW_TOKENS,
            prepare=prepare,
            memory_backend="jenga",
            max_total_tokens=4096,
            **arguments,
        )

    kept, stripped = answers(), answers(strip_thinking_cache=True)

    assert stripped.outputs == kept.outputs
    assert kept.retractions == stripped.retractions >= 2
    assert kept.hit_tokens > 70 * kept.retractions
    assert stripped.hit_tokens == 70 * stripped.retractions


def count_every_token_as_a_thought() -> None:
    """The tiny tokenizer has no token that ends a thought, so SGLang counts none."""
    from sglang.srt.managers.scheduler_components import batch_result_processor

    def think(self, req, token_ids) -> None:
        req.reasoning_tokens += 1

    batch_result_processor.SchedulerBatchResultProcessor._maybe_update_reasoning_tokens = think

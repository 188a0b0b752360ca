"""A model of windows alone: nothing is held of a long request but its window, and slots that name
its tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.pressure import admit_too_many
from sglang_jenga.testing.tiny_models import VOCAB_SIZE
from tests.servers.parity import differing, model_of

pytestmark = pytest.mark.slow

FAMILY = "ministral_windows"
NEW_TOKENS = 40
FEW_TOKENS = 240
"""Stock's bytes of so many tokens, of which 24 requests need a window of 32 each."""


def short_prompts() -> list[list[int]]:
    """Shorter than the window: they grow as they are answered. With this seed no two tokens that
    an answer has to choose between are closer than 3e-4; with others rounding may choose."""
    rng = random.Random(12)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(4, 14))] for _ in range(24)]


def serve(model: Path, **arguments) -> Run:
    prompts = short_prompts()

    def go_on(answers: list[list[list[int]]]) -> list[list[int]]:
        pairs = zip(prompts, answers[0], strict=True)
        return [prompt + answer + [7, 8, 9] for prompt, answer in pairs]

    return run_engine(model, [prompts, go_on], max_new_tokens=NEW_TOKENS, **arguments)


def prepare(family: str, folder: Path):
    model = model_of(family, folder)
    return model, serve(model)


@pytest.mark.parametrize(
    ("page_size", "radix"), [(1, True), (16, False)], ids=["page 1", "page 16 without radix cache"]
)
def test_retracted_requests_get_the_tokens_of_stock(prepared, page_size: int, radix: bool):
    model, expected = prepared(FAMILY)

    run = serve(
        model,
        memory_backend="jenga",
        page_size=page_size,
        disable_radix_cache=not radix,
        max_total_tokens=FEW_TOKENS,
        prepare=admit_too_many,
    )

    assert differing(expected, run) == 0
    assert run.retractions > 0


def test_a_long_request_takes_no_more_than_its_window(prepared):
    """Six times the tokens that stock's bytes hold."""
    model, _ = prepared(FAMILY)
    rng = random.Random(6)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(6 * FEW_TOKENS)]

    stock = run_engine(model, [[prompt]], max_new_tokens=8, chunked_prefill_size=64)
    run = run_engine(
        model,
        [[prompt]],
        max_new_tokens=8,
        chunked_prefill_size=64,
        memory_backend="jenga",
        max_total_tokens=FEW_TOKENS,
    )

    assert run.outputs == stock.outputs

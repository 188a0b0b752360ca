"""Weights are exchanged while requests wait, and the cache is kept: tokens are those of stock."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, FULL_KV, STOCK_STATES
from sglang_jenga.testing.pressure import (
    all_have,
    exchange_weights,
    go_on,
    interrupt,
    pause,
    retract_every,
)
from sglang_jenga.testing.tiny_models import (
    STATE_FAMILIES,
    VOCAB_SIZE,
    WINDOW_FAMILIES,
    write_tiny_model,
)
from tests.servers.parity import WINDOW

pytestmark = pytest.mark.slow

ANSWERED = 20
NEW_TOKENS = 60


def write_models(family: str, folder: Path) -> list[Path]:
    """A family's model twice, with different weights."""
    layers = 6 if family in WINDOW_FAMILIES else None if family in STATE_FAMILIES else 3
    return [
        write_tiny_model(
            family, folder / f"{family}{seed}", num_layers=layers, window=WINDOW, seed=seed
        )
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lambda family: write_models(family, folder)


def prompts(count: int, length: int = 70) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


def tell_who_waits(scheduler) -> None:
    """Print each waiting request's prompt and what is answered of it."""
    for req in scheduler.waiting_queue:
        print("WAITS", json.dumps([list(req.origin_input_ids), list(req.output_ids)]), flush=True)


def who_waited(run: Run) -> list[tuple[list[int], list[int]]]:
    """What `tell_who_waits` told of."""
    return [json.loads(line) for line in re.findall(r"^WAITS (.*)$", run.log, flags=re.M)]


def served(family: str, models, backend: str, *, exchanged: bool = True) -> Run:
    """Three answers, of which the weights change after a third."""
    model, other = models(family)

    def act(scheduler) -> None:
        pause(scheduler)
        exchange_weights(scheduler, other)
        go_on(scheduler)

    full_kv = FULL_KV.get(family, {}) if backend == "default" else {}
    states = STOCK_STATES if family in STATE_FAMILIES else {}
    return run_engine(
        model,
        [prompts(3)],
        max_new_tokens=NEW_TOKENS,
        env=EXACT,
        prepare=lambda: interrupt(all_have(3, ANSWERED), act if exchanged else lambda _: None),
        memory_backend=backend,
        max_total_tokens=8192,
        **(full_kv | states),
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "jamba"])
def test_after_a_pause_an_answer_is_computed_again_with_the_new_weights(models, family: str):
    old = served(family, models, "default", exchanged=False)
    stock = served(family, models, "default")
    assert all(
        ours[:ANSWERED] == theirs[:ANSWERED] and ours != theirs
        for ours, theirs in zip(stock.outputs[0], old.outputs[0], strict=True)
    )

    run = served(family, models, "jenga")

    assert run.outputs == stock.outputs


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_who_was_retracted_before_does_not_resume_from_old_weights_either(models, family: str):
    model, other = models(family)

    def prepare() -> None:
        retract_every(ANSWERED)
        interrupt(somebody_was_retracted, act)

    def somebody_was_retracted(scheduler) -> bool:
        return any(req.output_ids for req in scheduler.waiting_queue)

    def act(scheduler) -> None:
        pause(scheduler)
        tell_who_waits(scheduler)
        exchange_weights(scheduler, other)
        go_on(scheduler)

    asked = prompts(4)

    run = run_engine(
        model,
        [asked],
        max_new_tokens=NEW_TOKENS,
        prepare=prepare,
        memory_backend="jenga",
        max_total_tokens=8192,
    )

    begun = [(prompt, answer) for prompt, answer in who_waited(run) if answer]
    assert len(begun) == len(asked)
    rest = run_engine(
        other,
        [[prompt + answer for prompt, answer in begun]],
        max_new_tokens=[NEW_TOKENS - len(answer) for _, answer in begun],
        max_total_tokens=8192,
        **FULL_KV.get(family, {}),
    ).outputs[0]
    answers = [run.outputs[0][asked.index(prompt)] for prompt, _ in begun]
    assert answers == [answer + more for (_, answer), more in zip(begun, rest, strict=True)]

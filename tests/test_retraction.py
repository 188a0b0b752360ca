"""A retracted request resumes from what it had computed; stock SGLang computes it again."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_jenga.tiny_models import VOCAB_SIZE
from tests.engines import Run, run_engine
from tests.parity import EXACT, model_of
from tests.pressure import admit_too_many
from tests.serving import Server
from tests.warm_launcher import WarmLauncher

pytestmark = pytest.mark.slow
STRANGERS = 12
"""Prompts with nothing in common: whatever hits is a request's own."""


def strangers(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(70)] for _ in range(count)]


def hit_tokens(log: str) -> int:
    return sum(map(int, re.findall(r"#cached-token: (\d+)", log)))


# ---- memory runs short: the longer it stays so, the less is left ----------------------------


def answered(family: str, folder, tokens: int, backend: str) -> Run:
    return run_engine(
        model_of(family, folder),
        [strangers(STRANGERS)],
        max_new_tokens=60,
        prepare=admit_too_many,
        memory_backend=backend,
        max_total_tokens=tokens,
        chunked_prefill_size=256,
    )


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_request_retracted_for_want_of_memory_resumes_from_what_is_left(tmp_path, family):
    roomy = answered(family, tmp_path, 8192, "jenga")

    run = answered(family, tmp_path, 500, "jenga")

    assert run.retractions > 0
    assert run.outputs == roomy.outputs
    assert hit_tokens(roomy.log) == 0
    assert hit_tokens(run.log) > 0


def test_stock_sglang_computes_it_again(tmp_path):
    run = answered("llama", tmp_path, 500, "default")

    assert run.retractions > 0
    assert hit_tokens(run.log) == 0


# ---- everything is retracted on demand ------------------------------------------------------

WAYS = {
    "llama": (),
    "gemma3_text": ("--page-size", "16"),
    "qwen3_next": ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"),
    "falcon_h1": ("--mamba-radix-cache-strategy", "extra_buffer"),
}


@pytest.fixture(scope="module")
def launcher():
    with WarmLauncher() as launcher:
        yield launcher


@pytest.mark.parametrize("family", WAYS)
def test_after_a_pause_requests_resume_from_their_last_token_or_state(tmp_path, launcher, family):
    flags = ("--memory-backend", "jenga", "--decode-log-interval", "1", *WAYS[family])
    states = ("--max-mamba-cache-size", "60") * (family in ("qwen3_next", "falcon_h1"))
    prompts, new_tokens = strangers(3), 150
    model = model_of(family, tmp_path)
    pool = ("--max-total-tokens", "4096", *states)
    with (
        Server(model, *pool, *flags, env=EXACT, launcher=launcher) as server,
        ThreadPoolExecutor() as threads,
    ):
        undisturbed = server.generate(prompts, new_tokens)
        server.flush_cache()
        before = server.log()
        answers = threads.submit(server.generate, prompts, new_tokens)
        while server.log()[len(before) :].count("#running-req: 3,") < 20:
            time.sleep(0.02)
        server.post("/pause_generation", {"mode": "retract"})
        server.post("/continue_generation", {})
        resumed = answers.result()
        hits = hit_tokens(server.log()[len(before) :])

    assert [answer.output_ids for answer in resumed] == [a.output_ids for a in undisturbed]
    # States are tracked every so many tokens; everything else is there to the last whole page.
    assert hits >= 3 * (64 if family == "falcon_h1" else 70)

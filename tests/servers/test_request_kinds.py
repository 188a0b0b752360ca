"""Requests that are more than one answer to one prompt: stock SGLang's answers, or a refusal."""

from __future__ import annotations

import random

import pytest
import requests

from sglang_jenga.testing.families import EXACT
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_models import VOCAB_SIZE
from sglang_jenga.testing.warm import shared_warm_launcher
from tests.servers.parity import model_of

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "gemma3_text")


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """Stock and jenga with one model, on a pool for a few of the requests at a time."""
    model = model_of(request.param, tmp_path_factory.mktemp("models"))
    pool = ("--max-total-tokens", "600", "--disable-hybrid-swa-memory")
    warm = shared_warm_launcher()
    stock = Server(model, *pool, env=EXACT, launcher=warm)
    jenga = Server(model, *pool[:2], "--memory-backend", "jenga", env=EXACT, launcher=warm)
    with stock, jenga:
        yield stock, jenga


def words(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]


def generate(server: Server, **sampling):
    body = {"input_ids": words(60, 1), "sampling_params": {"temperature": 0, **sampling}}
    reply = requests.post(f"{server.url}/generate", json=body, timeout=120)
    return reply.status_code, reply.json()


def test_several_answers_to_one_prompt_are_those_of_stock(both):
    answers = []
    for server in both:
        status, replies = generate(server, n=4, max_new_tokens=40, ignore_eos=True)
        assert status == 200
        answers.append([reply["output_ids"] for reply in replies])
    assert len(answers[0]) == 4
    assert answers[0] == answers[1]


def test_scores_are_those_of_stock(both):
    """A prompt per item, none of which is decoded."""
    body = {
        "query": words(80, 2),
        "items": [words(10 + i, 3 + i) for i in range(12)],
        "label_token_ids": [5, 7, 11],
        "apply_softmax": True,
        "model": "tiny",
    }
    stock, jenga = (server.post("/v1/score", body).json()["scores"] for server in both)
    assert len(jenga) == 12
    for theirs, ours in zip(stock, jenga, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"n": 2}])
def test_beams_are_refused_with_status_400_and_the_server_goes_on(both, more):
    _, jenga = both
    status, reply = generate(jenga, beam_width=4, max_new_tokens=8, **more)
    assert status == 400
    assert "beam search" in str(reply).lower()
    assert generate(jenga, max_new_tokens=8)[0] == 200
    assert jenga.alive()


def test_embeddings_are_those_of_stock(tmp_path):
    warm = shared_warm_launcher()
    model = model_of("llama", tmp_path)
    prompts = [words(30 + 7 * i, i) for i in range(20)]
    found = []
    for flags in ((), ("--memory-backend", "jenga")):
        pool = ("--max-total-tokens", "600", "--is-embedding")
        with Server(model, *pool, *flags, env=EXACT, launcher=warm) as server:
            replies = server.post("/encode", {"input_ids": prompts}).json()
            found.append([reply["embedding"] for reply in replies])
            server.flush_cache()
    for stock, ours in zip(*found, strict=True):
        assert ours == pytest.approx(stock, abs=1e-5)

"""Workloads of a full server: what can be reused, how popular it is, and when requests come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.replay.crowds import Bursts, CodingAgents, Passages, Tenants
from benchmarks.replay.draws import zipf
from benchmarks.replay.facts import causality_fault, facts, reusable_tokens
from benchmarks.replay.requests import VOCABULARY

TENANTS = Tenants(
    tenants=3, requests=20, system=(100, 140), question=(10, 30), answer=(4, 8), rate=5.0
)
BURSTS = Bursts(bursts=3, size=5, gap=9.0, system=64, question=(20, 60), answer=(4, 8))
PASSAGES = Passages(
    passages=12, passage=50, picked=4, requests=15, instructions=30, question=6, answer=8
)
CODERS = CodingAgents(
    sessions=4, turns=6, system=300, repositories=2, repository=100, own=50, result=40
)
TOLERANCE = 4
"""Tokens that unrelated prompts may share by chance; about 1 pair of prompts in 131,071 does."""


def test_a_tenants_questions_reuse_its_system_prompt():
    workload = TENANTS.build()
    got = facts(workload)
    tenants = {request.prompt[:100].tobytes(): request for request in workload.requests}

    assert (got.requests, got.output_tokens) == (20, 20 * 6)
    assert len(tenants) == 3
    # Of 100, 120 and 140 tokens; the rest of a prompt is its question.
    assert got.prompt_tokens - got.reusable_tokens == pytest.approx(360 + 20 * 20, abs=TOLERANCE)


def test_some_tenants_are_asked_far_more_than_others():
    asked = [request.prompt[:2000].tobytes() for request in Tenants().build().requests]
    counts = sorted((asked.count(head) for head in set(asked)), reverse=True)

    assert len(counts) <= 64 and sum(counts) == 600
    # By Zipf's law of exponent 1 the first of 64 gets 21 % and the last 1 in 300.
    assert counts[0] > 90 and counts[-1] < 6


def test_requests_come_in_bursts_behind_one_system_prompt():
    workload = BURSTS.build()
    got = facts(workload)

    assert (got.requests, got.output_tokens) == (15, 15 * 6)
    assert got.prompt_tokens == 15 * (64 + 40)
    assert 14 * 64 <= got.reusable_tokens <= 14 * 64 + TOLERANCE
    for place, request in enumerate(workload.requests):
        assert request.after is None
        assert 0 <= request.at - 9.0 * (place // 5) < 0.5


def test_prompts_of_passages_reuse_them_only_in_the_same_order():
    workload = PASSAGES.build()
    got = facts(workload)

    assert (got.requests, got.output_tokens) == (15, 15 * 8)
    assert got.prompt_tokens == 15 * (30 + 4 * 50 + 6)
    # The instructions, and as many whole passages as came first in an earlier prompt too.
    hits = reusable_tokens(workload)
    assert hits[0] == 0
    assert {(hit - 30) % 50 for hit in hits[1:]} <= set(range(TOLERANCE))
    assert max(hits) > 30 and min(hits[1:]) < 30 + 50


def test_passages_of_a_prompt_are_all_different():
    for request in PASSAGES.build().requests:
        parts = request.prompt[30:-6].reshape(4, 50)
        assert len({part.tobytes() for part in parts}) == 4


def test_a_coding_session_goes_on_from_its_answers_or_begins_again():
    requests = {
        request.rid: request for request in replace(CODERS, reset_share=0.4).build().requests
    }
    first = {s: requests[f"agentic-{s}-0"].prompt for s in range(4)}
    assert len({prompt[400:404].tobytes() for prompt in first.values()}) == 4

    went_on = began_again = 0
    for request in requests.values():
        if request.after is None:
            continue
        said = np.concatenate([requests[request.after].prompt, requests[request.after].output])
        goes_on = np.array_equal(request.prompt[: said.size], said)
        went_on += goes_on
        began_again += not goes_on
        assert np.array_equal(request.prompt[:400], first[int(request.rid.split("-")[1])][:400])
    assert (went_on + began_again, began_again > 0) == (4 * 5, True)
    assert went_on > began_again


@pytest.mark.parametrize(("longest", "exceeds"), [(3000, False), (120_000, True)])
def test_a_coding_sessions_context_stays_below_its_bound(longest, exceeds):
    workload = replace(CODERS, turns=60, longest=longest, reset_share=0.0).build()

    most = max(request.prompt.size for request in workload.requests)
    assert most <= longest and (most > 3000) == exceeds


def test_popularity_falls_by_a_power_of_the_rank():
    shares = zipf(4, 1.0)

    assert shares.sum() == pytest.approx(1)
    assert shares / shares[0] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert zipf(3, 0.0) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    "spec", [TENANTS, BURSTS, PASSAGES, CODERS], ids=lambda spec: type(spec).__name__
)
def test_requests_are_causal_and_their_tokens_in_the_vocabulary(spec):
    workload = spec.build()

    if spec is BURSTS:  # listed burst by burst, whoever of a burst arrives first
        in_time = sorted(workload.requests, key=lambda request: request.at)
        workload = replace(workload, requests=tuple(in_time))
    assert causality_fault(workload) is None
    for request in workload.requests:
        for ids in (request.prompt, request.output):
            assert ids.dtype == np.int64 and ids.ndim == 1
            assert ids.min() >= 1 and ids.max() < VOCABULARY


@pytest.mark.parametrize(
    "spec", [TENANTS, BURSTS, PASSAGES, CODERS], ids=lambda spec: type(spec).__name__
)
def test_a_workload_is_the_same_every_time_and_another_with_another_seed(spec):
    def play(workload):
        return [(r.rid, r.prompt.tobytes(), r.output.tobytes(), r.at) for r in workload.requests]

    assert play(spec.build()) == play(spec.build())
    assert play(replace(spec, seed=99).build()) != play(spec.build())

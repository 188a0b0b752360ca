"""Workers behind `sglang-router`, started by the commands of docs/operations.md.

A worker says who it is by the weight version that comes with each of its answers.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import requests

from sglang_jenga.testing.servers import Answer, Server
from sglang_jenga.testing.tiny_models import VOCAB_SIZE
from tests.servers.parity import model_of
from tests.servers.routing import Router, commands, worker

pytestmark = pytest.mark.slow

NEW_TOKENS = 24
TENANTS = 6
POOL = ("--max-total-tokens", "2000")


def prepare(family: str, folder: Path) -> Path:
    return model_of(family, folder)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]


RNG = random.Random(18)
SYSTEMS = [tokens(RNG, 90) for _ in range(TENANTS)]
CHATS = [[system + tokens(RNG, 12) for system in SYSTEMS] for _ in range(4)]
"""Rounds of one chat per tenant, each of which begins with its tenant's system prompt."""


@pytest.fixture(scope="module")
def workers(prepared) -> Iterator[list[Server]]:
    model = prepared("gemma3_text")
    with ExitStack() as stack:
        first, second, _ = commands("Behind a router")
        servers = [
            stack.enter_context(worker(command, model, *POOL, "--weight-version", name))
            for command, name in ((first, "0"), (second, "1"))
        ]
        assert {server.server_info()["memory_backend"] for server in servers} == {"jenga"}
        yield servers


@pytest.fixture(scope="module")
def routed(workers) -> Iterator[Callable[[str], Router]]:
    """By policy the router before the two workers."""
    with ExitStack() as stack:
        command = commands("Behind a router")[2]
        yield cache(
            lambda policy: stack.enter_context(Router(command, workers, "--policy", policy))
        )


@pytest.fixture(scope="module")
def expected(workers: list[Server]) -> list[list[list[int]]]:
    """What one worker answers by itself."""
    return [outputs(workers[0].generate(chats, NEW_TOKENS)) for chats in CHATS]


def outputs(answers: list[Answer]) -> list[list[int]]:
    return [answer.output_ids for answer in answers]


def who(answer: Answer) -> int:
    return int(answer.meta["weight_version"])


def counted(server: Server, name: str) -> float:
    """A metric of a worker, over all its labels."""
    return sum(
        value for sample, value in server.metrics().items() if sample.startswith(f"sglang:{name}{{")
    )


@pytest.mark.parametrize("policy", ["cache_aware", "round_robin", "power_of_two"])
def test_answers_are_one_workers_and_what_workers_count_is_what_they_answered(
    workers, routed, expected, policy: str
):
    router = routed(policy)
    for server in workers:
        server.flush_cache()
    names = ("prompt_tokens_total", "cached_tokens_total")
    before = [[counted(server, name) for name in names] for server in workers]

    rounds = [router.generate(chats, NEW_TOKENS) for chats in CHATS]

    assert [outputs(answers) for answers in rounds] == expected
    for name, (server, counts) in enumerate(zip(workers, before, strict=True)):
        mine = [answer for answers in rounds for answer in answers if who(answer) == name]
        assert mine, f"{policy} sent nothing to worker {name}"
        grown = [counted(server, metric) - old for metric, old in zip(names, counts, strict=True)]
        prompts = sum(answer.meta["prompt_tokens"] for answer in mine)
        assert grown == [prompts, sum(answer.cached_tokens for answer in mine)]
    if policy == "cache_aware":
        homes = [[who(answer) for answer in answers] for answers in rounds]
        assert homes == len(CHATS) * [homes[0]]
        for answers in rounds[1:]:
            assert all(answer.cached_tokens >= len(SYSTEMS[0]) for answer in answers)


def usage(server: Server) -> tuple[int, float]:
    """Running requests of a worker and its token usage, as balancers read them."""
    (load,) = server.loads()["loads"]
    return load["num_running_reqs"], load["token_usage"]


def becomes_idle(server: Server) -> None:
    """Its prefixes stay cached."""
    deadline = time.monotonic() + 10
    while (now := usage(server)) != (0, 0.0):
        assert time.monotonic() < deadline, now


def test_the_token_usage_of_a_busy_worker_is_above_that_of_an_idle_one(workers, routed):
    """Behind the router that sends all chats of a tenant to one worker."""
    for server in workers:
        becomes_idle(server)
    router = routed("cache_aware")
    chats = [SYSTEMS[0] + [3 + number] for number in range(4)]

    homes, seen = set(), []

    def while_all_run():
        return [now for now in seen if homes and now[min(homes)][0] == len(chats)]

    with ThreadPoolExecutor() as threads:
        router.generate(chats[:1], 1)
        for _ in range(10):  # a busy machine may look too late
            asked = threads.submit(router.generate, chats, 400)
            while not asked.done():
                seen.append([usage(server) for server in workers])
            homes |= {who(answer) for answer in asked.result()}
            if while_all_run():
                break

    assert len(homes) == 1
    running, busy = while_all_run(), homes.pop()
    assert running
    # One layer of six holds 4 x 400 tokens at last, where stock's six would hold 2,000.
    assert max(now[busy][1] for now in running) > 1600 / 2000 / 6
    assert all(now[1 - busy] == (0, 0.0) for now in seen)
    for server in workers:
        becomes_idle(server)


def ask(router: Router, prompt: list[int], new_tokens: int) -> requests.Response:
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params}
    return requests.post(f"{router.url}/generate", json=body, timeout=120)


def test_a_worker_that_is_killed_under_load_costs_nobody_a_right_answer(workers, prepared):
    """Not even the tenants that the router had sent to it."""
    flags = (*POOL, "--weight-version", "2")
    prompts = [chat for chats in CHATS[:3] for chat in chats]
    lengths = [20 * (2 + number) for number in range(len(prompts))]
    longest = outputs(workers[0].generate(prompts, max(lengths)))
    right = [answer[:length] for answer, length in zip(longest, lengths, strict=True)]
    _, command, router_command = commands("Behind a router")

    with worker(command, prepared("gemma3_text"), *flags) as victim:
        pair = [workers[0], victim]
        with (
            Router(router_command, pair) as router,
            ThreadPoolExecutor(len(prompts)) as threads,
        ):
            asked = [
                threads.submit(ask, router, *one) for one in zip(prompts, lengths, strict=True)
            ]
            while not (any(map(answered_by_victim, asked)) and usage(victim)[0]):
                assert not all(reply.done() for reply in asked), "the victim was done too early"
            os.killpg(victim.process.pid, signal.SIGKILL)
            replies = [reply.result() for reply in asked]
            later = [ask(router, *one) for one in zip(prompts[:4], lengths, strict=False)]

    assert {reply.status_code for reply in replies + later} == {200}
    answered = [reply.json() for reply in replies + later]
    assert [reply["output_ids"] for reply in answered] == right + right[:4]
    assert {reply["meta_info"]["weight_version"] for reply in answered[-4:]} == {"0"}


def answered_by_victim(asked: Future[requests.Response]) -> bool:
    return asked.done() and asked.result().json()["meta_info"]["weight_version"] == "2"


def test_the_router_tells_replicas_of_one_server_apart(prepared, expected):
    server_command, router_command = commands("Replicas of one server")

    with (
        worker(server_command, prepared("gemma3_text"), *POOL) as server,
        Router(router_command, [server]) as router,
    ):
        rounds = [router.generate(chats, NEW_TOKENS) for chats in CHATS]

    assert [outputs(answers) for answers in rounds] == expected
    homes = [[answer.meta["dp_rank"] for answer in answers] for answers in rounds]
    assert set(homes[0]) == {0, 1}
    assert homes == len(CHATS) * [homes[0]]
    for answers in rounds[1:]:
        assert all(answer.cached_tokens >= len(SYSTEMS[0]) for answer in answers)

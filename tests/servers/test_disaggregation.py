"""A prefill server and a decode server under the flag, with real bytes between two processes."""

from __future__ import annotations

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_jenga.testing.families import EXACT
from sglang_jenga.testing.servers import Server
from sglang_jenga.testing.tiny_models import VOCAB_SIZE
from sglang_jenga.testing.warm import WarmLauncher
from tests.servers.pair import NOBODY_WAITS_LONG, Pair, launcher_with_stand_ins
from tests.servers.parity import model_of
from tests.servers.ranks import begin_alike

pytestmark = pytest.mark.slow

NEW_TOKENS = 60
LENGTHS = (220, 40, 130, 220, 75, 220, 16, 33, 1)
SLOW = 0.3
"""Seconds of a transfer during which something happens."""
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
"""Somebody is retracted in each such step of two or more, whether or not the pool is full by then:
that depends on how many prompts have come. SGLang reads it when it is imported."""


@pytest.fixture(scope="module")
def warm():
    with launcher_with_stand_ins() as launcher:
        yield launcher


@pytest.fixture(scope="module")
def retracting():
    with launcher_with_stand_ins(RETRACTING) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def made(tmp_path_factory, warm):
    """Of a family: its model, prompts, and what one stock server of some flags answers."""
    known: dict[tuple[str, ...], tuple[Path, list[list[int]], list[list[int]]]] = {}

    def of(*asked: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        if asked not in known:
            family, *flags = asked
            model = model_of(family, tmp_path_factory.mktemp(family))
            rng = random.Random(0)
            prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in LENGTHS]
            with Server(model, *flags, env=EXACT, launcher=warm) as server:
                answers = [answer.output_ids for answer in server.generate(prompts, NEW_TOKENS)]
            known[asked] = model, prompts, answers
        return known[asked]

    return of


def retractions(log: str) -> int:
    said = r"(?:KV cache pool is full|Testing retraction).*#retracted_reqs: (\d+)"
    return sum(map(int, re.findall(said, log)))


def short_of_memory(
    model: Path, *flags: str, tokens: int, launchers: tuple[WarmLauncher, WarmLauncher]
) -> Pair:
    """Too many prompts come to its decode server, which keeps few tokens for their answers."""
    launcher, decode_launcher = launchers
    short = ("--max-total-tokens", str(tokens), "--num-reserved-decode-tokens", "2")
    return Pair(
        model, *flags, decode_flags=short, decode_launcher=decode_launcher, launcher=launcher
    )


def require_retractions(pair: Pair, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert pair.generate(prompts, NEW_TOKENS) == expected
    assert retractions(pair.decode.log()) > 0
    pair.require_all_back()


@pytest.mark.parametrize(
    ("family", "page_size"),
    [
        ("llama", 1),
        pytest.param("gemma3_text", 1, marks=pytest.mark.wide),
        ("gemma3_text", 16),
        pytest.param("nemotron_h", 1, marks=pytest.mark.wide),
        ("qwen3_next", 16),
    ],
)
def test_two_servers_answer_as_one_stock_server(warm, made, family, page_size):
    """With room, and the same prompts again: the prefill server has them cached then."""
    model, prompts, expected = made(family)

    with Pair(model, "--page-size", str(page_size), launcher=warm) as pair:
        assert pair.generate(prompts, NEW_TOKENS) == expected
        first = pair.sent()
        assert pair.generate(prompts, NEW_TOKENS) == expected
        assert pair.sent() == 2 * first  # the decode server keeps nothing
        pair.require_all_back()


@pytest.mark.parametrize(
    ("family", "page_size", "tokens"),
    [
        pytest.param("llama", 16, 640, marks=pytest.mark.wide),
        ("gemma3_text", 1, 320),
        pytest.param("gemma3_text", 16, 224, marks=pytest.mark.wide),
        ("nemotron_h", 1, 420),
    ],
)
def test_a_decode_server_that_is_short_of_memory_retracts_and_goes_on(
    warm, retracting, made, family, page_size, tokens
):
    model, prompts, expected = made(family)
    flags = ("--page-size", str(page_size))

    with short_of_memory(model, *flags, tokens=tokens, launchers=(warm, retracting)) as pair:
        require_retractions(pair, prompts, expected)


@pytest.mark.parametrize(
    ("family", "page_size"),
    [
        pytest.param("llama", 16, marks=pytest.mark.wide),
        ("gemma3_text", 1),
        pytest.param("nemotron_h", 1, marks=pytest.mark.wide),
    ],
)
def test_a_prefill_server_that_is_short_of_memory_waits_for_its_transfers(
    warm, made, family, page_size
):
    """Prompts come in chunks, and pages that are being sent belong to nobody else."""
    model, prompts, expected = made(family)
    short = ("--max-total-tokens", "320", "--chunked-prefill-size", "64")

    with Pair(
        model,
        *("--page-size", str(page_size)),
        prefill_flags=short,
        seconds=0.05,
        launcher=warm,
    ) as pair:
        assert pair.generate(prompts, NEW_TOKENS) == expected
        pair.require_all_back()


TWO_RANKS = ("--tp", "2")


@pytest.mark.parametrize(
    ("family", "page_size", "tokens"),
    [
        pytest.param("llama", 1, 640, marks=pytest.mark.wide),
        ("gemma3_text", 16, 224),
        pytest.param("nemotron_h", 1, 420, marks=pytest.mark.wide),
    ],
)
def test_two_ranks_send_to_two_others_that_are_short_of_memory(
    warm, retracting, made, family, page_size, tokens
):
    """Each rank sends the heads and states that it has to its peer. Tokens are those of two of
    stock's ranks: sums of two halves are rounded otherwise than sums of all."""
    model, prompts, expected = made(family, *TWO_RANKS)
    flags = (*TWO_RANKS, "--page-size", str(page_size))

    with short_of_memory(model, *flags, tokens=tokens, launchers=(warm, retracting)) as pair:
        require_retractions(pair, prompts, expected)
        for server in (pair.prefill, pair.decode):
            assert begin_alike(server.log())


def test_of_windows_only_what_the_next_step_reads_is_sent(warm, made):
    """Stock stores windows of these models in full, and sends them so."""
    model, prompts, expected = made("gemma3_text")
    sent = {}
    for backend in ("default", "jenga"):
        with Pair(model, backend=backend, launcher=warm) as pair:
            assert pair.generate(prompts[:1], NEW_TOKENS) == expected[:1]
            sent[backend] = pair.sent()

    print(f"bytes of a prompt of {LENGTHS[0]} tokens: {sent}")
    assert sent["jenga"] < 0.5 * sent["default"]


def test_requests_that_are_aborted_on_their_way_lose_nothing(warm, made):
    model, prompts, expected = made("gemma3_text")

    with Pair(model, seconds=SLOW, launcher=warm) as pair, ThreadPoolExecutor(9) as threads:
        replies = [
            threads.submit(pair.ask, prompt, NEW_TOKENS, f"r{at}")
            for at, prompt in enumerate(prompts)
        ]
        time.sleep(SLOW / 2)
        for at in range(0, len(prompts), 2):
            for server in (pair.decode, pair.prefill):
                server.post("/abort_request", {"rid": f"r{at}"})
        answers = [reply.result() for reply in replies]
        for at, answer in enumerate(answers):
            if at % 2:
                assert answer.json()["output_ids"] == expected[at]
        assert sum(
            not answer.ok or answer.json()["meta_info"]["finish_reason"]["type"] == "abort"
            for answer in answers
        )
        pair.require_all_back()
        assert pair.generate(prompts, NEW_TOKENS) == expected


def test_a_prefill_server_that_dies_and_comes_back_loses_nothing(warm, made):
    """It dies while it sends the first prompts."""
    model, prompts, expected = made("gemma3_text")

    def kill_as_it_sends() -> None:
        while "Prefill batch" not in pair.prefill.log() and pair.prefill.alive():
            time.sleep(0.02)
        pair.prefill.__exit__()

    # It has a second to end in peace, in which two transfers may end of nine.
    with Pair(model, seconds=2 * SLOW, env=NOBODY_WAITS_LONG, launcher=warm) as pair:
        killer = threading.Thread(target=kill_as_it_sends)
        killer.start()
        with ThreadPoolExecutor(9) as threads:
            replies = list(threads.map(lambda prompt: pair.ask(prompt, NEW_TOKENS), prompts))
        killer.join()
        assert sum(not reply.ok for reply in replies) > 0
        for reply, answer in zip(replies, expected, strict=True):
            assert not reply.ok or reply.json()["output_ids"] == answer
        pair.prefill.__enter__()
        assert pair.generate(prompts, NEW_TOKENS) == expected
        pair.require_all_back()


@pytest.mark.parametrize(
    ("prefill_flags", "said"),
    [
        (("--page-size", "16"), "Page size mismatch"),
        (("--memory-backend", "default"), "its pool is not of --memory-backend jenga"),
        pytest.param(TWO_RANKS, "KV layout mismatch", marks=pytest.mark.wide),
    ],
)
def test_nothing_is_taken_from_a_server_whose_pages_lie_in_another_way(
    warm, made, prefill_flags, said
):
    model, prompts, _ = made("gemma3_text")

    with Pair(model, prefill_flags=prefill_flags, launcher=warm) as pair:
        reply = pair.ask(prompts[0], 4)

        assert not reply.ok
        assert f"jenga takes nothing from the prefill server 127.0.0.1:{pair.bootstrap_port}" in (
            log := pair.decode.log()
        )
        assert said in log
        assert log.count("jenga takes nothing") == 1  # though SGLang tries again and again
        assert pair.decode.alive()
        assert pair.sent() == 0


def test_nothing_is_sent_to_a_decode_server_without_the_flag(warm, made):
    """Stock compares no layout: its pages would be overwritten by ours, which are longer."""
    model, prompts, _ = made("gemma3_text")

    with Pair(model, decode_flags=("--memory-backend", "default"), launcher=warm) as pair:
        assert not pair.ask(prompts[0], 4).ok
        assert "jenga sends nothing to a decode server of other" in pair.prefill.log()


@pytest.mark.wide  # the answer has to outgrow the pool while the other prompt is on its way
def test_transfers_end_while_the_only_request_waits_for_their_pages(warm, made):
    """SGLang looks at no transfer while somebody is retracted: both would wait for ever."""
    model, prompts, _ = made("llama")
    first, second = (prompt[:60] for prompt in sorted(prompts, key=len)[-2:])
    with Server(model, env=EXACT, launcher=warm) as server:
        expected = [server.generate([first], 120)[0], server.generate([second], 20)[0]]
    short = ("--max-total-tokens", "200", "--num-reserved-decode-tokens", "2")

    with (
        Pair(model, decode_flags=short, seconds=8.0, launcher=warm) as pair,
        ThreadPoolExecutor(2) as threads,
    ):
        long_answer = threads.submit(pair.ask, first, 120, "long")
        time.sleep(7.5)
        short_answer = threads.submit(pair.ask, second, 20, "short")
        answers = [long_answer.result(), short_answer.result()]

        assert [answer.json()["output_ids"] for answer in answers] == [
            answer.output_ids for answer in expected
        ]
        assert retractions(pair.decode.log()) > 0
        pair.require_all_back()

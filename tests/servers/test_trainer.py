"""What a trainer does to a server of two ranks between two rounds: it pauses it, takes its memory,
gives other memory back, and exchanges the weights. Afterwards every rank answers as a fresh server
with those weights does."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT, FULL_KV, STOCK_STATES
from sglang_jenga.testing.pressure import (
    abort_all,
    all_have,
    exchange_weights,
    give_memory_back_and_take_it,
    go_on,
    interrupt,
    pause,
    stop_in_place,
)
from sglang_jenga.testing.tiny_models import STATE_FAMILIES
from tests.servers.ranks import begin_alike, this_rank
from tests.servers.test_weight_changes import (
    ANSWERED,
    NEW_TOKENS,
    prompts,
    tell_who_waits,
    who_waited,
    write_models,
)

pytestmark = pytest.mark.slow

ASKED = prompts(3)
AGAIN = [*ASKED[:2], ASKED[0][:40] + ASKED[1][:20]]


def prepare(family: str, folder: Path) -> list[Path]:
    return write_models(family, folder)


def serve(family: str, model: Path, backend: str, waves: list, **arguments: Any) -> Run:
    """On two ranks. Stock has its own full KV and states: what it computes is the reference."""
    full_kv = FULL_KV.get(family, {}) if backend == "default" else {}
    states = STOCK_STATES if family in STATE_FAMILIES else {}
    given = {
        "max_new_tokens": NEW_TOKENS,
        "env": EXACT | {"SGLANG_JENGA_COMPARE_RANKS": "1"},
        "memory_backend": backend,
        "tp_size": 2,
        "max_total_tokens": 8192,
    }
    return run_engine(model, waves, **(given | full_kv | states | arguments))


@pytest.fixture(scope="module")
def fresh(prepared) -> Callable[[str], list[list[int]]]:
    """What a fresh server with the new weights answers to the second wave; stock's."""
    return cache(lambda family: serve(family, prepared(family)[1], "default", [AGAIN]).outputs[0])


def move_to_other_memory(scheduler: Any) -> None:
    """And the new one reads as zeros on this rank, before anybody writes to it."""
    give_memory_back_and_take_it(scheduler)
    assert not scheduler.token_to_kv_pool_allocator.buffer.bytes.any()
    assert not scheduler.req_to_token_pool.req_to_token.any()


class Idle:
    """The second wave comes once something was done that followed upon the first."""

    def __init__(self) -> None:
        self._first_is_done = False
        self._done = multiprocessing.get_context("fork").Event()

    def plant(self, first: Callable[[Any], None], second: Callable[[Any], None]) -> None:
        """In the midst of the answers ``first`` is done, and ``second`` when nobody is left."""

        def begin(scheduler: Any) -> None:
            first(scheduler)
            self._first_is_done = True

        def end(scheduler: Any) -> None:
            second(scheduler)
            self._done.set()

        interrupt(all_have(3, ANSWERED), begin)
        interrupt(lambda scheduler: self._first_is_done and scheduler.is_fully_idle(), end)

    def then_again(self, _: Any) -> list[list[int]]:
        assert self._done.wait(60)
        return AGAIN


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_who_was_retracted_goes_on_with_new_weights_and_in_other_memory(
    prepared, fresh, family: str
):
    old, new = prepared(family)

    def act(scheduler: Any) -> None:
        pause(scheduler)
        if this_rank() == 0:
            tell_who_waits(scheduler)
        move_to_other_memory(scheduler)
        exchange_weights(scheduler, new, flush=True)
        go_on(scheduler)

    run = serve(
        family,
        old,
        "jenga",
        [ASKED, AGAIN],
        prepare=lambda: interrupt(all_have(3, ANSWERED), act),
    )

    begun = who_waited(run)
    assert len(begun) == len(ASKED)
    rest = serve(
        family,
        new,
        "default",
        [[prompt + answer for prompt, answer in begun]],
        max_new_tokens=[NEW_TOKENS - len(answer) for _, answer in begun],
    ).outputs[0]
    answers = [run.outputs[0][ASKED.index(prompt)] for prompt, _ in begun]
    assert answers == [answer + more for (_, answer), more in zip(begun, rest, strict=True)]
    assert run.outputs[1] == fresh(family)
    assert begin_alike(run.log)


def test_who_stopped_in_place_goes_on_as_in_stock_and_nobody_hits_what_it_left(prepared, fresh):
    old, new = prepared("gemma3_text")

    def exchange(scheduler: Any) -> None:
        stop_in_place(scheduler)
        exchange_weights(scheduler, new)
        go_on(scheduler)

    def flush(scheduler: Any) -> None:
        assert scheduler.flush_cache(empty_cache=False)

    def served(backend: str) -> Run:
        idle = Idle()
        waves = [ASKED, idle.then_again]
        return serve(
            "gemma3_text", old, backend, waves, prepare=lambda: idle.plant(exchange, flush)
        )

    run, stock = served("jenga"), served("default")

    assert run.outputs == stock.outputs
    assert run.outputs[1] == fresh("gemma3_text")
    assert begin_alike(run.log)


def test_after_an_abort_the_next_wave_is_answered_with_new_weights_in_other_memory(prepared, fresh):
    old, new = prepared("gemma3_text")
    idle = Idle()

    def exchange(scheduler: Any) -> None:
        move_to_other_memory(scheduler)
        exchange_weights(scheduler, new, flush=True)

    run = serve(
        "gemma3_text",
        old,
        "jenga",
        [ASKED, idle.then_again],
        prepare=lambda: idle.plant(abort_all, exchange),
    )

    assert all(ANSWERED <= len(answer) < NEW_TOKENS for answer in run.outputs[0])
    assert run.outputs[1] == fresh("gemma3_text")
    assert begin_alike(run.log)

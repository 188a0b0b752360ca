"""Who waits while prompts keep the GPU busy."""

from __future__ import annotations

import pytest

from sglang_jenga.serving.newcomers import BUSY_TOKENS, IDLE_TOKENS, MOST_HELD, STEPS, Newcomers

CHAT, NEWCOMER = (1000, 100), (100, 1000)  # tokens hit, tokens to compute


def rounds(
    newcomers: Newcomers, count: int, tokens: int = BUSY_TOKENS + 1, *, by_prefix: bool = True
) -> None:
    for _ in range(count):
        newcomers.note_tokens(tokens)
        newcomers.begin_round(by_prefix=by_prefix)


@pytest.fixture
def busy() -> Newcomers:
    """Prompts fill the steps, and conversations come back."""
    newcomers = Newcomers()
    newcomers.note_admitted(*CHAT)
    rounds(newcomers, 20 * STEPS)
    return newcomers


def test_who_computes_more_than_it_hits_waits_while_prompts_keep_the_gpu_busy(busy):
    assert busy.waits(*NEWCOMER)
    assert not busy.waits(*CHAT)
    assert not busy.waits(100, 100)


def test_nobody_waits_where_most_is_computed():
    newcomers = Newcomers()
    newcomers.note_admitted(*NEWCOMER)
    rounds(newcomers, 20 * STEPS)
    assert not newcomers.waits(*NEWCOMER)
    for _ in range(STEPS):
        newcomers.note_admitted(*CHAT)
    assert newcomers.waits(*NEWCOMER)


def test_nobody_waits_where_steps_are_mostly_decoding(busy):
    rounds(busy, 1, tokens=0)
    assert not busy.waits(*NEWCOMER)
    rounds(busy, 4)
    assert not busy.waits(*NEWCOMER), "one step that computes a prompt does not make it busy"


def test_nobody_waits_where_another_order_holds(busy):
    rounds(busy, 1, by_prefix=False)
    assert not busy.waits(*NEWCOMER)


def test_one_of_those_who_wait_gets_in_after_so_many_rounds(busy):
    released = False
    for _ in range(MOST_HELD):
        assert busy.waits(*NEWCOMER) and not released
        busy.note_tokens(BUSY_TOKENS + 1)
        released = busy.begin_round(by_prefix=True)
        busy.note_admitted(*CHAT)
    assert released and not busy.waits(*NEWCOMER)
    busy.note_admitted(*NEWCOMER)
    assert busy.waits(*NEWCOMER), "and the next waits as long"


def test_rounds_in_which_nobody_had_to_wait_do_not_count(busy):
    rounds(busy, 2 * MOST_HELD)
    assert busy.waits(*NEWCOMER)


def test_who_had_to_wait_is_asked_again_once_hardly_any_prompt_is_computed(busy):
    assert busy.waits(*NEWCOMER)
    released = []
    while not any(released):
        released.append(busy.begin_round(by_prefix=True))
    assert BUSY_TOKENS * (1 - 1 / STEPS) ** len(released) < IDLE_TOKENS
    assert not busy.begin_round(by_prefix=True), "it has been asked"


def test_who_had_to_wait_is_asked_again_where_another_order_holds(busy):
    assert busy.waits(*NEWCOMER)
    assert busy.begin_round(by_prefix=False)


def test_nobody_is_asked_again_who_did_not_wait(busy):
    assert not busy.begin_round(by_prefix=False)

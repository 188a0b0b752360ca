"""The byte bound of the benchmark of conversation-like lengths, by hand."""

from __future__ import annotations

from benchmarks.engines.bench_lengths import STATE_BYTES, TOKEN_BYTES, Lengths, bound_of, draw


def test_a_request_takes_its_state_and_all_its_tokens():
    assert Lengths(3, 4).taken == STATE_BYTES + 7 * TOKEN_BYTES


def test_the_bound_counts_who_runs_while_others_wait():
    """Room for two: two of 2 and 4 tokens, then the third runs beside the longer one, and the last
    waits for either. With a byte less the third waits for the longer one: 2, 2, 1, 1."""
    lengths = [Lengths(1, 2), Lengths(1, 4), Lengths(1, 4), Lengths(1, 1)]

    assert bound_of(lengths, 2 * Lengths(1, 4).taken) == 2
    assert bound_of(lengths, 2 * Lengths(1, 4).taken - 1) == 1.5


def test_lengths_are_those_of_the_means_that_are_given():
    lengths = draw(20_000)

    prompt, answer = (sum(part) / len(lengths) for part in zip(*lengths, strict=True))
    assert 11 < prompt < 13
    assert 21 < answer < 25

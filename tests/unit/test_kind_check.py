"""The check that writers of a layer type run finds what can be wrong in one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sglang_jenga.layers import agreement
from sglang_jenga.layers.base import Sliding
from sglang_jenga.layers.window import Window, WindowPolicy
from sglang_jenga.testing.kind_check import KindError, check_kind

WIDTH = 8


@dataclass(frozen=True)
class Faulty(Window):
    """A window with one answer exchanged: ``fault`` names it."""

    fault: str = ""

    def __getattribute__(self, name):
        fault = object.__getattribute__(self, "fault")
        if name == fault.partition("-")[0]:
            return FAULTS[fault][0].__get__(self)
        return object.__getattribute__(self, name)


class _Policy(WindowPolicy):
    __slots__ = ()


class _ReadsTheFirst(_Policy):
    def update_last_access(self, prefix):
        return ((0, 1), *WindowPolicy.update_last_access(self, prefix))


class _NeverHits(_Policy):
    def get_possible_prefix(self, prefix, cached):
        return 0


class _HitsAll(_Policy):
    def get_possible_prefix(self, prefix, cached):
        return prefix.length


FAULTS = {
    "dead-early": (lambda kind, n: (0, n - 5) if n > 5 else None, "which later ones read"),
    "dead-to come": (lambda kind, n: (0, n + 1), "which later ones read|tokens to come"),
    "dead-not for ever": (
        lambda kind, n: (0, n - 7 - 2 * (n % 3)) if n > 12 else None,
        "dead a token before",
    ),
    "dead-moving": (
        lambda kind, n: (n // 4, n - 7) if n > 14 else None,
        "dead a token before|begins at",
    ),
    "growth-too small": (lambda kind, n, tokens: 0, r"growth\(0, 1\) must be from 1 to 1, got 0"),
    "growth-too large": (lambda kind, n, tokens: tokens + 1, r"growth\(0, 0\) must be"),
    "step-none": (lambda kind, start, end, size: 0, r"step\(0, 2, 1\) must be 2, got 0"),
    "alive_pages-all": (lambda kind, n, size: -(-n // size), r"alive_pages\("),
    "held-too few": (lambda kind, load, size: 1, "holds 2 pages, held says 1"),
    "held-less of more": (
        lambda kind, load, size: 40 - load.tokens // 8,
        "of one less",
    ),
    "kept_behind-the last page": (lambda kind, n, size: kind.dead(n), "gives back the pages"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_found(fault):
    def reads(token):
        return set(range(max(0, token - WIDTH + 1), token))

    with pytest.raises(KindError, match=FAULTS[fault][1]):
        check_kind(Faulty(WIDTH, fault), reads)


@dataclass(frozen=True, slots=True)
class WithPolicy(Window):
    other: type = WindowPolicy

    @property
    def policy(self):
        return self.other(self.width - 1)


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (_ReadsTheFirst, r"dead\(8\) has the tokens \[0\], which later ones read"),
        (_NeverHits, "of 1 cached tokens 0 are a hit"),
        (_HitsAll, "are read that are not there"),
    ],
)
def test_a_policy_that_does_not_agree_is_found_without_a_second_rule(policy, why):
    with pytest.raises(KindError, match=why):
        check_kind(WithPolicy(WIDTH, policy))


def test_a_policy_that_reads_another_thing_than_is_meant_is_found():
    with pytest.raises(KindError, match="must be the tokens"):
        check_kind(Window(WIDTH), lambda token: set(range(max(0, token - WIDTH), token)))


@pytest.mark.parametrize("width", [8, 1000, 5000])
def test_a_policy_that_reads_what_is_dead_is_found_at_any_width(width):
    found = agreement.fault(WithPolicy(width, _ReadsTheFirst))

    assert found == (width, 0, True)


@pytest.mark.parametrize("width", [1, 8, 5000])
def test_lengths_are_tried_beside_every_multiple_of_a_width(width):
    tried = agreement.lengths_to_try(width)

    assert {width - 1, width, width + 1, 3 * width, 4 * width} - {0} <= set(tried)
    assert len(tried) < 3000


def test_what_a_layer_reads_must_be_kept_in_the_cache():
    found = agreement.fault(Window(8), lambda length: ((max(0, length - 7), length),))
    assert found is None
    found = agreement.fault(Window(8), lambda length: ((0, length),))
    assert str(found) == "the token at 8 reads the one at 0, which is given back by then"


def test_sinks_are_where_the_dead_tokens_begin():
    @dataclass(frozen=True, slots=True)
    class Sinks(Sliding):
        name = "sinks"
        width: int

        def dead(self, length):
            end = length - self.width + 1
            return (3, end) if end > 3 else None

    assert Sinks(8).sinks == 3
    assert Window(8).sinks == 0
    assert Sinks(8).gaps(None, 4) == 9

"""Random programs for the rig: what clients and operators may do, in any order, at any time."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.faces.rig import Rig
from tests.faces.symbols import ALPHABET, answer

LONGEST_PROMPT, LONGEST_ANSWER = 44, 24
TOKENS = st.integers(0, ALPHABET - 1)


class Submit(NamedTuple):
    """A new prompt: ``shared`` tokens of a head that others have as well, then its own."""

    shared: int
    own: list[int]
    max_new: int
    namespace: str | None
    known_length: bool
    stop: bool
    cached: bool

    def act(self, rig: Rig) -> None:
        head = answer([0, 1, 2], LONGEST_PROMPT)[: self.shared]
        _submit(rig, head + self.own, self)


class FollowUp(NamedTuple):
    """A prompt that begins with an earlier one and a part of its answer."""

    which: int
    part: int
    own: list[int]
    max_new: int
    namespace: str | None
    known_length: bool
    stop: bool
    cached: bool

    def act(self, rig: Rig) -> None:
        if rig.asked:
            asked = list(rig.asked.values())[self.which % len(rig.asked)]
            said = answer(asked.prompt, asked.max_new, (asked.namespace, None))
            begin = (asked.prompt + said)[: len(asked.prompt) + self.part]
            begin = begin[:LONGEST_PROMPT]
            _submit(rig, begin + self.own, self._replace(namespace=asked.namespace))


def _submit(rig: Rig, prompt: list[int], how: Submit | FollowUp) -> None:
    rig.submit(
        prompt or [0],
        how.max_new,
        namespace=how.namespace,
        known_length=how.known_length,
        stop=[1] if how.stop else [],
        cached=how.cached,
    )


class Turns(NamedTuple):
    count: int

    def act(self, rig: Rig) -> None:
        rig.turn(self.count)


class Finish(NamedTuple):
    """Let everybody come to an end."""

    def act(self, rig: Rig) -> None:
        if not rig.paused:
            rig.run()


class Abort(NamedTuple):
    which: int

    def act(self, rig: Rig) -> None:
        running = [rid for rid in rig.asked if rig.ended(rid) is None]
        if running:
            rig.abort(running[self.which % len(running)])


class Pause(NamedTuple):
    mode: str

    def act(self, rig: Rig) -> None:
        rig.pause(self.mode)
        rig.turn()


class Resume(NamedTuple):
    def act(self, rig: Rig) -> None:
        rig.resume()


class Retract(NamedTuple):
    """The next decode step takes place in a pool that is full."""

    def act(self, rig: Rig) -> None:
        rig.retract()


class Flush(NamedTuple):
    def act(self, rig: Rig) -> None:
        rig.flush()


_HOW = {
    "max_new": st.integers(1, LONGEST_ANSWER),
    "namespace": st.sampled_from([None, None, None, "x"]),
    "known_length": st.booleans(),
    "stop": st.sampled_from([False, False, True]),
    "cached": st.sampled_from([True, True, False]),
}
_SUBMIT = st.builds(Submit, shared=st.integers(0, 30), own=st.lists(TOKENS, max_size=14), **_HOW)
_FOLLOW_UP = st.builds(
    FollowUp,
    which=st.integers(0, 9),
    part=st.integers(-20, LONGEST_ANSWER),
    own=st.lists(TOKENS, max_size=6),
    **_HOW,
)
_TURNS = st.builds(Turns, st.integers(1, 8))
ACTIONS = st.one_of(
    _SUBMIT,
    _FOLLOW_UP,
    _TURNS,
    _SUBMIT,
    _FOLLOW_UP,
    _TURNS,
    st.builds(Finish),
    st.builds(Abort, st.integers(0, 9)),
    st.builds(Pause, st.sampled_from(["retract", "in_place"])),
    st.builds(Resume),
    st.builds(Retract),
    st.builds(Flush),
)


def play(rig: Rig, program: list[Any]) -> None:
    """Play a program to its end, after which nothing may be missing."""
    for action in program:
        action.act(rig)
    if rig.paused:
        rig.resume()
    rig.run()
    rig.check_nothing_lost()

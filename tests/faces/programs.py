"""Random programs for the rig: what clients and operators may do, in any order, at any time."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.faces.rig import Rig
from tests.faces.symbols import ALPHABET, answer

HEAD = answer([0, 1, 2], 60)
"""What many prompts begin with."""


class How(NamedTuple):
    """The rest of a request, as in `Rig.submit`; ``stop``: a token that ends its answer early."""

    max_new: int
    namespace: str | None = None
    known_length: bool = True
    stop: int | None = None
    cached: bool = True

    def submit(self, rig: Rig, prompt: list[int]) -> None:
        """A request longer than the rig's programs may ask for is cut; one that leaves nothing in
        the trees, whose windows nobody gives back while it is in flight, at half of that."""
        most = rig.most_tokens if self.cached else rig.most_tokens // 2
        prompt = prompt[: max(2, most - self.max_new)]
        stop = [] if self.stop is None else [self.stop]
        rig.submit(prompt, **self._replace(stop=stop)._asdict())


class Submit(NamedTuple):
    """A new prompt: ``shared`` tokens of a head that others have as well, then ``own`` more."""

    shared: int
    own: int
    text: int
    how: How

    def act(self, rig: Rig) -> None:
        self.how.submit(rig, HEAD[: self.shared] + answer([self.text], 1 + self.own))


class FollowUp(NamedTuple):
    """A prompt that begins with an earlier one and ``part`` tokens of its answer (fewer than none:
    of the prompt so many less), then ``own`` more; with neither the same prompt once more."""

    which: int
    part: int
    own: int
    how: How

    def act(self, rig: Rig) -> None:
        if not rig.asked:
            return
        asked = list(rig.asked.values())[self.which % len(rig.asked)]
        said = answer(asked.prompt, asked.max_new, (asked.namespace, None))
        begin = (asked.prompt + said)[: max(1, len(asked.prompt) + self.part)]
        own = answer([self.own % ALPHABET], self.own)
        self.how._replace(namespace=asked.namespace).submit(rig, begin + own)


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
    """The next decode step retracts a request."""

    def act(self, rig: Rig) -> None:
        rig.retract()


class Flush(NamedTuple):
    def act(self, rig: Rig) -> None:
        rig.flush()


_HOW = st.builds(
    How,
    max_new=st.integers(1, 24),
    namespace=st.sampled_from([None, None, None, "x"]),
    known_length=st.booleans(),
    stop=st.sampled_from([None, None, 1]),
    cached=st.sampled_from([True, True, False]),
)
_OWN = st.one_of(st.integers(0, 14), st.integers(0, 120))
_SUBMIT = st.builds(Submit, st.integers(0, 40), _OWN, st.integers(0, ALPHABET - 1), _HOW)
_FOLLOW_UP = st.builds(
    FollowUp,
    st.integers(0, 5),
    st.one_of(st.just(0), st.integers(-20, 24)),
    st.integers(0, 6),
    _HOW,
)
_TURNS = st.builds(Turns, st.integers(1, 8))
_RARE = st.one_of(
    st.builds(Abort, st.integers(0, 9)),
    st.builds(Pause, st.sampled_from(["retract", "in_place"])),
    st.builds(Resume),
    st.builds(Retract),
    st.builds(Flush),
)
_ACTIONS = st.one_of(_SUBMIT, _FOLLOW_UP, _FOLLOW_UP, _TURNS, st.builds(Finish), _RARE)
PROGRAMS = st.lists(_ACTIONS, min_size=1, max_size=20)


def play(rig: Rig, program: list[Any]) -> None:
    """Play a program to its end, after which nothing may be missing."""
    for action in program:
        action.act(rig)
    if rig.paused:
        rig.resume()
    rig.run()
    rig.check_nothing_lost()

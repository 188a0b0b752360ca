"""What a scheduler remembers from one round of admission to the next."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

PATIENCE = 1000
"""Rounds in which nothing runs and nobody is admitted, before the first in the queue is given up.
In rounds, not seconds, so that all ranks give it up in the same one."""

REFUSED_ROUNDS = 16
"""Rounds at most in which a refused request is not asked for again though nothing was given back:
the expected lengths of running requests shrink meanwhile."""


class Stuck(Enum):
    """What is to be done about a server on which something waits and nothing runs."""

    NOTHING = auto()
    BEGIN_ANEW = auto()  # the prompt in flight, if there is one
    GIVE_UP = auto()  # the first in the queue


class Rounds:
    """Refusals that stand, and rounds in which the server got no further.

    ``asked``: whether admission was asked for anybody in this round. Rounds in which nobody was do
    not count: who waits for a LoRA adapter, say, does not wait for memory.
    """

    def __init__(self) -> None:
        self.asked = False
        self._stuck = 0
        self._refused: tuple[int, str] | None = None  # the queue in which nobody more got in
        self._refused_rounds = 0  # for how many more rounds that stands
        self._admitted = self._rows_left = False

    def note_admission(
        self, queue: Sequence[Any], *, refused: bool, admitted: bool, rows_left: bool
    ) -> None:
        """Who waits after a round, whether the first of them was refused, whether anybody was
        admitted before, and whether there was a row for one more."""
        self._refused = _name(queue) if refused else None
        self._refused_rounds = REFUSED_ROUNDS
        self._admitted, self._rows_left = admitted, rows_left

    @property
    def again(self) -> bool:
        """Whether the last round refused somebody beside a prompt that it admitted."""
        return self._refused is not None and self._admitted

    @property
    def want_memory(self) -> bool:
        """Whether the last round left somebody waiting who had a row to run in."""
        return self._refused is not None and self._rows_left

    def is_refused(self, queue: Sequence[Any]) -> bool:
        """Whether the same queue was refused and that still stands."""
        return (
            self._refused is not None and self._refused_rounds > 0 and self._refused == _name(queue)
        )

    def pass_over(self) -> None:
        """A round is spent on an old refusal."""
        self._refused_rounds -= 1

    def note_end(self, *, idle: bool, waiting: bool) -> Stuck:
        """End a round. ``idle``: nothing runs after it; ``waiting``: somebody waits."""
        asked, self.asked = self.asked, False
        if not idle or not waiting:
            self._stuck = 0
        elif asked:
            self._stuck += 1
            if self._stuck == 2:
                return Stuck.BEGIN_ANEW
            if self._stuck >= PATIENCE:
                self._stuck = 0
                return Stuck.GIVE_UP
        return Stuck.NOTHING


def _name(queue: Sequence[Any]) -> tuple[int, str] | None:
    return (len(queue), queue[0].rid) if queue else None

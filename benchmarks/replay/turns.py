"""Engines that are compared take turns: whatever else the machine does falls on all alike."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from typing import Any

from benchmarks.replay.engine import TookTooLong

PASSES = 8
"""Of a scheduler's loop that make a turn."""


class Turn:
    """One engine's. Made before its processes are forked; they inherit it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._begin, self._end = context.Semaphore(0), context.Semaphore(0)
        self._left = 0
        self._mine = False

    def take(self) -> None:
        """In the scheduler, once per pass: wait until the pass may begin."""
        if self._left == 0:
            if self._mine:
                self._end.release()
            self._begin.acquire()
            self._left, self._mine = PASSES, True
        self._left -= 1

    def give(self, engine: Any, seconds: float) -> bool:
        """In the parent: let the engine have a turn; False if it did not end within `seconds`.

        An engine that has ended, and one that still boots, has no turn to end.
        """
        self._begin.release()
        waited = 0.0
        while not engine.ended() and waited < seconds:
            if self._end.acquire(timeout=0.2):
                return True
            waited += 0.2
        return engine.ended()


def take_turns(engines: Sequence[Any], turns: Sequence[Turn], seconds: float) -> list[Any]:
    """The engines' outcomes. Raises ReplayFailed, also if a turn takes over so many seconds."""
    while not all(engine.ended() for engine in engines):
        for engine, turn in zip(engines, turns, strict=True):
            if not engine.ended() and not turn.give(engine, seconds):
                raise TookTooLong(f"a turn took over {seconds:.0f} s\n{engine.log()}")
    return [engine.outcome() for engine in engines]

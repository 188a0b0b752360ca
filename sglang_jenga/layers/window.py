"""A sliding window: a token reads itself and the ``width - 1`` before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from sglang_jenga.layers.base import Sliding
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range, exchanged_policy

CUTS = 16
"""Of a window, where requests begin to read a path that they share: no more, unless it is long."""
MOST_GRAIN = 256
"""Tokens: what a request keeps for nothing is half of a grain in the mean."""


@dataclass(frozen=True, slots=True)
class WindowPolicy(LayerPolicy):
    """The next token reads ``reach`` tokens before it, one less than the window in tokens."""

    reach: int
    grain: int = 1
    ages_behind_hits: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        if not self.reach:
            return prefix.length
        for begin, end in cached:
            if end - begin >= self.reach or begin == 0:
                return end
        return 0

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        if not self.reach:
            return ()
        return ((max(0, prefix.length - self.reach), prefix.length),)


@dataclass(frozen=True, slots=True)
class Window(Sliding):
    """``width``: tokens that a token sees, itself included."""

    name: ClassVar[str] = "window"
    width: int

    @property
    def policy(self) -> LayerPolicy:
        return exchanged_policy(self.name, self.width) or WindowPolicy(
            self.width - 1, grain=max(1, min(self.width // CUTS, MOST_GRAIN))
        )

    def dead(self, length: int) -> Range | None:
        end = length - self.width + 1
        return (0, end) if end > 0 else None

    def growth(self, length: int, tokens: float) -> float:
        return min(tokens, max(0, self.width - length))

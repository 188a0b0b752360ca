"""The rule: a token reads the first ``SINKS`` tokens, and ``width - 1`` before itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from sglang_jenga.layers.base import Sliding
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range

SINKS = 4


@dataclass(frozen=True, slots=True)
class SinkWindowPolicy(LayerPolicy):
    """A prefix is a hit if its first tokens are cached, and the last ones."""

    reach: int
    ages_behind_hits: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        ranges = list(cached)
        first = ranges[-1] if ranges and ranges[-1][0] == 0 else (0, 0)
        if first[1] < min(SINKS, prefix.length):
            return first[1]  # the sinks are torn: only a prefix inside of them is left
        if not self.reach:
            return prefix.length  # a token sees itself and the sinks
        long_enough = (end for begin, end in ranges if end - begin >= self.reach)
        return max(first[1], *long_enough, 0)

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        window = max(0, prefix.length - self.reach)
        if window <= SINKS:
            return ((0, prefix.length),)
        return ((0, SINKS), (window, prefix.length))


@dataclass(frozen=True, slots=True)
class SinkWindow(Sliding):
    """``width``: tokens of the window, the current one included."""

    name: ClassVar[str] = "sink_window"
    width: int

    @property
    def policy(self) -> LayerPolicy:
        return SinkWindowPolicy(self.width - 1)

    def dead(self, length: int) -> Range | None:
        end = length - self.width + 1
        return (SINKS, end) if end > SINKS else None

    def growth(self, length: int, tokens: float) -> float:
        return min(tokens, max(0, SINKS + self.width - length))

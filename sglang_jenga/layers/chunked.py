"""Chunked local attention (Llama-4): a token reads its own chunk of ``width`` tokens so far.

Chunks are aligned: token n reads ``[n - n % width, n]``. At a boundary all that came before dies at
once, and a prefix that ends there is a hit with nothing cached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from sglang_jenga.layers.base import Sliding
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range, exchanged_policy


@dataclass(frozen=True, slots=True)
class ChunkedPolicy(LayerPolicy):
    """The next token reads the prefix from its last boundary on."""

    width: int
    ages_behind_hits: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        boundary = prefix.length - prefix.length % self.width
        for begin, end in cached:
            if end <= boundary:
                break
            if begin <= boundary:
                return end
        return boundary

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        boundary = prefix.length - prefix.length % self.width
        return ((boundary, prefix.length),) if boundary < prefix.length else ()


@dataclass(frozen=True, slots=True)
class Chunked(Sliding):
    """``width``: tokens in a chunk."""

    name: ClassVar[str] = "chunked"
    # The others read all that came before, of which the pool gives back what lies behind a chunk.
    backends: ClassVar[tuple[str, ...]] = ("fa3", "fa4")
    width: int

    @property
    def policy(self) -> LayerPolicy:
        return exchanged_policy(self.name, self.width) or ChunkedPolicy(self.width)

    def dead(self, length: int) -> Range | None:
        end = length - length % self.width
        return (0, end) if end else None

    def growth(self, length: int, tokens: float) -> float:
        return min(tokens, self.width - length % self.width)

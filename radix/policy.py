"""What a layer type can reuse: how many tokens before a position it needs cached, and no more.

A policy is asked only about tokens; it sees no page, no byte and no request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class LayerPolicy(Protocol):
    """Reuse rule of one layer group (paper section 5)."""

    def needs_from(self, length: int) -> int:
        """First position that must be cached for a prefix of ``length`` tokens to be a hit.

        Everything in ``[needs_from(length), length)`` is locked while a request runs on the prefix
        and refreshed when it hits; what lies before it is out of reach and ages.
        """
        ...


@dataclass(frozen=True, slots=True)
class FullPolicy:
    """Full attention reads every token of the prefix."""

    def needs_from(self, length: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class WindowPolicy:
    """A sliding window: the next token sees itself and ``reach`` tokens before it.

    ``reach`` is one less than the window in tokens.
    """

    reach: int

    def needs_from(self, length: int) -> int:
        return max(0, length - self.reach)

"""Full attention: every token reads all before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range, exchanged_policy


@dataclass(frozen=True, slots=True)
class FullPolicy(LayerPolicy):
    """The next token reads every token of the prefix."""

    prefix_closed: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        return max((end for begin, end in cached if begin == 0), default=0)

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        return ((0, prefix.length),)


@dataclass(frozen=True, slots=True)
class Full(LayerKind):
    """Holds every token of a request for its life: the defaults of `LayerKind`."""

    name: ClassVar[str] = "full"

    @property
    def policy(self) -> LayerPolicy:
        return exchanged_policy(self.name) or FullPolicy()

"""Recurrent states (Mamba, GDN, short convolution): one entry sums up all tokens before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from sglang_jenga.layers.base import Address, LayerKind, Load, Storage
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range, exchanged_policy


@dataclass(frozen=True, slots=True)
class StatePolicy(LayerPolicy):
    """Only the state after the last token counts."""

    per_prefix: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        return next((end for _, end in cached), 0)

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        return ((prefix.length - 1, prefix.length),)


@dataclass(frozen=True, slots=True)
class State(LayerKind):
    """A request holds its own state, and one for each place that it is tracked in."""

    name: ClassVar[str] = "state"
    storage: ClassVar[Storage] = Storage.STATE
    address: ClassVar[Address] = Address.REQUEST

    @property
    def policy(self) -> LayerPolicy:
        return exchanged_policy(self.name) or StatePolicy()

    def held(self, load: Load, tokens_per_page: int) -> int:
        return load.states

    def step(self, start: Any, end: Any, tokens_per_page: int) -> Any:
        return 0 * end  # it got its state with its row

    def growth(self, length: int, tokens: float) -> float:
        return 0

    def gaps(self, load: Load, smalls_per_large: int) -> int:
        # Slots come and go; each may lie in a large page of its own.
        return (load.states - 1) * (smalls_per_large - 1)

    def alive_pages(self, length: int, tokens_per_page: int) -> int:
        return 0

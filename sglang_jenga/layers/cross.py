"""Cross attention: text reads what an encoder made of an image, and nothing of the text.

SGLang puts an encoder's tokens at a row's first positions and the text behind them. Self-attention
layers hold the text, cross-attention layers the encoder's tokens, so either kind has small pages
for a part of the row alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from sglang_jenga.layers.base import Address, LayerKind, Load
from sglang_jenga.radix.policy import LayerPolicy, Prefix, Range


@dataclass(frozen=True, slots=True)
class CrossPolicy(LayerPolicy):
    """All text behind an image was computed from the whole of it."""

    prefix_closed: ClassVar[bool] = True
    atomic: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        return prefix.length if any(begin == 0 for begin, _ in cached) else 0

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        return ((0, prefix.length),)


@dataclass(frozen=True, slots=True)
class Cross(LayerKind):
    """A request holds its encoder's tokens, from its prefill on and for its life."""

    name: ClassVar[str] = "cross"
    address: ClassVar[Address] = Address.ENCODER
    # The kernels of the others know of no cross attention.
    backends: ClassVar[tuple[str, ...]] = ("torch_native", "flashinfer", "fa3", "fa4")

    @property
    def policy(self) -> LayerPolicy:
        return CrossPolicy()

    def held(self, load: Load, tokens_per_page: int) -> int:
        return -(-load.encoder // tokens_per_page)

    def growth(self, length: int, tokens: float) -> float:
        return 0

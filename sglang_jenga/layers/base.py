"""What a layer type is: three answers that everything else asks for, on one object.

    rule      how much a request of n tokens needs, and what of it is dead (this class)
    storage   how an entry's bytes lie in the pool (`Storage`)
    address   how SGLang finds a request's pages (`Address`)

Planner, admission, allocator, trees, `plan` and metrics know layer types by these alone. Stdlib
only, numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from sglang_jenga.radix.policy import LayerPolicy, Range

LONGEST = 1 << 30
"""Tokens; no request is as long."""


class Storage(Enum):
    """How an entry's bytes lie; `sglang_jenga.memory` has a file for each."""

    KV = "K and V rows of a token"
    STATE = "the parts of one request's state"


class Address(Enum):
    """How SGLang finds a request's pages."""

    ROW = "the request's row names their slots"
    ENCODER = "so does it, at its first positions, which are those of an encoder's tokens"
    MAPPED = "through the slot that the row names"
    REQUEST = "one slot per request, beside the row"


@dataclass(frozen=True, slots=True)
class Load:
    """One running request, as far as its length decides about memory.

    ``tokens``: prompt and answer. ``states``: those it holds at once, its own and the ones it is
    tracked in. ``at_once``: tokens of a prompt that is computed in one go, 0 if it comes in chunks
    of a small page. ``encoder``: of the ``tokens``, those of an encoder (an image's), which come
    first; cross-attention layers hold these, and the others hold the rest.
    """

    tokens: int
    states: int = 1
    at_once: int = 0
    encoder: int = 0


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One layer type, with its width where it has one. Subclass it, and register the subclass.

    The defaults are those of full attention: every token of a request, for its life.
    """

    name: ClassVar[str]
    storage: ClassVar[Storage] = Storage.KV
    address: ClassVar[Address] = Address.ROW
    backends: ClassVar[tuple[str, ...]] = ()
    """SGLang's attention backends whose kernels read no more than the type keeps; empty for any
    that serve windows."""

    @property
    def label(self) -> str:
        """Name for logs, tables and metrics: ``full``, ``window(1024)``, ``state``."""
        return self.name

    @property
    def policy(self) -> LayerPolicy:
        """What the trees ask about its pages."""
        raise NotImplementedError

    def held(self, load: Load, tokens_per_page: int) -> int:
        """Small pages that a request holds at most."""
        return -(-(load.tokens - load.encoder) // tokens_per_page)

    def step(self, start: Any, end: Any, tokens_per_page: int) -> Any:
        """New small pages of a step that computes the tokens ``[start, end)`` of a request;
        numbers, or arrays of one number per request."""
        return -(-end // tokens_per_page) - -(-start // tokens_per_page)

    def dead(self, length: int) -> Range | None:
        """Of a request's first ``length`` tokens, those that no later step reads; None: all are.

        It begins at the same token for every length, and what is dead once stays dead.
        """
        return None

    @property
    def sinks(self) -> int:
        """Tokens at a request's beginning that stay alive while those behind them die: where `dead`
        begins."""
        dead = self.dead(LONGEST)
        return 0 if dead is None else dead[0]

    def growth(self, length: int, tokens: float) -> float:
        """Entries, at most, that a request of ``length`` tokens holds more while it decodes so many
        ``tokens`` more: an expected number, so it may be a fraction."""
        return tokens

    def gaps(self, load: Load, smalls_per_large: int) -> int:
        """Small pages of a request's large pages that may be free, and still of no use to another
        type, because others of the same large page are held."""
        return 0

    def kept_behind(self, length: int, tokens_per_page: int) -> Range | None:
        """`dead`, less what a cached prefix of the last whole small page reads, so that a request
        that ends soon can be hit; and less that page."""
        page = length - length % tokens_per_page
        dead = self.dead(page)
        if dead is None:
            return None
        end = min(dead[1], page - tokens_per_page)
        return (dead[0], end) if end > dead[0] else None

    def alive_pages(self, length: int, tokens_per_page: int) -> int:
        """Small pages that the first ``length`` tokens still need, the one that fills included."""
        pages, dead = -(-length // tokens_per_page), self.dead(length)
        if dead is None:
            return pages
        return pages - max(0, dead[1] // tokens_per_page - -(-dead[0] // tokens_per_page))


class Sliding(LayerKind):
    """Layers whose oldest tokens die while a request runs. SGLang finds the others through the
    slots of full attention.

    ``width`` tokens, the current one included, are the most that a step reads beyond the sinks.
    """

    __slots__ = ()
    address: ClassVar[Address] = Address.MAPPED
    width: int

    @property
    def label(self) -> str:
        return f"{self.name}({self.width})"

    def held(self, load: Load, tokens_per_page: int) -> int:
        # The rest of the width, and the small page that fills; or one page for a hit at its end.
        kept = max(self.width - 1, tokens_per_page)
        most = -(-self.sinks // tokens_per_page) + -(-kept // tokens_per_page) + 1
        at_once = -(-load.at_once // tokens_per_page)
        return min(-(-load.tokens // tokens_per_page), max(most, at_once))

    def gaps(self, load: Load, smalls_per_large: int) -> int:
        # The oldest large page empties, the newest fills, and one has the sinks alone.
        return (2 + (self.sinks > 0)) * (smalls_per_large - 1)

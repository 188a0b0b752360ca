"""What a layer type can reuse, what a step reads of it, and what goes first (paper section 5).

A policy is asked about tokens; it sees no page, no byte and no other group. The three questions are
the paper's customisation calls. Write a class with them, register it, and every layer group of the
type is run by it:

    class MyWindow(LayerPolicy): ...

    register_policy("window", lambda window: MyWindow(window - 1))
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

Range = tuple[int, int]  # tokens [begin, end)

MOST_RANK = (1 << 24) - 1
"""Ranks of pages are at most this; so prefixes are told apart by length up to 16 million tokens."""


class Prefix(NamedTuple):
    """The first ``length`` tokens of a key; ``images`` are the token ranges of its images, if any,
    in rising order."""

    length: int
    images: tuple[Range, ...] = ()


class LayerPolicy:
    """Rules of one layer group. Answers must depend on the arguments only.

    ``per_prefix``: a page belongs to a prefix as a whole, not to its last tokens. The page of a
    prefix of p tokens stands as the range ``[p - 1, p)``.
    """

    per_prefix: ClassVar[bool] = False

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        """Longest length, at most ``prefix.length``, whose hit finds all it needs.

        ``cached``: what the group has of the prefix, longest first, neither overlapping nor
        adjacent; read as little of it as will do. Of lengths that differ, a group may accept any:
        ``get_possible_prefix(L) == L`` says that it accepts L.
        """
        raise NotImplementedError

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        """What the step after this prefix reads, in rising order, not overlapping.

        It is refreshed by a hit and locked while a request runs on the prefix; the rest ages.
        """
        raise NotImplementedError

    def set_prefix_length(self, prefix: Prefix, pages: Range) -> int:
        """Rank of pages, all of one node, `MOST_RANK` at most: of equally old ones the higher rank
        is evicted first.

        The prefix length, so that all groups evict the same tokens, unless it says otherwise.
        """
        return pages[1]


@dataclass(frozen=True, slots=True)
class FullPolicy(LayerPolicy):
    """Full attention reads every token of the prefix."""

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        return max((end for begin, end in cached if begin == 0), default=0)

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        return ((0, prefix.length),)


@dataclass(frozen=True, slots=True)
class WindowPolicy(LayerPolicy):
    """A sliding window: the next token sees itself and ``reach`` tokens before it.

    ``reach`` is one less than the window in tokens.
    """

    reach: int

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
class StatePolicy(LayerPolicy):
    """A recurrent state (Mamba, GDN, short convolution) sums a prefix up: only the last counts."""

    per_prefix: ClassVar[bool] = True

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        return next((end for _, end in cached), 0)

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        return ((prefix.length - 1, prefix.length),)


@dataclass(frozen=True, slots=True)
class ImagePolicy(LayerPolicy):
    """Cross-attention KV and vision embeddings: an image is there as a whole or not at all.

    All pages of an image share one random rank, so that one image goes before the next is touched
    (paper section 5.3). ``seed`` makes the ranks the same on every rank of a server.
    """

    seed: int = 0

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        ranges = list(cached)
        for image in prefix.images:
            if image[0] < prefix.length and not _covers(ranges, image):
                return image[0]
        return prefix.length

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        return tuple(image for image in prefix.images if image[0] < prefix.length)

    def set_prefix_length(self, prefix: Prefix, pages: Range) -> int:
        image = next((image for image in prefix.images if image[0] <= pages[0] < image[1]), pages)
        return random.Random(f"{self.seed} {image}").getrandbits(24)


def _covers(ranges: Iterable[Range], wanted: Range) -> bool:
    return any(begin <= wanted[0] and wanted[1] <= end for begin, end in ranges)


PolicyFactory = Callable[[int | None], LayerPolicy]
_FACTORIES: dict[str, PolicyFactory] = {
    "full": lambda window: FullPolicy(),
    "window": lambda window: WindowPolicy(window - 1),
    "state": lambda window: StatePolicy(),
    "cross": lambda window: ImagePolicy(),
    "vision": lambda window: ImagePolicy(),
}


def register_policy(layer_type: str, factory: PolicyFactory) -> None:
    """Let ``factory(window)`` make the policies of a layer type from now on.

    ``window`` is the number of tokens that a window layer sees, None for other types. Call it in
    every process of the server, from a plugin of SGLang's group ``sglang.srt.plugins``.
    """
    if layer_type not in _FACTORIES:
        raise ValueError(f"unknown layer type {layer_type!r}, expected {' or '.join(_FACTORIES)}")
    _FACTORIES[layer_type] = factory


def policy_of(layer_type: str, window: int | None = None) -> LayerPolicy:
    """The policy of a layer group."""
    return _FACTORIES[layer_type](window)

"""What a layer type can reuse, what a step reads of it, and what goes first (paper section 5).

A policy is asked about tokens; it sees no page, no byte and no other group. The three questions are
the paper's customisation calls. The policies themselves stand with their layer types, in
`sglang_jenga.layers`; one of them is exchanged, for every layer group of its type, by

    class MyWindow(LayerPolicy): ...

    register_policy("window", lambda window: MyWindow(window - 1))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple

Range = tuple[int, int]  # tokens [begin, end)

MOST_RANK = (1 << 24) - 1
"""Ranks of pages are at most this; so prefixes are told apart by length up to 16 million tokens."""


class Prefix(NamedTuple):
    """The first ``length`` tokens of a key."""

    length: int


class LayerPolicy:
    """Rules of one layer group. Answers must depend on the arguments only.

    ``per_prefix``: a page belongs to a prefix as a whole, not to its last tokens. The page of a
    prefix of p tokens stands as the range ``[p - 1, p)``.
    ``prefix_closed``: a prefix needs the pages of all its tokens, so whoever has them has those of
    every shorter prefix too. The trees stand on one such group.
    ``atomic``: its pages lie before all others of a key, in nodes of their own, in place of those
    of the other prefix-closed group. Such a node (an image) is hit, kept and evicted as a whole.
    ``ages_behind_hits``: pages that a hit has gone past are of use only at resume points.
    ``grain``: what is kept of a prefix, of that which is read, begins at a multiple of so many
    tokens. Each request reads from a place of its own on, and each such place cuts the path that
    they share: of r tokens that are read there are r / grain cuts, however many requests there are.
    """

    per_prefix: ClassVar[bool] = False
    prefix_closed: ClassVar[bool] = False
    atomic: ClassVar[bool] = False
    ages_behind_hits: ClassVar[bool] = False

    @property
    def grain(self) -> int:
        return 1

    def get_possible_prefix(self, prefix: Prefix, cached: Iterable[Range]) -> int:
        """Longest length, at most ``prefix.length``, whose hit finds all it needs.

        ``cached``: what the group has of the prefix, the last range first, neither overlapping nor
        adjacent. It is an iterator: read as little of it as will do. The valid lengths need not be
        contiguous. A caller tests one length n with
        ``get_possible_prefix(Prefix(n), cached) == n``.
        """
        raise NotImplementedError

    def update_last_access(self, prefix: Prefix) -> tuple[Range, ...]:
        """What the step after this prefix reads, in rising order, not overlapping.

        A hit refreshes it, and a request that runs on the prefix locks it; both from a multiple of
        `grain` on. The rest ages.
        """
        raise NotImplementedError

    def set_prefix_length(self, prefix: Prefix, pages: Range) -> int:
        """Rank of pages of one node, at most `MOST_RANK`. Of equally old pages those with the
        higher rank are evicted first.

        Here it is the length of the prefix that they end, so that all groups evict the same tokens.
        """
        return pages[1]


def closed_group(policies: Sequence[LayerPolicy]) -> int:
    """The first group that has all of every prefix that it has, but for what is atomic."""
    closed = [
        group for group, policy in enumerate(policies) if policy.prefix_closed and not policy.atomic
    ]
    assert closed, "the trees need a group whose pages are those of every shorter prefix too"
    return closed[0]


def image_group(policies: Sequence[LayerPolicy]) -> int | None:
    """The group whose nodes are atomic, None without one."""
    atomic = [group for group, policy in enumerate(policies) if policy.atomic]
    assert len(atomic) < 2, "one group at most can lie before the others"
    return atomic[0] if atomic else None


# ---- policies of one's own ------------------------------------------------------------------

PolicyFactory = Callable[[int | None], LayerPolicy]
BUILT_IN = ("full", "window", "chunked", "state")
_exchanged: dict[str, PolicyFactory] = {}


def register_policy(layer_type: str, factory: PolicyFactory) -> None:
    """Let ``factory(window)`` make the policies of a built-in layer type from now on.

    ``window`` is the type's width in tokens, None for those without one. Call it in every process
    of the server, from a plugin of SGLang's group ``sglang.srt.plugins``. What a request keeps is
    the type's to say, and a server does not start with a policy that reads what its type gives
    back. A type of one's own is registered by `sglang_jenga.layers.registry.register_kind` and
    brings its policy.
    """
    if layer_type not in BUILT_IN:
        raise ValueError(f"unknown layer type {layer_type!r}, expected {' or '.join(BUILT_IN)}")
    _exchanged[layer_type] = factory


def exchanged_policy(layer_type: str, window: int | None = None) -> LayerPolicy | None:
    """The policy that was registered in place of a built-in type's own, None if none was."""
    factory = _exchanged.get(layer_type)
    return None if factory is None else factory(window)

"""What a radix tree is made of, whom it tells about pages, and the receipts that it hands out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from sglang_jenga.radix.policy import Range

NO_PAGES = np.zeros(0, dtype=np.int64)


class Extent(Protocol):
    """The small pages of one node in one group. Ids are opaque integers here."""

    ids: np.ndarray
    pinned: bool
    node: Any  # for the trees to set
    num_whole: int  # large pages that it fills alone
    shared: Mapping[int, int]  # the others, and how many of its small pages lie in each

    @property
    def size(self) -> int: ...
    def last_wholes(self, count: int) -> int: ...
    def first_in(self, large_id: int) -> int: ...


class LargePages(Protocol):
    """How extents share large pages."""

    num_empty: int

    def extents_in(self, large_id: int) -> tuple[Extent, ...]: ...
    def is_idle(self, large_id: int) -> bool: ...
    def take_turned_idle(self) -> list[int]: ...


class PageOwner(Protocol):
    """Told about every change of a page's state; the allocator implements it."""

    @property
    def large(self) -> LargePages: ...
    def adopt(self, group_id: int, small_ids: np.ndarray) -> Extent: ...
    def split(self, extent: Extent, index: int) -> tuple[Extent, Extent]: ...
    def pin(self, extent: Extent) -> None: ...
    def unpin(self, extent: Extent) -> None: ...
    def evict(self, extent: Extent) -> None: ...


class Node:
    """The tokens ``[begin, end)`` of every path that runs through it.

    Per group: ``extents[g]`` holds one small page per ``tokens_per_page`` tokens, in a group with
    one page per prefix the page of the prefix that ends here, or is None for a hole; ``locks[g]``
    counts the running requests that need it; ``used_at[g]`` is the clock of its last use;
    ``anchored[g]`` says that a place where requests end or part reads it, or, in a group with one
    page per prefix, that requests part right here; ``queued[g]`` is the eviction queue of the group
    that has an entry for it.
    """

    __slots__ = (
        "anchored",
        "begin",
        "children",
        "edge",
        "end",
        "extents",
        "key",
        "locks",
        "namespace",
        "parent",
        "queued",
        "used_at",
    )

    def __init__(
        self,
        parent: Node | None,
        edge: Hashable,
        namespace: Hashable,
        key: np.ndarray,
        begin: int,
        num_groups: int,
    ) -> None:
        self.parent = parent
        self.edge = edge  # parent.children[edge] is this node
        self.namespace = namespace
        self.key = key
        self.begin = begin
        self.end = begin + key.size
        self.children: dict[Hashable, Node] = {}
        self.extents: list[Extent | None] = [None] * num_groups
        self.locks = [0] * num_groups
        self.used_at = [0] * num_groups
        self.anchored = [False] * num_groups
        self.queued = [0] * num_groups

    def evictable(self, group_id: int) -> bool:
        return self.extents[group_id] is not None and not self.locks[group_id]


class TreeObserver(Protocol):
    """Told how the tree of keys changes, for those who publish what is cached."""

    def stored(self, node: Node) -> None: ...
    def split(self, front: Node, back: Node) -> None: ...
    def removed(self, node: Node) -> None: ...
    def cleared(self) -> None: ...


class TokenPages(NamedTuple):
    """A request's own pages of the tokens from ``begin`` on, one per ``tokens_per_page``."""

    begin: int
    ids: np.ndarray


PrefixPages = Mapping[int, int]  # length of a prefix: the request's own page for it


class PathLock(NamedTuple):
    """Receipt of a lock: for group g the path to ``node`` is locked in the token ``ranges[g]``."""

    node: Node
    ranges: tuple[tuple[Range, ...], ...]


class Miss(NamedTuple):
    """Group ``group_id`` cut a hit from ``before`` to ``after`` tokens, for want of ``lost``."""

    group_id: int
    before: int
    after: int
    lost: Range


class Match(NamedTuple):
    """``node`` ends the longest joint hit; ``misses`` says what made it shorter than the keys'
    agreement of ``agreed`` tokens."""

    node: Node
    agreed: int
    misses: tuple[Miss, ...]


class Inserted(NamedTuple):
    """The node that ends the key, and per group the small ids that the tree did not take, because
    it already had pages there."""

    node: Node
    declined: list[list[np.ndarray]]

"""What a radix tree is made of, and the receipts that it hands out."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol

import numpy as np

NO_PAGES = np.zeros(0, dtype=np.int64)


class PageStates(Protocol):
    """Told about every change of a page's state; the allocator implements it."""

    def cache(self, group_id: int, small_ids: np.ndarray) -> None: ...
    def pin(self, group_id: int, small_ids: np.ndarray) -> None: ...
    def evict(self, group_id: int, small_ids: np.ndarray) -> None: ...


class Node:
    """The tokens ``[begin, end)`` of every path that runs through it.

    Per group: ``pages[g]`` is one small id per ``tokens_per_page`` tokens, or None for a hole;
    ``locks[g]`` counts the running requests that need it; ``used_at[g]`` is the clock of its last
    use; ``queued[g]`` says an entry for it is in the eviction queue of the group.
    """

    __slots__ = (
        "begin",
        "children",
        "edge",
        "end",
        "key",
        "locks",
        "pages",
        "parent",
        "queued",
        "used_at",
    )

    def __init__(
        self, parent: Node | None, edge: Hashable, key: np.ndarray, begin: int, num_groups: int
    ) -> None:
        self.parent = parent
        self.edge = edge  # parent.children[edge] is this node
        self.key = key
        self.begin = begin
        self.end = begin + key.size
        self.children: dict[Hashable, Node] = {}
        self.pages: list[np.ndarray | None] = [None] * num_groups
        self.locks = [0] * num_groups
        self.used_at = [0] * num_groups
        self.queued = [False] * num_groups

    def __lt__(self, other: Node) -> bool:  # ties in the queue: any fixed order will do
        return self.begin < other.begin

    def evictable(self, group_id: int) -> bool:
        """Group 0 gives up leaves only; another group may drop its pages anywhere."""
        if self.pages[group_id] is None or self.locks[group_id]:
            return False
        return group_id != 0 or not self.children


class PathLock(NamedTuple):
    """Receipt of a lock: ``node``'s path is locked for group g from position ``begins[g]`` on."""

    node: Node
    begins: tuple[int | None, ...]


class Inserted(NamedTuple):
    """Outcome of an insert: the node that ends the key, and per group the positions (in small
    pages) whose pages the tree did not take because it already had its own."""

    node: Node
    declined: list[list[tuple[int, int]]]

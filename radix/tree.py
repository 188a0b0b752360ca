"""Radix trees over token keys, one per layer group, on one shared skeleton of keys.

The keys of all groups are the same tokens, so a node is stored and compared once; what belongs to
one group alone - its small pages, its locks, its recency, its rule for hits and evictions - is kept
per group, and a group may have dropped a node's pages (a *hole*) while another still has them.
Small-page ids are opaque integers here. Page owners are told through `PageStates`.

    root - [0..8) - [8..12)          full    |xxxxxxxx|xxxx|
                  \\ [8..20)          window  |......xx|xxxx|     (positions 0-5 slid out: holes)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise

import numpy as np

from sglang_jenga.radix.eviction import EvictionQueues
from sglang_jenga.radix.node import NO_PAGES, Inserted, Node, PageStates, PathLock
from sglang_jenga.radix.policy import LayerPolicy


class RadixTrees:
    """All layer groups' trees. Keys are int64 arrays, a multiple of ``tokens_per_page`` long.

    Group 0 is prefix-closed (full attention): a node exists exactly while group 0 has its pages, so
    nothing in the trees is unreachable. Invariants, for every node and group:

        pages[g] is not None and locks[g] > 0   =>  its small pages are USED
        pages[g] is not None and locks[g] == 0  =>  its small pages are CACHED
        node.evictable(g)                       =>  queued[g]
        num_pages[g] == sum of pages[g] over all nodes
    """

    def __init__(
        self, policies: Sequence[LayerPolicy], tokens_per_page: int, states: PageStates
    ) -> None:
        self.policies = tuple(policies)
        self.tokens_per_page = tokens_per_page
        self._states = states
        self.clear()

    def clear(self) -> None:
        """Forget every node without a word to the page owners."""
        self.root = Node(None, None, NO_PAGES, 0, len(self.policies))
        self.num_pages = [0] * len(self.policies)
        self._clock = 0
        self._queues = EvictionQueues(len(self.policies))

    # ---- hit --------------------------------------------------------------------------------

    def match(self, namespace: Hashable, key: np.ndarray) -> Node:
        """Longest prefix of ``key`` that is a hit in every group; returns the node that ends it.

        Splits a node where the hit ends inside it. Refreshes what each group needs of the hit.
        """
        path, end = self._walk(namespace, key)
        node, length = self._joint_hit(path, end)
        if length == 0:
            return self.root
        if length < node.end:
            node = self._split(node, length)
        self._touch(node)
        return node

    def _walk(self, namespace: Hashable, key: np.ndarray) -> tuple[list[Node], int]:
        """Nodes along ``key`` and the page-aligned length up to which their keys agree."""
        node, at = self.root, 0
        path: list[Node] = []
        while at + self.tokens_per_page <= key.size:
            child = node.children.get(self._edge(namespace, key, at))
            if child is None:
                break
            path.append(child)
            at += self._agreement(child, key, at)
            if at < child.end:
                break
            node = child
        return path, at

    def _edge(self, namespace: Hashable, key: np.ndarray, at: int) -> Hashable:
        """Key of a child: its first small page, under the root with the namespace."""
        first = key[at : at + self.tokens_per_page]
        token_or_bytes = int(first[0]) if self.tokens_per_page == 1 else first.tobytes()
        return token_or_bytes if at else (namespace, token_or_bytes)

    def _agreement(self, node: Node, key: np.ndarray, at: int) -> int:
        """Tokens, in whole small pages, that a node shares with ``key[at:]``."""
        length = min(node.key.size, key.size - at)
        differs = node.key[:length] != key[at : at + length]
        same = int(differs.argmax()) if differs.any() else length
        return same - same % self.tokens_per_page

    def _joint_hit(self, path: list[Node], end: int) -> tuple[Node, int]:
        """Shrink ``end`` until every group accepts it. It only falls, so this ends."""
        last = len(path) - 1
        while end:
            while path[last].begin >= end:
                last -= 1
            shorter = min(
                self._accepted(group_id, path, last, end) for group_id in range(len(self.policies))
            )
            if shorter == end:
                return path[last], end
            end = shorter
        return self.root, 0

    def _accepted(self, group_id: int, path: list[Node], last: int, end: int) -> int:
        """``end`` if this group has all it needs for it, else the next length worth a try: the
        begin of the latest hole in reach."""
        needs_from = self.policies[group_id].needs_from(end)
        for node in reversed(path[: last + 1]):
            if node.end <= needs_from:
                break
            if node.pages[group_id] is None:
                return node.begin
        return end

    def pages_to(self, node: Node, group_id: int) -> np.ndarray:
        """Small ids of ``[0, node.end)``, 0 (the null page) where there is a hole."""
        parts = []
        while node.parent is not None:
            pages = node.pages[group_id]
            if pages is None:
                pages = np.zeros(node.key.size // self.tokens_per_page, dtype=np.int64)
            parts.append(pages)
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else NO_PAGES

    # ---- insert -----------------------------------------------------------------------------

    def insert(
        self,
        namespace: Hashable,
        key: np.ndarray,
        pages: Sequence[np.ndarray],
        alive_from: Sequence[int],
        skip: int,
    ) -> Inserted:
        """Offer a request's pages for ``key``; the tree adopts what it lacks.

        ``pages[g]``: one small id per page of the key. The request owns group g's pages from
        position ``alive_from[g]`` (tokens, page-aligned) on; before it there is nothing to offer.
        Positions below ``skip`` are the tree's own already. Adopted pages become CACHED.
        """
        declined: list[list[tuple[int, int]]] = [[] for _ in self.policies]
        node, at = self.root, 0
        while at < key.size:
            child = node.children.get(self._edge(namespace, key, at))
            if child is None:
                node = self._append(namespace, node, key, at, pages, alive_from)
                break
            at += self._agreement(child, key, at)
            if at < child.end:
                child = self._split(child, at)
            if at > skip:
                self._offer(child, pages, alive_from, skip, declined)
            node = child
        self._touch(node)
        return Inserted(node, declined)

    def _append(
        self,
        namespace: Hashable,
        parent: Node,
        key: np.ndarray,
        at: int,
        pages: Sequence[np.ndarray],
        alive_from: Sequence[int],
    ) -> Node:
        """New nodes for ``key[at:]``, cut where a group's pages begin to live."""
        cuts = sorted({at, key.size, *(cut for cut in alive_from if at < cut < key.size)})
        step = self.tokens_per_page
        for begin, end in pairwise(cuts):
            # A private copy: the caller's array may be a view of a longer, living one.
            edge = self._edge(namespace, key, begin)
            node = Node(parent, edge, key[begin:end].copy(), begin, len(self.policies))
            parent.children[edge] = node
            for group_id, ids in enumerate(pages):
                if alive_from[group_id] <= begin:
                    self._adopt(node, group_id, ids[begin // step : end // step])
            parent = node
        return parent

    def _offer(
        self,
        node: Node,
        pages: Sequence[np.ndarray],
        alive_from: Sequence[int],
        skip: int,
        declined: list[list[tuple[int, int]]],
    ) -> None:
        """The request brings its own copy of an existing node: fill holes, decline the rest."""
        step = self.tokens_per_page
        starts = [max(node.begin, skip, begin) for begin in alive_from]
        # A hole that the request can fill only from some position on is cut there first.
        cuts = {at for at, ids in zip(starts, node.pages, strict=True) if ids is None}
        parts = [self._split(node, at) for at in sorted(cuts) if node.begin < at < node.end]
        for part in [*parts, node]:
            for group_id, ids in enumerate(pages):
                begin = max(part.begin, starts[group_id])
                if begin >= part.end:
                    continue
                if part.pages[group_id] is None:
                    self._adopt(part, group_id, ids[part.begin // step : part.end // step])
                else:
                    declined[group_id].append((begin // step, part.end // step))

    def _adopt(self, node: Node, group_id: int, ids: np.ndarray) -> None:
        node.pages[group_id] = ids.copy()
        self.num_pages[group_id] += ids.size
        node.used_at[group_id] = self._clock
        if not node.locks[group_id]:
            self._states.cache(group_id, ids)
            self._queues.push(node, group_id)

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node at position ``at``; the new node takes the front, ``node`` keeps its end (and
        with it every receipt that names it). Returns the new node."""
        cut = at - node.begin
        pages_cut = cut // self.tokens_per_page
        assert 0 < cut < node.key.size and node.parent is not None
        front = Node(node.parent, node.edge, node.key[:cut], node.begin, len(self.policies))
        front.locks = list(node.locks)
        front.used_at = list(node.used_at)
        node.parent.children[front.edge] = front
        node.key, node.begin, node.parent = node.key[cut:], at, front
        node.edge = self._edge(None, node.key, 0)[1]
        front.children[node.edge] = node
        for group_id, ids in enumerate(node.pages):
            if ids is not None:
                front.pages[group_id], node.pages[group_id] = ids[:pages_cut], ids[pages_cut:]
                if front.evictable(group_id):
                    self._queues.push(front, group_id)
        return front

    # ---- recency and locks ------------------------------------------------------------------

    def _touch(self, node: Node) -> None:
        """Refresh what each group needs of the prefix that ends at ``node``; the rest ages."""
        self._clock += 1
        for group_id in range(len(self.policies)):
            for part in self._in_reach(node, group_id):
                part.used_at[group_id] = self._clock

    def _in_reach(self, node: Node, group_id: int) -> list[Node]:
        """Nodes that hold, to the page, what a group needs of the prefix that ends at ``node``."""
        needs_from = self.policies[group_id].needs_from(node.end)
        parts = self._upwards(node, needs_from)
        needs_from -= needs_from % self.tokens_per_page
        if parts and parts[-1].begin < needs_from:
            self._split(parts[-1], needs_from)  # the front keeps its age and stays evictable
        return parts

    @staticmethod
    def _upwards(node: Node, begin: int) -> list[Node]:
        """Nodes from ``node`` up that hold a position at or after ``begin``."""
        found = []
        while node.parent is not None and node.end > begin:
            found.append(node)
            node = node.parent
        return found

    def lock(self, node: Node) -> PathLock:
        """Keep what a request running on this prefix needs; `unlock` takes the receipt."""
        begins = []
        for group_id in range(len(self.policies)):
            parts = self._in_reach(node, group_id)
            for part in parts:
                part.locks[group_id] += 1
                if part.locks[group_id] == 1 and part.pages[group_id] is not None:
                    self._states.pin(group_id, part.pages[group_id])
            # Splits may cut these nodes later, so the receipt says where they begin, not which
            # they are.
            begins.append(parts[-1].begin if parts else None)
        return PathLock(node, tuple(begins))

    def unlock(self, lock: PathLock) -> None:
        """Undo what is left of a lock."""
        for group_id, begin in enumerate(lock.begins):
            if begin is not None:
                for part in self._upwards(lock.node, begin):
                    self._release(part, group_id)

    def unlock_before(self, lock: PathLock, group_id: int, position: int) -> PathLock:
        """Give up the part of one group's lock that lies before ``position``: a window slides on.

        Returns the receipt of what is still locked; the old one is void.
        """
        begin = lock.begins[group_id]
        position -= position % self.tokens_per_page
        if begin is None or position <= begin:
            return lock
        position = min(position, lock.node.end)
        for part in self._upwards(lock.node, begin):
            if part.begin >= position:
                continue
            self._release(self._split(part, position) if part.end > position else part, group_id)
        begins = list(lock.begins)
        begins[group_id] = position if position < lock.node.end else None
        return PathLock(lock.node, tuple(begins))

    def _release(self, node: Node, group_id: int) -> None:
        node.locks[group_id] -= 1
        assert node.locks[group_id] >= 0, "unlocked more often than locked"
        if node.locks[group_id] == 0 and node.pages[group_id] is not None:
            self._states.cache(group_id, node.pages[group_id])
            if node.evictable(group_id):
                self._queues.push(node, group_id)

    # ---- evict ------------------------------------------------------------------------------

    def evict_until(self, satisfied: Callable[[], bool], quantum: Sequence[int]) -> list[int]:
        """Evict, oldest first whatever the group, until satisfied or nothing is evictable.

        Balanced: one clock for all groups. Aligned: of equally old pages the longer prefix goes
        first. At most ``quantum[g]`` small pages go at a time. Returns small pages evicted per
        group.
        """
        evicted = [0] * len(self.policies)
        while not satisfied():
            victim = self._queues.pop_oldest()
            if victim is None:
                break
            group_id, node = victim
            size = node.key.size // self.tokens_per_page
            if size > quantum[group_id]:
                node = self._cut_victim(node, group_id, quantum[group_id])
            if group_id == 0:
                for each, count in enumerate(self._remove(node)):
                    evicted[each] += count
            else:
                evicted[group_id] += self._drop(node, group_id)
        return evicted

    def _cut_victim(self, node: Node, group_id: int, quantum: int) -> Node:
        """Split off what goes first: a leaf loses its tail, a window its oldest tokens."""
        if group_id == 0:
            self._split(node, node.end - quantum * self.tokens_per_page)
            return node
        front = self._split(node, node.begin + quantum * self.tokens_per_page)
        self._queues.push(node, group_id)
        return front

    def _remove(self, node: Node) -> list[int]:
        """Take a leaf out; with it go every group's pages, which nothing could reach any more."""
        counts = [self._drop(node, group_id) for group_id in range(len(self.policies))]
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[node.edge]
        if parent.evictable(0):
            self._queues.push(parent, 0)
        return counts

    def _drop(self, node: Node, group_id: int) -> int:
        ids = node.pages[group_id]
        if ids is None:
            return 0
        assert not node.locks[group_id], "evicting what a running request needs"
        self._states.evict(group_id, ids)
        node.pages[group_id] = None
        self.num_pages[group_id] -= ids.size
        return ids.size

    # ---- checks -----------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Every node that holds tokens."""
        found, stack = [], list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            found.append(node)
        return found

    def check(self) -> None:
        """Recount everything. O(tree)."""
        totals = [0] * len(self.policies)
        for node in self.nodes():
            assert node.end - node.begin == node.key.size
            assert node.key.size % self.tokens_per_page == 0
            assert node.parent is not None and node.parent.end == node.begin
            assert node.parent.children[node.edge] is node
            assert node.pages[0] is not None, "a node without its full-attention pages"
            for group_id, ids in enumerate(node.pages):
                if ids is not None:
                    assert ids.size * self.tokens_per_page == node.key.size
                    totals[group_id] += ids.size
                if node.evictable(group_id):
                    assert node.queued[group_id], "an evictable node is not in the queue"
                below = sum(child.locks[group_id] for child in node.children.values())
                assert group_id != 0 or node.locks[0] >= below, (
                    "a locked node under an unlocked one"
                )
        assert totals == self.num_pages

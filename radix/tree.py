"""Radix trees over token keys, one per layer group, on one shared skeleton of keys.

The keys of all groups are the same tokens, so a node is stored and compared once; what belongs to
one group alone - its small pages, its locks, its recency, its policy - is kept per group, and a
group may have dropped a node's pages (a *hole*) while another still has them. Small-page ids are
opaque integers here; `PageOwner` is told what becomes of them.

    root - [0..8) - [8..12)          full    |xxxxxxxx|xxxx|
                  \\ [8..20)          window  |......xx|xxxx|     (0-5 evicted: holes)
                                     state   |       x|    |     (one page: of the prefix of 8)
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from sglang_jenga.radix.ageing import Ageing, AgeingOptions
from sglang_jenga.radix.eviction import EvictionQueues
from sglang_jenga.radix.hits import joint_hit
from sglang_jenga.radix.node import (
    NO_PAGES,
    AnyOwner,
    Extent,
    Inserted,
    Match,
    Node,
    PageObserver,
    PathLock,
    PrefixPages,
    Run,
    TokenPages,
    TreeObserver,
)
from sglang_jenga.radix.paths import Paths, upwards
from sglang_jenga.radix.policy import LayerPolicy, Range, closed_group
from sglang_jenga.radix.times import DEMOTED_BEFORE, Times


class RadixTrees:
    """All layer groups' trees. Keys are int64 arrays, a multiple of ``tokens_per_page`` long.

    One group is prefix-closed (full attention), c below: a node exists exactly while that group has
    its pages, so nothing in the trees is unreachable. Invariants, for every node and group:

        extents[g] is not None  =>  extents[g].pinned == (locks[g] > 0)
        node.evictable(g)       =>  in_smalls[g] is not None
        locks[c] of a node      >=  sum of its children's
        num_pages[g]            ==  sum of the sizes of extents[g] over all nodes
        num_shared[g]           ==  sum of (locks[g] - 1) * tokens over nodes with locks[g] > 1,
                                    where a page of a whole prefix counts as one token
    """

    def __init__(
        self,
        policies: Sequence[LayerPolicy],
        tokens_per_page: int,
        owner: AnyOwner,
        *,
        observer: TreeObserver | None = None,
        page_observer: PageObserver | None = None,
        balanced: bool = True,
        aligned: bool = True,
        resume_points: bool = True,
        shield: bool = True,
        state_cost_tokens: int = 0,
        grace_tokens: int = 512,
        most_on_path: int | None = None,
    ) -> None:
        """``state_cost_tokens``: tokens of full attention that fit in the bytes of one page of a
        whole prefix. A page that saves fewer is demoted once a longer prefix has one.
        ``grace_tokens``: tokens before a path's end that keep their age; at least as many as the
        group reads there. ``most_on_path``: pages of whole prefixes that a path keeps, not counting
        those where requests part; None for any number.
        """
        self.policies = tuple(policies)
        self.tokens_per_page = tokens_per_page
        self._groups = range(len(self.policies))
        self._closed = closed_group(self.policies)
        self._others = [group_id for group_id in self._groups if group_id != self._closed]
        self._owner = owner
        self._observer = observer
        self._page_observer = page_observer
        self._balanced, self._aligned = balanced, aligned
        self._ageing = AgeingOptions(resume_points, shield, state_cost_tokens, grace_tokens)
        self._most_on_path = most_on_path
        self._start_empty()

    def _start_empty(self) -> None:
        self.num_pages = [0] * len(self.policies)
        self.num_shared = [0] * len(self.policies)
        self._adopted: list[tuple[Node, int]] = []
        self._times = Times(self.policies, aligned=self._aligned)
        self._queues = EvictionQueues(
            len(self.policies), self._owner, self._times, balanced=self._balanced
        )
        self._paths = Paths(
            self.policies,
            self.tokens_per_page,
            self._owner,
            self._queues,
            self._times,
            self._observer,
        )
        self._ages = Ageing(self._paths, self._queues, self._times, self._owner, self._ageing)

    @property
    def root(self) -> Node:
        return self._paths.root

    def clear(self) -> None:
        """Evict everything; nothing may be locked."""
        for child in list(self.root.children.values()):
            self._remove(self.root, child)
        self._start_empty()
        if self._observer is not None:
            self._observer.cleared()

    # ---- hit --------------------------------------------------------------------------------

    def match(self, namespace: Hashable, key: np.ndarray) -> Match:
        """Longest prefix of ``key`` that is a hit in every group, and what made it shorter.

        Splits a node where the hit ends inside it. Refreshes what each group reads of the hit.
        Lock the node before anything else is matched, or it may have become part of a longer one.
        """
        path, agreed = self._paths.walk(namespace, key)
        end, misses = joint_hit(path, agreed, self.policies, self._others, self.tokens_per_page)
        if not end:
            return Match(self.root, agreed, misses)
        while path[-1].begin >= end:
            path.pop()
        node = path[-1] if path[-1].end == end else self._paths.split(path[-1], end)
        self._ages.tick()
        self._ages.touch(node, hit=True)
        self._paths.join(node)
        return Match(node, agreed, misses)

    def pages_to(self, node: Node, group_id: int) -> np.ndarray:
        """Small ids of ``[0, node.end)``, 0 (the null page) where there is a hole."""
        assert not self.policies[group_id].per_prefix
        parts = []
        while node.parent is not None:
            extent = node.extents[group_id]
            if extent is None:
                parts.append(
                    np.zeros((node.end - node.begin) // self.tokens_per_page, dtype=np.int64)
                )
            else:
                parts.append(extent.ids)
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else NO_PAGES  # never the trees' own array

    # ---- insert -----------------------------------------------------------------------------

    def insert(
        self,
        start: Node,
        namespace: Hashable,
        key: np.ndarray,
        offers: Sequence[TokenPages | PrefixPages],
    ) -> Inserted:
        """Offer a request's own pages for ``key``; the trees adopt what they lack.

        ``start`` ends the part of the key that the trees have for this request already; it must be
        locked, or the root. Adopted pages are evictable until somebody locks them.
        """
        self._ages.tick()
        declined: list[list[np.ndarray]] = [[] for _ in self.policies]
        node, at, branch = start, start.end, None
        while at < key.size:
            child = node.children.get(self._paths.edge(namespace, key, at))
            if child is None:
                branch = node
                node = self._append(namespace, node, key, offers)
                break
            at += self._paths.agreement(child, key, at)
            if at < child.end:
                child = self._paths.split(child, at)
            self._offer(child, offers, declined)
            node = child
        if branch is not None and branch.parent is not None and len(branch.children) > 1:
            branch.forked = True
            for group_id in self._ages.prefix_groups:
                branch.resume_point[group_id] = True
        self._ages.touch(node, hit=False)
        self._ages.mark_resume_points(node)
        # Not before: the queues would have to set every new node's age right.
        for adopted, group_id in self._adopted:
            if (extent := adopted.evictable(group_id)) is not None:
                self._queues.push(adopted, extent)
            if self.policies[group_id].per_prefix:
                self._ages.demote_cheap_states(adopted, group_id)
        self._adopted.clear()
        if self._most_on_path is not None:
            self._evict_beyond(self._most_on_path, node)
        self._ages.demote_unreachable(node)
        self._paths.join(node)
        return Inserted(node, declined)

    def _append(
        self,
        namespace: Hashable,
        parent: Node,
        key: np.ndarray,
        offers: Sequence[TokenPages | PrefixPages],
    ) -> Node:
        """New nodes for the key behind ``parent``, cut where a group's pages begin or end."""
        cuts = self._cuts(offers, parent.end, key.size)
        # A private copy: the caller's array may be a view of a longer, living one.
        run = Run(key[parent.end :].copy(), parent.end)
        for begin, end in pairwise([parent.end, *cuts, key.size]):
            edge = self._paths.edge(namespace, key, begin)
            node = Node(parent, edge, namespace, run, begin, end, len(self.policies))
            parent.children[edge] = node
            for group_id, offer in enumerate(offers):
                ids = self._ids_for(node, offer)
                if ids is not None:
                    self._adopt(node, group_id, ids)
            if self._observer is not None:
                self._observer.stored(node)
            parent = node
        return parent

    def _offer(
        self,
        node: Node,
        offers: Sequence[TokenPages | PrefixPages],
        declined: list[list[np.ndarray]],
    ) -> None:
        """The request brings its own copy of an existing node: fill holes, decline the rest."""
        lacking = [
            offer
            for group_id, offer in enumerate(offers)
            if node.extents[group_id] is None or self.policies[group_id].per_prefix
        ]
        cuts = self._cuts(lacking, node.begin, node.end)
        for part in [*(self._paths.split(node, cut) for cut in cuts), node]:
            for group_id, offer in enumerate(offers):
                ids = self._ids_for(part, offer)
                if ids is None:
                    continue
                if part.extents[group_id] is None:
                    self._adopt(part, group_id, ids)
                    # A page for a prefix that others have gone on from: they part here.
                    part.resume_point[group_id] |= self.policies[group_id].per_prefix
                else:
                    declined[group_id].append(ids)

    @staticmethod
    def _cuts(offers: Iterable[TokenPages | PrefixPages], begin: int, end: int) -> list[int]:
        """Positions inside ``(begin, end)`` at which nodes must end for the offers."""
        cuts: set[int] = set()
        for offer in offers:
            cuts.update((offer.begin,) if isinstance(offer, TokenPages) else offer)
        return sorted(cut for cut in cuts if begin < cut < end)

    def _ids_for(self, node: Node, offer: TokenPages | PrefixPages) -> np.ndarray | None:
        """What an offer holds for a node: pages of its tokens, all or its last; or its prefix's."""
        if not isinstance(offer, TokenPages):
            return np.array([offer[node.end]]) if node.end in offer else None
        begin = max(node.begin, offer.begin)
        if begin >= node.end:
            return None
        step = self.tokens_per_page
        return offer.ids[(begin - offer.begin) // step : (node.end - offer.begin) // step]

    def _adopt(self, node: Node, group_id: int, ids: np.ndarray) -> None:
        extent: Extent = self._owner.adopt(group_id, ids)
        node.extents[group_id] = extent
        extent.node = node
        self.num_pages[group_id] += ids.size
        self._times.refresh(node, extent)
        if node.locks[group_id]:  # a hole inside what a running request has locked
            self._owner.pin(extent)
        self._adopted.append((node, group_id))
        if group_id != self._closed and self._page_observer is not None:
            self._page_observer.changed(node, group_id)

    # ---- locks ------------------------------------------------------------------------------

    def lock(self, node: Node, *, without: Collection[int] = ()) -> PathLock:
        """Keep what a request running on this prefix reads; `unlock` takes the receipt.

        ``without``: groups of which the request has what it needs in pages of its own.
        """
        # Splits may cut nodes later, so the receipt names tokens, not nodes.
        ranges = [
            () if group_id in without else tuple(self._paths.ranges_read(group_id, node.end))
            for group_id in self._groups
        ]
        lock = PathLock(node, tuple(ranges))
        for group_id in (*self._others, self._closed):  # which shields what is not pinned then
            for part in self._paths.parts_read(node, lock.ranges[group_id], group_id):
                part.locks[group_id] += 1
                if part.locks[group_id] == 1:
                    self._pin(part, group_id)
                else:
                    self.num_shared[group_id] += self._num_positions(part, group_id)
        return lock

    def _num_positions(self, node: Node, group_id: int) -> int:
        return 1 if self.policies[group_id].per_prefix else node.end - node.begin

    def _pin(self, node: Node, group_id: int) -> None:
        extent = node.extents[group_id]
        if extent is not None:
            if extent.shielded:
                self._times.shield(extent, False)
            self._owner.pin(extent)
        if group_id == self._closed:
            self._ages.reshield(node)

    def unlock(self, lock: PathLock) -> None:
        """Undo what is left of a lock."""
        for group_id, ranges in enumerate(lock.ranges):
            for part in self._paths.parts_read(lock.node, ranges, group_id):
                self._release(part, group_id)

    def advance(self, lock: PathLock, group_id: int, length: int) -> PathLock:
        """Give up what one group does not read any more now that the request is at ``length``.

        A request before the end of what it has locked gives up nothing. Returns the receipt of
        what is still locked; the old one is void.
        """
        node, before = lock.node, lock.ranges[group_id]
        length = max(length, node.end)
        gone = _minus(before, self._paths.ranges_read(group_id, length, most=node.end))
        if not gone:
            return lock
        for part in self._paths.parts_read(node, gone, group_id):
            self._release(part, group_id)
        ranges = list(lock.ranges)
        ranges[group_id] = tuple(_minus(before, gone))
        return PathLock(node, tuple(ranges))

    def _release(self, node: Node, group_id: int) -> None:
        node.locks[group_id] -= 1
        assert node.locks[group_id] >= 0, "unlocked more often than locked"
        if node.locks[group_id]:
            self.num_shared[group_id] -= self._num_positions(node, group_id)
            return
        extent = node.extents[group_id]
        if extent is not None:
            self._owner.unpin(extent)
            self._queues.push(node, extent)
        self._ages.reshield(node)

    # ---- evict ------------------------------------------------------------------------------

    def evict_large(self, count: int) -> bool:
        """Empty ``count`` large pages, the least recently used of any group first.

        Only large pages that can become empty are considered (paper section 5.4, step 3). False if
        there were not enough of them.
        """
        owner = self._owner
        goal = owner.num_empty_larges + count
        while (missing := goal - owner.num_empty_larges) > 0:
            victim = self._queues.pop_large()
            if victim is None:
                return False
            turn, extent = victim
            group_id = extent.group_id
            # The last ones: behind them in the same node lie pages as old, and of longer prefixes.
            due = owner.due(extent, self._times.array, turn)
            due = due[-self._larges_to_cut(extent, missing) :]
            for other in (*owner.sharing(extent, due), extent):
                if other.node.extents[group_id] is other:  # else it went with one before
                    self._cut(other.node, group_id, owner.first_in(other, due))
        return True

    def _larges_to_cut(self, extent: Extent, missing: int) -> int:
        """How many large pages to take from an extent when ``missing`` are wanted.

        With a leaf's tokens go the other groups' pages, so fewer of the closed group will do; never
        more than are wanted, and the rest comes in the next round.
        """
        if extent.group_id != self._closed:
            return missing
        larges = sum(other.num_large for other in extent.node.extents if other is not None)
        return max(1, int(missing * extent.num_large / larges))

    def evict_small(self, group_id: int, count: int, *, before: int | None = None) -> int:
        """Evict ``count`` small pages of one group, the least recently used first (step 5).

        Returns how many it were; fewer if no more is evictable, or none whose time is ``before``.
        """
        pages = self.num_pages[group_id]
        while (missing := count - (pages - self.num_pages[group_id])) > 0:
            extent = self._queues.pop_small(group_id, before)
            if extent is None:
                break
            self._cut(extent.node, group_id, max(0, extent.size - missing))
        return pages - self.num_pages[group_id]

    def _evict_beyond(self, most: int, end: Node) -> None:
        """Leave the path to ``end`` with so many pages per group of whole prefixes: the shortest
        prefixes lose theirs first, but for locked ones and those where requests part."""
        for group_id in self._ages.prefix_groups:
            holders = [node for node in upwards(end, 0) if node.extents[group_id] is not None]
            excess = len(holders) - most
            for node in reversed(holders):
                if excess <= 0 or node is end:
                    break
                if node.evictable(group_id) is not None and node.children and not node.parts:
                    self._cut(node, group_id, 0)
                    excess -= 1

    def evict_unreachable(self, short: Sequence[int]) -> int:
        """Evict tokens that nothing can hit any more, so many as the groups are ``short`` of."""
        if not self._ages.prefix_groups:
            return 0
        return self.evict_small(self._closed, short[self._closed], before=DEMOTED_BEFORE)

    def evict_smalls_before_large(self, short: Sequence[int]) -> int:
        """Evict small pages of the groups in ``short``, at most so many of each, but only those
        older than the large page that eviction would empty next. Returns how many.

        Where a large page holds one state or a hundred tokens, emptying one often costs younger
        pages than single old ones do.
        """
        top = self._queues.next_large()
        if top is None:
            return 0
        return sum(
            self.evict_small(group_id, count, before=top[0])
            for group_id, count in enumerate(short)
            if count > 0 and group_id != top[1]
        )

    def _cut(self, node: Node, group_id: int, index: int) -> None:
        """Evict a node's pages of one group from the ``index``-th on: longer prefixes go first."""
        if index:
            self._paths.split(node, node.begin + index * self.tokens_per_page)
        if group_id == self._closed:
            above = node.parent
            assert above is not None, "the root has no pages"
            self._remove(above, node)
            self._ages.demote_unreachable(above)
        else:
            self._drop(node, group_id)
            if self._page_observer is not None:
                self._page_observer.changed(node, group_id)
            if self.policies[group_id].per_prefix:
                self._ages.demote_unreachable(node)

    def _remove(self, above: Node, top: Node) -> None:
        """Take out a child of ``above`` and all below it; with it go every group's pages, which
        nothing could reach any more."""
        del above.children[top.edge]
        stack = [top]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for group_id in self._groups:
                self._drop(node, group_id)
            if self._observer is not None:
                self._observer.removed(node)

    def _drop(self, node: Node, group_id: int) -> None:
        extent = node.extents[group_id]
        if extent is not None:
            self._owner.evict(extent)
            node.extents[group_id] = None
            self.num_pages[group_id] -= extent.size

    # ---- checks -----------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Every node that holds tokens."""
        found, stack = [], list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            found.append(node)
        return found

    def extents(self) -> list[Extent]:
        return [extent for node in self.nodes() for extent in node.extents if extent is not None]

    def check(self) -> None:
        """Recount everything. O(tree)."""
        totals, shared = [0] * len(self.policies), [0] * len(self.policies)
        for node in self.nodes():
            assert node.key.size == node.end - node.begin > 0
            assert (node.end - node.begin) % self.tokens_per_page == 0
            assert node.parent is not None and node.parent.end == node.begin
            assert node.parent.children[node.edge] is node
            assert node.extents[self._closed] is not None, "a node without its full-attention pages"
            for group_id, extent in enumerate(node.extents):
                if extent is not None:
                    per_prefix = self.policies[group_id].per_prefix
                    pages = 1 if per_prefix else (node.end - node.begin) // self.tokens_per_page
                    assert extent.size == pages
                    assert extent.node is node
                    assert extent.pinned == (node.locks[group_id] > 0)
                    totals[group_id] += extent.size
                others = max(0, node.locks[group_id] - 1)
                shared[group_id] += others * self._num_positions(node, group_id)
                if (evictable := node.evictable(group_id)) is not None:
                    time = self._times.of(evictable)
                    entry = node.in_smalls[group_id]
                    assert entry is not None and entry <= time, "an evictable node is not queued"
                    shielded = self._ages.is_shielded(node, group_id)
                    assert evictable.shielded == shielded
            below = sum(child.locks[self._closed] for child in node.children.values())
            assert node.locks[self._closed] >= below, "a locked node under an unlocked one"
        assert totals == self.num_pages
        assert shared == self.num_shared


def _minus(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """What of the ranges lies in none of the others; both in rising order."""
    left = []
    for begin, end in ranges:
        for low, high in others:
            if low < end and high > begin:
                if low > begin:
                    left.append((begin, low))
                begin = high
        if begin < end:
            left.append((begin, end))
    return left

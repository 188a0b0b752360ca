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

from collections.abc import Collection, Hashable, Sequence

import numpy as np

from sglang_jenga.radix.ageing import Ageing, AgeingOptions
from sglang_jenga.radix.eviction import Eviction
from sglang_jenga.radix.hits import joint_hit
from sglang_jenga.radix.holdings import Holdings
from sglang_jenga.radix.locks import Locks
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
    TokenPages,
    TreeObserver,
)
from sglang_jenga.radix.offers import Offers
from sglang_jenga.radix.paths import Paths
from sglang_jenga.radix.policy import LayerPolicy, closed_group, image_group
from sglang_jenga.radix.queues import EvictionQueues
from sglang_jenga.radix.times import Times


class RadixTrees:
    """All layer groups' trees. Keys are int64 arrays, a multiple of ``tokens_per_page`` long.

    One object holds each kind of state, and its equations stand beside it: `Paths` the nodes,
    `Holdings` their pages, `Locks` what running requests need, `Times` and `Ageing` what was of use
    when, `EvictionQueues` what goes next, `Eviction` how it goes. Here is what happens to them on a
    hit and on an insert. b is a node's base group, that is full attention, or of an image cross
    attention. For every node but the root and every group g:

        extents[b] is not None, and of the other base group None
        an image's parent is the root or an image
        node.evictable(g)       =>  in_smalls[g] is not None
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
        """Start empty. ``owner`` is told what becomes of pages, the observers what of nodes.

        Args:
            balanced: one clock for all groups; else evictions go through one group after the other.
            aligned: of equally old pages those of longer prefixes go first, in all groups.
            resume_points: window pages are demoted except where requests resume (`Ageing`).
            shield: resume points inside what running requests have locked go last; of pages of
                whole prefixes those that are worth more than one more request (`Ageing`).
            state_cost_tokens: tokens of full attention that fit in the bytes of one page of a whole
                prefix. A page that saves fewer is demoted once a longer prefix has one. 0: no page
                of a whole prefix is demoted or shielded.
            grace_tokens: tokens, before those that are read at a path's end, that are as young as
                the end.
            most_on_path: pages of whole prefixes that a path keeps, not counting those where
                requests part; None for any number.
        """
        self.policies = tuple(policies)
        self.tokens_per_page = tokens_per_page
        self._groups = range(len(self.policies))
        bases = (closed_group(self.policies), image_group(self.policies))
        self._others = [group_id for group_id in self._groups if group_id not in bases]
        self._owner = owner
        self._observer = observer
        self._page_observer = page_observer
        self._balanced, self._aligned = balanced, aligned
        self._ageing = AgeingOptions(resume_points, shield, state_cost_tokens, grace_tokens)
        self._most_on_path = most_on_path
        self._start_empty()

    def _start_empty(self) -> None:
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
        self._holdings = Holdings(self._paths, self._times, self._owner, self._page_observer)
        self._locks = Locks(self._paths, self._ages, self._queues, self._times, self._owner)
        self._eviction = Eviction(
            self._paths,
            self._holdings,
            self._ages,
            self._queues,
            self._times,
            self._owner,
            self._observer,
            self._page_observer,
        )

    @property
    def root(self) -> Node:
        return self._paths.root

    @property
    def num_pages(self) -> Sequence[int]:
        """Per group the small pages that the trees hold."""
        return self._holdings.num_pages

    @property
    def num_shared(self) -> Sequence[int]:
        """Per group the tokens that are locked, counted once for each request beyond the first."""
        return self._locks.num_shared

    def clear(self) -> None:
        """Evict everything; nothing may be locked."""
        for child in list(self.root.children.values()):
            self._eviction.remove(self.root, child)
        self._start_empty()
        if self._observer is not None:
            self._observer.cleared()

    # ---- hit --------------------------------------------------------------------------------

    def match(
        self, namespace: Hashable, key: np.ndarray, image_ends: Sequence[int] | None = ()
    ) -> Match:
        """Longest prefix of ``key`` that is a hit in every group, and what made it shorter.
        ``image_ends``: where each of the key's images ends, which come first and are hit as a
        whole; None if nobody knows.

        Splits a node where the hit ends inside it. Refreshes what each group reads of the hit.
        Lock the node before anything else is matched, or it may have become part of a longer one.
        """
        path, agreed = self._paths.walk(namespace, key, image_ends)
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
        image_ends: Sequence[int] = (),
        *,
        forks: Collection[int] = (),
    ) -> Inserted:
        """Offer a request's own pages for ``key``; the trees adopt what they lack. Images that end
        at ``image_ends`` become nodes of their own. A page for the whole of a prefix that others
        have gone on from is where requests resume if its length is one of ``forks``; at other
        lengths it is there by chance, where a prompt was cut.

        ``start`` ends the part of the key that the trees have for this request already; it must be
        locked, or the root. Adopted pages are evictable until somebody locks them.
        """
        self._ages.tick()
        own = Offers(offers, self._paths, self._holdings, self._observer, image_ends, forks)
        node, at, branch = start, start.end, None
        while at < key.size:
            child = node.children.get(self._paths.edge(namespace, key, at))
            if child is None:
                branch = node
                node = own.append(namespace, node, key)
                break
            agreed = at + self._paths.agreement(child, key, at)
            if not self._paths.leads_into(child, agreed, image_ends):
                break  # two images of one name, or one that is text elsewhere: the first stays
            at = agreed
            if at < child.end:
                child = self._paths.split(child, at)
            own.fill(child)
            node = child
        if branch is not None and branch.parent is not None and len(branch.children) > 1:
            branch.forked = True
            for group_id in self._ages.prefix_groups:
                branch.resume_point[group_id] = True
                self._ages.reshield(branch)
        self._ages.touch(node, hit=False)
        self._ages.mark_resume_points(node)
        # Not before: the queues would have to set every new node's age right.
        for adopted, group_id in own.adopted:
            if (extent := adopted.evictable(group_id)) is not None:
                self._queues.push(adopted, extent)
            if self.policies[group_id].per_prefix:
                self._ages.reshield(adopted)
                self._ages.demote_cheap_states(adopted, group_id)
        if self._most_on_path is not None:
            self._eviction.evict_beyond(self._most_on_path, node)
        self._ages.demote_unreachable(node)
        self._paths.join(node)
        return Inserted(node, own.declined)

    # ---- lock -------------------------------------------------------------------------------

    def lock(self, node: Node, *, without: Collection[int] = ()) -> PathLock:
        """Keep what a request running on this prefix reads; `unlock` takes the receipt.

        ``without``: groups of which the request has what it needs in pages of its own.
        """
        return self._locks.lock(node, without)

    def unlock(self, lock: PathLock) -> None:
        """Undo what is left of a lock."""
        self._locks.unlock(lock)

    def advance(
        self, lock: PathLock, group_id: int, length: int, *, exactly: bool = True
    ) -> PathLock:
        """Give up what one group does not read any more now that the request is at ``length``:
        ``exactly``, or up to a multiple of its grain.

        A request before the end of what it has locked gives up nothing. Returns the receipt of
        what is still locked; the old one is void.
        """
        return self._locks.advance(lock, group_id, length, exactly=exactly)

    # ---- evict ------------------------------------------------------------------------------

    def evict_large(self, count: int) -> bool:
        """Empty ``count`` large pages, the least recently used of any group first.

        Only large pages that can become empty are considered (paper section 5.4, step 3). False if
        there were not enough of them.
        """
        return self._eviction.evict_large(count)

    def evict_small(self, group_id: int, count: int) -> int:
        """Evict ``count`` small pages of one group, the least recently used first (step 5).

        Returns how many it were; fewer if no more is evictable.
        """
        return self._eviction.evict_small(group_id, count)

    def evict_smalls_before_large(self, short: Sequence[int]) -> int:
        """Evict at most ``short[g]`` small pages of each group g, but only those older than the
        large page that eviction would empty next. Returns how many.

        Where a large page holds one state or a hundred tokens, emptying one often costs younger
        pages than single old ones do.
        """
        return self._eviction.evict_smalls_before_large(short)

    def evict_unreachable(self, short: Sequence[int]) -> int:
        """Evict tokens that nothing can hit any more, at most as many pages as the closed group is
        ``short`` of. Returns how many."""
        return self._eviction.evict_unreachable(short)

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
        nodes = self.nodes()
        for node in nodes:
            assert node.key.size == node.end - node.begin > 0
            assert (node.end - node.begin) % self.tokens_per_page == 0
            assert node.parent is not None and node.parent.end == node.begin
            assert node.parent.children[node.edge] is node
            assert node.extents[node.base] is not None, "a node without its base group's pages"
            for other in self._paths.bases:
                assert other == node.base or node.extents[other] is None, "pages of two bases"
            if node.base == self._paths.image:
                behind = node.parent is self.root or node.parent.base == self._paths.image
                assert behind, "an image behind text"
            for group_id in self._groups:
                if (evictable := node.evictable(group_id)) is not None:
                    entry, time = node.in_smalls[group_id], self._times.of(evictable)
                    assert entry is not None and entry <= time, "an evictable node is not queued"
                    assert evictable.shielded == self._ages.is_shielded(node, group_id)
        self._holdings.check(nodes)
        self._locks.check(nodes)

"""Evicting: victims are asked of the queues, cut out of the trees, and their pages given up."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_jenga.radix.ageing import Ageing
from sglang_jenga.radix.holdings import Holdings
from sglang_jenga.radix.node import AnyOwner, Extent, Node, PageObserver, TreeObserver
from sglang_jenga.radix.paths import Paths, upwards
from sglang_jenga.radix.queues import EvictionQueues
from sglang_jenga.radix.times import DEMOTED_BEFORE, Times


class Eviction:
    """Takes pages out of the trees, and the nodes that end with them. b is a node's base group:

        extents[b] is None  =>  the node is gone, with all below it and every group's pages

    So nothing in the trees is unreachable. Of one node the pages at its back go first, since
    they belong to longer prefixes. An image goes as a whole, and with it all that was computed
    from it.
    """

    def __init__(
        self,
        paths: Paths,
        holdings: Holdings,
        ages: Ageing,
        queues: EvictionQueues,
        times: Times,
        owner: AnyOwner,
        observer: TreeObserver | None,
        page_observer: PageObserver | None,
    ) -> None:
        self._paths, self._holdings, self._ages = paths, holdings, ages
        self._queues, self._times, self._owner = queues, times, owner
        self._observer, self._page_observer = observer, page_observer
        self._groups = range(len(paths.policies))
        self._closed = paths.closed
        self._per_prefix = [policy.per_prefix for policy in paths.policies]

    def evict_large(self, count: int) -> bool:
        """As `RadixTrees.evict_large`."""
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

        Removing a leaf's tokens frees the other groups' pages too, so fewer large pages of the
        base group are needed. The number is rounded down; the next round asks for the rest.
        """
        if extent.group_id != extent.node.base:
            return missing
        larges = sum(other.num_large for other in extent.node.extents if other is not None)
        return max(1, int(missing * extent.num_large / larges))

    def evict_small(self, group_id: int, count: int, *, before: int | None = None) -> int:
        """As `RadixTrees.evict_small`; with ``before`` only pages whose time is less."""
        num_pages = self._holdings.num_pages
        pages = num_pages[group_id]
        while (missing := count - (pages - num_pages[group_id])) > 0:
            extent = self._queues.pop_small(group_id, before)
            if extent is None:
                break
            self._cut(extent.node, group_id, max(0, extent.size - missing))
        return pages - num_pages[group_id]

    def evict_smalls_before_large(self, short: Sequence[int]) -> int:
        """As `RadixTrees.evict_smalls_before_large`."""
        top = self._queues.next_large()
        if top is None:
            return 0
        return sum(
            self.evict_small(group_id, count, before=top[0])
            for group_id, count in enumerate(short)
            if count > 0 and group_id != top[1]
        )

    def evict_unreachable(self, short: Sequence[int]) -> int:
        """As `RadixTrees.evict_unreachable`."""
        if not self._ages.prefix_groups:
            return 0
        return self.evict_small(self._closed, short[self._closed], before=DEMOTED_BEFORE)

    def evict_beyond(self, most: int, end: Node) -> None:
        """Leave the path to ``end`` at most ``most`` pages of whole prefixes, per group of such.

        The shortest prefixes lose theirs first. Locked pages stay, and so do those where requests
        part.
        """
        for group_id in self._ages.prefix_groups:
            holders = [node for node in upwards(end, 0) if node.extents[group_id] is not None]
            excess = len(holders) - most
            for node in reversed(holders):
                if excess <= 0 or node is end:
                    break
                if node.evictable(group_id) is not None and node.children and not node.parts:
                    self._cut(node, group_id, 0)
                    excess -= 1

    def _cut(self, node: Node, group_id: int, index: int) -> None:
        """Evict a node's pages of one group from the ``index``-th on: longer prefixes go first."""
        if index and node.base != self._paths.image:
            self._paths.split(node, node.begin + index * self._paths.tokens_per_page)
        if group_id == node.base:
            above = node.parent
            assert above is not None, "the root has no pages"
            self.remove(above, node)
            self._ages.demote_unreachable(above)
        else:
            self._holdings.drop(node, group_id)
            if self._page_observer is not None:
                self._page_observer.changed(node, group_id)
            if self._per_prefix[group_id]:
                self._ages.demote_unreachable(node)

    def remove(self, above: Node, top: Node) -> None:
        """Take out a child of ``above`` and all nodes below it, with every group's pages: nothing
        could reach them any more."""
        del above.children[top.edge]
        stack = [top]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            for group_id in self._groups:
                self._holdings.drop(node, group_id)
            if self._observer is not None:
                self._observer.removed(node)

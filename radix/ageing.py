"""When each node was last of use to each layer group, and so what the trees evict first.

The clock goes on with every hit and insert. What is of no use any more is *demoted*: it goes before
all that is, in the order in which it was demoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sglang_jenga.radix.eviction import EvictionQueues
from sglang_jenga.radix.node import Node
from sglang_jenga.radix.paths import Paths, upwards
from sglang_jenga.radix.policy import Range

# Added to the time of pages that a hit went past: they go before all that were read, oldest first.
_OUT_OF_REACH = -(1 << 48)


class Ageing:
    """Keeps ``used_at`` and ``anchored`` of the nodes on `Paths`; ``now`` is the trees' clock.

    For every node and group:

        used_at[g] >= 0   last of use then
        used_at[g] < 0    demoted then: goes before all that is of use
    """

    def __init__(
        self, paths: Paths, queues: EvictionQueues, *, anchors: bool, worth: int, spared: int
    ) -> None:
        """As in `RadixTrees`."""
        self.now = 0
        self._paths = paths
        self._queues = queues
        self._worth = worth
        self._spared = spared
        self._groups = range(len(paths.policies))
        # Groups whose pages are of no use behind a hit that went past them.
        token_groups = [g for g in self._groups[1:] if not paths.policies[g].per_prefix]
        self._passed = frozenset(token_groups if anchors else ())
        self.prefix_groups = [g for g in self._groups if paths.policies[g].per_prefix]

    def tick(self) -> None:
        """Something happens that makes pages of use."""
        self.now += 1

    def touch(self, node: Node, *, hit: bool) -> None:
        """Refresh what each group reads of the prefix that ends at ``node``, and what it reads of
        the anchors before it; the rest ages, and after a hit goes before all that was of use."""
        now = self.now
        for group_id in self._groups[1:]:
            ranges = self._paths.ranges_read(group_id, node.end)
            for part in self._paths.parts_read(node, ranges, group_id):
                part.used_at[group_id] = now
        for part in upwards(node, 0):
            used_at = part.used_at
            used_at[0] = now  # group 0 reads it all
            for group_id in self._groups[1:]:
                if part.anchored[group_id]:
                    used_at[group_id] = now
                elif hit and 0 <= used_at[group_id] < now and group_id in self._passed:
                    self.demote(part, group_id)

    def settle(self, node: Node) -> None:
        """A request has got as far as ``node``. The next ones will go on from there, or part from
        this path where others have: what the groups read at those places is refreshed by whoever
        passes. They may part shortly before its end as well, as another question on one document
        does: what comes shortly before ages with its request. All else on the path goes first: the
        windows of its middle, of earlier ends, and of where a prompt was cut.

        Of states only the one that is consumed is refreshed. Without the places where requests part
        a prefix in daily use would lose the windows that its users begin with.
        """
        if not self._passed:
            return  # full attention reads it all: no path to walk for it
        paths = self._paths
        forks = [above.end for above in upwards(node, 0) if len(above.children) > 1]
        for group_id in self._passed:
            last = paths.ranges_read(group_id, node.end)
            before = self._before(last)
            ranges = [*last, *(r for end in forks for r in paths.ranges_read(group_id, end))]
            paths.parts_read(node, before, group_id)  # all cuts first: a node keeps only its back
            kept = set(paths.parts_read(node, _joined(ranges), group_id))
            spared = set(paths.parts_read(node, before, group_id))
            for part in upwards(node, 0):
                part.anchored[group_id] = part in kept
                if part in kept:
                    part.used_at[group_id] = self.now
                elif part.used_at[group_id] >= 0 and part not in spared:
                    self.demote(part, group_id)

    def _before(self, last: Sequence[Range]) -> list[Range]:
        """As many tokens as are read at a path's end once more, and at least ``spared``."""
        if not last:
            return []
        step, behind = self._paths.tokens_per_page, last[0][0]
        count = max(self._spared, sum(end - begin for begin, end in last))
        return [(max(0, behind - count - -count % step), behind)] if behind else []

    def demote(self, node: Node, group_id: int) -> None:
        node.used_at[group_id] = self.now + _OUT_OF_REACH
        self._queues.push_again(node, group_id)

    def thin(self, node: Node, group_id: int) -> None:
        """A prefix has got its one page. Is the page of the prefix before it still worth its bytes?

        It serves those who will part from this path between the two, and saves them what lies
        between it and the page before. Where requests have parted already it stays.
        """
        last = node.parent
        while last.parent is not None and last.extents[group_id] is None:
            if self._is_branch(last, group_id):
                return
            last = last.parent
        if last.parent is None or self._is_branch(last, group_id):
            return
        before = last.parent
        while before.parent is not None and (
            before.extents[group_id] is None or before.used_at[group_id] < 0  # goes first itself
        ):
            before = before.parent
        if last.end - before.end < self._worth:
            self.demote(last, group_id)

    @staticmethod
    def _is_branch(node: Node, group_id: int) -> bool:
        """Whether requests part here, or did before all but one way was evicted."""
        return len(node.children) > 1 or node.anchored[group_id]

    def strand(self, node: Node) -> None:
        """Where a group has one page per prefix, tokens can only be hit with such a page at or
        behind their end. Without one they go before all that are of use; a request that comes this
        way again still learns from them where it parts."""
        if not self.prefix_groups:
            return
        while (
            node.parent is not None
            and all(node.extents[group_id] is None for group_id in self.prefix_groups)
            and all(child.used_at[0] < 0 for child in node.children.values())
        ):
            for group_id in self._groups:
                if not self._paths.policies[group_id].per_prefix:
                    self.demote(node, group_id)
            node = node.parent


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """The same tokens in disjoint ranges, rising."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined

"""Which evictable node is the least recently used, over all groups at once."""

from __future__ import annotations

import heapq

from sglang_jenga.radix.node import Node


class EvictionQueues:
    """One heap per group, ordered by (time of last use, longest prefix first).

    A node is in a group's heap at most once (``node.queued``). Entries are not moved when their
    node is used, locked or dropped; they are set right when they come to the top. O(log n) each.
    """

    def __init__(self, num_groups: int) -> None:
        self._heaps: list[list[tuple[int, int, Node]]] = [[] for _ in range(num_groups)]

    def push(self, node: Node, group_id: int) -> None:
        """Make a node known as a candidate; it may turn out not to be one yet."""
        if not node.queued[group_id]:
            node.queued[group_id] = True
            heapq.heappush(self._heaps[group_id], _entry(node, group_id))

    def pop_oldest(self) -> tuple[int, Node] | None:
        """Take out the group and node to evict next, None if nothing is evictable."""
        best: tuple[int, int, int] | None = None
        for group_id, heap in enumerate(self._heaps):
            self._settle(group_id)
            if heap and (best is None or (*heap[0][:2], group_id) < best):
                best = (*heap[0][:2], group_id)
        if best is None:
            return None
        group_id = best[2]
        node = heapq.heappop(self._heaps[group_id])[2]
        node.queued[group_id] = False
        return group_id, node

    def _settle(self, group_id: int) -> None:
        """Bring a true candidate with its true age to the top."""
        heap = self._heaps[group_id]
        while heap:
            used_at, _, node = heap[0]
            if not node.evictable(group_id):
                heapq.heappop(heap)
                node.queued[group_id] = False
            elif used_at != node.used_at[group_id]:
                heapq.heapreplace(heap, _entry(node, group_id))
            else:
                return


def _entry(node: Node, group_id: int) -> tuple[int, int, Node]:
    return (node.used_at[group_id], -node.end, node)

"""Which large page, or else which node, is the least recently used, over all groups at once."""

from __future__ import annotations

import heapq
from operator import attrgetter

from sglang_jenga.radix.node import AnyOwner, Extent, Node
from sglang_jenga.radix.times import Times

MANY = 1024  # entries below which no queue is tidied
_Entry = tuple[int, int, Node]  # a time, a counter, whose it is


class EvictionQueues:
    """Two queues per group, ordered by time (`Times`):

    * ``smalls``: every evictable node, by its own time
    * ``larges``: evictable nodes that lie in reclaimable large pages, by the turn of the first of
      these. A large page has its turn when the newest of its small pages has (paper section 5.4)

    No entry moves when a node is used, locked or dropped. So an entry may be early, or stand for a
    node that is no candidate any more; it is set right when it comes to the top. No entry may be
    late, so a node that becomes older is pushed again. For every evictable node:

        in_smalls[g] is not None and in_smalls[g] <= its time
        in each reclaimable large page some node has in_larges[g] <= the turn of the large page

    O(log n) each. ``balanced``: one clock for all groups, else group after group.
    """

    def __init__(
        self, num_groups: int, owner: AnyOwner, times: Times, *, balanced: bool = True
    ) -> None:
        self._owner, self._times = owner, times
        self._balanced = balanced
        self._smalls: list[list[_Entry]] = [[] for _ in range(num_groups)]
        self._larges: list[list[_Entry]] = [[] for _ in range(num_groups)]
        self._counter = 0
        self._limit = MANY

    def push(self, node: Node, extent: Extent) -> None:
        """Enter a node's extent as a candidate, or once more because it has become older."""
        time, group_id = self._times.of(extent), extent.group_id
        before = node.in_smalls[group_id]
        if before is None or time < before:
            node.in_smalls[group_id] = time
            self._add(self._smalls[group_id], time, node)
        self._push_large(node, group_id, time)

    def _push_large(self, node: Node, group_id: int, time: int) -> None:
        before = node.in_larges[group_id]
        if before is None or time < before:
            node.in_larges[group_id] = time
            self._add(self._larges[group_id], time, node)

    def joined(self, front: Node, back: Node) -> None:
        """``back`` has taken over the pages of ``front``, which are as old as its own."""
        for group_id, extent in enumerate(back.extents):
            front.in_smalls[group_id] = front.in_larges[group_id] = None
            if extent is not None and not extent.pinned:
                self.push(back, extent)

    def next_large(self) -> tuple[int, int] | None:
        """The turn and the group of the large page to empty next, None if none can be."""
        times = self._times
        woken: list[Extent] = self._owner.take_woken(times.array)
        for extent in woken:
            # Its own time is never later than the turn, which may have been misjudged.
            self._push_large(extent.node, extent.group_id, times.of(extent))
        best = None
        for group_id in range(len(self._larges)):
            turn = self._top_large(group_id)
            if turn is not None and (best is None or turn < best[0]):
                best = (turn, group_id)
                if not self._balanced:
                    break
        return best

    def pop_large(self) -> tuple[int, Extent] | None:
        """Take out the turn of the large page to empty next, and an extent that lies in it."""
        best = self.next_large()
        if best is None:
            return None
        turn, group_id = best
        node = heapq.heappop(self._larges[group_id])[2]
        node.in_larges[group_id] = None
        extent = node.extents[group_id]
        assert extent is not None
        return turn, extent

    def pop_small(self, group_id: int, before: int | None = None) -> Extent | None:
        """Take out the least recently used extent of one group, None if it has no evictable one, or
        none whose time is before ``before``."""
        time = self._top_small(group_id)
        if time is None or (before is not None and time >= before):
            return None
        node = heapq.heappop(self._smalls[group_id])[2]
        node.in_smalls[group_id] = None
        return node.extents[group_id]

    def _top_small(self, group_id: int) -> int | None:
        """Bring the oldest candidate with its true time to the top; return that."""
        heap = self._smalls[group_id]
        while heap:
            time, counter, node = heap[0]
            if node.in_smalls[group_id] != time:
                heapq.heappop(heap)  # it has another entry
            elif (extent := node.evictable(group_id)) is None:
                heapq.heappop(heap)
                node.in_smalls[group_id] = None
            elif (now := self._times.of(extent)) != time:
                node.in_smalls[group_id] = now
                heapq.heapreplace(heap, (now, counter, node))
            else:
                return time
        return None

    def _top_large(self, group_id: int) -> int | None:
        """The same of large pages."""
        heap, array = self._larges[group_id], self._times.array
        while heap:
            time, counter, node = heap[0]
            if node.in_larges[group_id] != time:
                heapq.heappop(heap)
                continue
            extent = node.evictable(group_id)
            turn = None if extent is None else self._owner.turn(extent, array)
            node.in_larges[group_id] = turn
            if turn is None:
                heapq.heappop(heap)
            elif turn != time:
                heapq.heapreplace(heap, (turn, counter, node))
            else:
                return turn
        return None

    def _add(self, heap: list[_Entry], time: int, node: Node) -> None:
        self._counter += 1  # of full ties the first to come
        heapq.heappush(heap, (time, self._counter, node))
        if len(heap) > self._limit:
            self._tidy()

    def _tidy(self) -> None:
        """Throw out entries of nodes that are gone, locked, or entered elsewhere. O(n), once in n
        pushes."""
        most = 0
        for group_id in range(len(self._smalls)):
            for heap, placed in (
                (self._smalls[group_id], _in_smalls),
                (self._larges[group_id], _in_larges),
            ):
                valid = [entry for entry in heap if placed(entry[2])[group_id] == entry[0]]
                heap[:] = [entry for entry in valid if entry[2].evictable(group_id) is not None]
                for _, _, node in valid:
                    if node.evictable(group_id) is None:
                        placed(node)[group_id] = None  # it is pushed again when it is unlocked
                heapq.heapify(heap)
                most = max(most, len(heap))
        self._limit = 2 * most + MANY


_in_smalls = attrgetter("in_smalls")
_in_larges = attrgetter("in_larges")

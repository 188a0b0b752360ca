"""Which large page, or else which node, is the least recently used, over all groups at once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sglang_jenga.radix.node import Node, PageOwner
from sglang_jenga.radix.policy import LayerPolicy, Prefix

NOWHERE, AMONG_PARTS, AMONG_WHOLES = 0, 1, 2

_MANY = 1024
Key = tuple[int, int]  # time of last use, then the lower of two the higher rank
_Entry = tuple[Key, int, "Node | int"]


class EvictionQueues:
    """Two heaps per group, ordered by (time of last use, highest rank first):

    * ``wholes``: what can give large pages back: nodes that fill some alone, and ids of shared ones
      that are fully evictable, whose time is the newest of its small pages' (paper section 5.4)
    * ``parts``: nodes that hold small pages in shared large pages only

    Entries are not moved when their node is used, locked or dropped; they are set right when they
    come to the top. O(log n) each.

    ``balanced``: one clock for all groups, else group after group. ``aligned``: equally old pages
    go by rank, else as they come.
    """

    def __init__(
        self,
        policies: Sequence[LayerPolicy],
        owner: PageOwner,
        *,
        balanced: bool = True,
        aligned: bool = True,
    ) -> None:
        self._policies = policies
        self._owner = owner
        self._balanced, self._aligned = balanced, aligned
        self._heaps: list[tuple[list[_Entry], list[_Entry]]] = [([], []) for _ in policies]
        self._counter = 0
        self._limits = [[_MANY, _MANY] for _ in policies]
        # Most policies rank by prefix length; asking them would double the cost of a comparison.
        default = LayerPolicy.set_prefix_length
        self._by_length = [type(policy).set_prefix_length is default for policy in policies]

    def push(self, node: Node, group_id: int) -> None:
        """Make a node known as a candidate; it may turn out not to be one yet."""
        extent = node.extents[group_id]
        assert extent is not None
        place = AMONG_WHOLES if extent.num_whole else AMONG_PARTS
        if node.queued[group_id] < place:
            node.queued[group_id] = place
            self._add(group_id, place, self._key(node, group_id), node)

    def push_again(self, node: Node, group_id: int) -> None:
        """The same for a node that has become older than its entry says, if it has one; a locked
        one gets its new entry when it is unlocked."""
        node.queued[group_id] = NOWHERE
        if not node.evictable(group_id):
            return
        self.push(node, group_id)
        for large_id in node.extents[group_id].shared:
            if self._owner.large.is_idle(large_id):
                self._add(group_id, AMONG_WHOLES, self._newest(large_id, group_id), large_id)

    def next_large(self) -> tuple[Key, int] | None:
        """The turn and the group of what gives a large page back next, None if nothing can."""
        large = self._owner.large
        for large_id in large.take_turned_idle():
            extents = large.extents_in(large_id)
            if extents:
                group_id = extents[0].group_id
                self._add(group_id, AMONG_WHOLES, self._newest(large_id, group_id), large_id)
        best = None
        for group_id in range(len(self._heaps)):
            top = self._top(group_id, AMONG_WHOLES)
            if top is not None and (best is None or (top[0], group_id) < best):
                best = (top[0], group_id)
                if not self._balanced:
                    break
        return best

    def pop_large(self) -> tuple[int, Node | int] | None:
        """Take out the group and the node or shared large page that gives a large page back next;
        None if none can."""
        best = self.next_large()
        return None if best is None else (best[1], self._pop(best[1], AMONG_WHOLES))

    def pop_node(self, group_id: int, before: Key | None = None) -> Node | None:
        """Take out the least recently used node of one group, None if it has no evictable one, or
        none whose turn is before ``before``."""
        passed = []  # shared large pages: the nodes in them have entries of their own
        found = None
        while found is None:
            tops = [(self._top(group_id, place), place) for place in (AMONG_WHOLES, AMONG_PARTS)]
            ready = [(top[0], place) for top, place in tops if top is not None]
            if not ready or (before is not None and min(ready)[0] >= before):
                break
            item = self._pop(group_id, min(ready)[1])
            if isinstance(item, Node):
                found = item
            else:
                passed.append(item)
        for large_id in passed:
            self._add(group_id, AMONG_WHOLES, self._newest(large_id, group_id), large_id)
        return found

    def _pop(self, group_id: int, place: int) -> Node | int:
        item = heapq.heappop(self._heaps[group_id][place - 1])[2]
        if isinstance(item, Node):
            item.queued[group_id] = NOWHERE
        return item

    def _add(self, group_id: int, place: int, key: Key, item: Node | int) -> None:
        self._counter += 1  # of full ties the first to come
        heap = self._heaps[group_id][place - 1]
        heapq.heappush(heap, (key, self._counter, item))
        if len(heap) > self._limits[group_id][place - 1]:
            self._tidy(group_id, place)

    def _tidy(self, group_id: int, place: int) -> None:
        """Throw out entries of what is gone, or is there twice. O(n), once in n additions."""
        heap = self._heaps[group_id][place - 1]
        entries = {entry[2]: entry for entry in sorted(heap, reverse=True)}
        heap[:] = [
            entry
            for entry in entries.values()
            if self._key_now(entry[2], group_id, place) is not None
        ]
        heapq.heapify(heap)
        self._limits[group_id][place - 1] = 2 * len(heap) + _MANY

    def _top(self, group_id: int, place: int) -> _Entry | None:
        """Bring a true candidate with its true age to the top."""
        heap = self._heaps[group_id][place - 1]
        while heap:
            key, counter, item = heap[0]
            now = self._key_now(item, group_id, place)
            if now is None:
                heapq.heappop(heap)
            elif now != key:
                heapq.heapreplace(heap, (now, counter, item))
            else:
                return heap[0]
        return None

    def _key_now(self, item: Node | int, group_id: int, place: int) -> Key | None:
        """Order of an entry as things are now, None if it is no candidate any more."""
        if not isinstance(item, Node):
            return self._newest(item, group_id) if self._owner.large.is_idle(item) else None
        if item.queued[group_id] != place:
            return None
        if not item.evictable(group_id):
            item.queued[group_id] = NOWHERE
            return None
        extent = item.extents[group_id]
        if place == AMONG_WHOLES and not extent.num_whole:
            item.queued[group_id] = NOWHERE
            self.push(item, group_id)
            return None
        return self._key(item, group_id)

    def _newest(self, large_id: int, group_id: int) -> Key | None:
        """The turn of a shared large page: when the last of its small pages has its turn."""
        extents = self._owner.large.extents_in(large_id)
        if not extents or extents[0].group_id != group_id:
            return None
        return max(self._key(extent.node, group_id) for extent in extents)

    def _key(self, node: Node, group_id: int) -> Key:
        policy = self._policies[group_id]
        used_at = node.used_at[group_id]
        if policy.per_prefix and len(node.children) > 1:
            # Requests part here: the state is as much in demand as the tokens it stands for.
            used_at = max(used_at, node.used_at[0])
        if not self._aligned:
            return used_at, 0
        if self._by_length[group_id]:
            return used_at, -node.end
        return used_at, -policy.set_prefix_length(Prefix(node.end), (node.begin, node.end))

"""What running requests keep of the prefixes that they run on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sglang_jenga.radix.ageing import Ageing
from sglang_jenga.radix.node import AnyOwner, Node, PathLock
from sglang_jenga.radix.paths import Paths
from sglang_jenga.radix.policy import Range
from sglang_jenga.radix.queues import EvictionQueues
from sglang_jenga.radix.times import Times


class Locks:
    """Counts ``Node.locks``: per group, the running requests that need a node. b is a node's base
    group:

        locks[b] of a node  >=  sum of its children's
        num_shared[g]       ==  sum of (locks[g] - 1) * tokens over nodes with locks[g] > 1,
                                where a page of a whole prefix counts as one token
    """

    def __init__(
        self, paths: Paths, ages: Ageing, queues: EvictionQueues, times: Times, owner: AnyOwner
    ) -> None:
        self._paths, self._ages, self._owner = paths, ages, owner
        self._queues, self._times = queues, times
        self._groups = range(len(paths.policies))
        self._closed = paths.closed
        bases = paths.bases
        self._bases_last = (*(g for g in self._groups if g not in bases), *bases)
        self._per_prefix = [policy.per_prefix for policy in paths.policies]
        self.num_shared = [0] * len(paths.policies)

    def lock(self, node: Node, without: Collection[int]) -> PathLock:
        """As `RadixTrees.lock`."""
        # Splits may cut nodes later, so the receipt names tokens, not nodes.
        ranges = [
            () if group_id in without else tuple(self._paths.ranges_kept(group_id, node.end))
            for group_id in self._groups
        ]
        lock = PathLock(node, tuple(ranges))
        for group_id in self._bases_last:  # a lock there shields what is not pinned by then
            for part in self._paths.parts_read(node, lock.ranges[group_id], group_id):
                part.locks[group_id] += 1
                if part.locks[group_id] == 1:
                    self._pin(part, group_id)
                else:
                    self.num_shared[group_id] += self._num_positions(part, group_id)
                    self._recount(part, group_id)
        return lock

    def unlock(self, lock: PathLock) -> None:
        """As `RadixTrees.unlock`."""
        for group_id, ranges in enumerate(lock.ranges):
            for part in self._paths.parts_read(lock.node, ranges, group_id):
                self._release(part, group_id)

    def advance(
        self, lock: PathLock, group_id: int, length: int, *, exactly: bool = True
    ) -> PathLock:
        """As `RadixTrees.advance`."""
        node, before = lock.node, lock.ranges[group_id]
        length = max(length, node.end)
        kept = self._paths.ranges_kept(group_id, length, most=node.end, exactly=exactly)
        gone = _minus(before, kept)
        if not gone:
            return lock
        for part in self._paths.parts_read(node, gone, group_id):
            self._release(part, group_id)
        ranges = list(lock.ranges)
        ranges[group_id] = tuple(_minus(before, gone))
        return PathLock(node, tuple(ranges))

    def _num_positions(self, node: Node, group_id: int) -> int:
        return 1 if self._per_prefix[group_id] else node.end - node.begin

    def _pin(self, node: Node, group_id: int) -> None:
        extent = node.extents[group_id]
        if extent is not None:
            if extent.shielded:
                self._times.shield(extent, False)
            self._owner.pin(extent)
        if group_id == self._closed:
            self._ages.reshield(node)

    def _release(self, node: Node, group_id: int) -> None:
        node.locks[group_id] -= 1
        assert node.locks[group_id] >= 0, "unlocked more often than locked"
        if node.locks[group_id]:
            self.num_shared[group_id] -= self._num_positions(node, group_id)
            self._recount(node, group_id)
            return
        extent = node.extents[group_id]
        if extent is not None:
            self._owner.unpin(extent)
            self._queues.push(node, extent)
        self._ages.reshield(node)

    def _recount(self, node: Node, group_id: int) -> None:
        """The node stays locked, by more or fewer."""
        if group_id == self._closed and self._ages.counts_locks:
            self._ages.reshield(node)

    def check(self, nodes: list[Node]) -> None:
        """Recount. O(tree)."""
        shared = [0] * len(self.num_shared)
        for node in nodes:
            for group_id, locks in enumerate(node.locks):
                shared[group_id] += max(0, locks - 1) * self._num_positions(node, group_id)
            below = sum(child.locks[child.base] for child in node.children.values())
            assert node.locks[node.base] >= below, "a locked node under an unlocked one"
            for other in self._paths.bases:
                assert other == node.base or not node.locks[other], "locked in another's group"
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

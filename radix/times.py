"""When every extent was of use last: one number each, by which evictions are ordered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_jenga.radix.node import Extent, Node
from sglang_jenga.radix.policy import MOST_RANK, LayerPolicy, Prefix

_RANKS = MOST_RANK + 1
_TIER = 1 << 61  # between what was demoted, what is of use, and what is shielded

DEMOTED_BEFORE = 0
"""Times below are of what was demoted."""


class Times:
    """``array[extent.number]``, int64: the lower goes first.

        time == used_at * 2**24 - rank                   of use at clock ``used_at``, 1 at least
        time == used_at * 2**24 - rank - 2**61 < 0       demoted then: before all that is of use
        time == used_at * 2**24 - rank + 2**61           shielded: after all that is not

    Of equally old ones the higher rank goes first, that is the longer prefix, so that all groups
    evict the same tokens; a policy may rank differently (`LayerPolicy.set_prefix_length`).
    ``aligned``: False drops ranks. ``now`` is the trees' clock.
    """

    def __init__(self, policies: Sequence[LayerPolicy], *, aligned: bool) -> None:
        self.now = 0
        self._policies = policies
        self.aligned = aligned
        # Most policies rank by prefix length; asking them would double what a refresh costs.
        default = LayerPolicy.set_prefix_length
        self._by_length = [type(policy).set_prefix_length is default for policy in policies]
        self.array = np.zeros(1024, dtype=np.int64)
        self._view = self.array.data  # single reads and writes cost a third that way

    def of(self, extent: Extent) -> int:
        return self._view[extent.number]

    def is_demoted(self, extent: Extent) -> bool:
        return self._view[extent.number] < DEMOTED_BEFORE

    def as_old(self, extent: Extent, other: Extent) -> bool:
        """Whether two extents were of use last at one time, and count the same today."""
        view = self._view
        return -view[extent.number] // _RANKS == -view[other.number] // _RANKS

    def refresh(self, node: Node, extent: Extent) -> None:
        """This extent of the node is of use now."""
        tier = _TIER if extent.shielded else 0
        self._set(extent, self.now * _RANKS - self._rank(node, extent.group_id) + tier)

    def demote(self, node: Node, extent: Extent) -> None:
        self._set(extent, self.now * _RANKS - self._rank(node, extent.group_id) - _TIER)

    def shield(self, extent: Extent, shielded: bool) -> None:
        """The extent has been shielded, or is not any more."""
        self._view[extent.number] += _TIER if shielded else -_TIER

    def inherit(self, node: Node, extent: Extent, rest: Extent) -> None:
        """This extent of the node was part of ``rest`` and is as old as that."""
        used_at = -(-self._view[rest.number] // _RANKS)  # a tier is a multiple of _RANKS
        self._set(extent, used_at * _RANKS - self._rank(node, extent.group_id))

    def _rank(self, node: Node, group_id: int) -> int:
        if not self.aligned:
            return 0
        if self._by_length[group_id]:
            return node.end
        policy = self._policies[group_id]
        rank = policy.set_prefix_length(Prefix(node.end), (node.begin, node.end))
        return min(rank, MOST_RANK)

    def _set(self, extent: Extent, time: int) -> None:
        if extent.number >= self.array.size:
            self.array = np.resize(self.array, 2 * extent.number)
            self._view = self.array.data
        self._view[extent.number] = time

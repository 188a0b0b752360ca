"""Which pages the nodes of the trees hold: nodes receive extents here, and lose them."""

from __future__ import annotations

import numpy as np

from sglang_jenga.radix.node import AnyOwner, Extent, Node, PageObserver
from sglang_jenga.radix.paths import Paths
from sglang_jenga.radix.times import Times


class Holdings:
    """Sets ``Node.extents``, tells the owner of the pages, and counts. For every node and group:

        extents[g] is not None  =>  extents[g].pinned == (locks[g] > 0)
        num_pages[g]            ==  sum of the sizes of extents[g] over all nodes

    `Paths` splits and joins extents; that moves no page from one node's tokens to another's.
    """

    def __init__(
        self, paths: Paths, times: Times, owner: AnyOwner, observer: PageObserver | None
    ) -> None:
        self.num_pages = [0] * len(paths.policies)
        self._paths, self._times = paths, times
        self._owner, self._observer = owner, observer

    def adopt(self, node: Node, group_id: int, ids: np.ndarray) -> None:
        """Fill a node's hole. The pages are of use now, but no eviction queue knows them yet."""
        extent: Extent = self._owner.adopt(group_id, ids)
        node.extents[group_id] = extent
        extent.node = node
        self.num_pages[group_id] += ids.size
        self._times.refresh(node, extent)
        if node.locks[group_id]:  # a hole inside what a running request has locked
            self._owner.pin(extent)
        if group_id != node.base and self._observer is not None:
            self._observer.changed(node, group_id)

    def drop(self, node: Node, group_id: int) -> None:
        """Evict the pages that a node has of one group, if it has any."""
        extent = node.extents[group_id]
        if extent is not None:
            self._owner.evict(extent)
            node.extents[group_id] = None
            self.num_pages[group_id] -= extent.size

    def check(self, nodes: list[Node]) -> None:
        """Recount. O(tree)."""
        policies, step = self._paths.policies, self._paths.tokens_per_page
        totals = [0] * len(policies)
        for node in nodes:
            for group_id, extent in enumerate(node.extents):
                if extent is not None:
                    pages = (node.end - node.begin) // step
                    assert extent.size == (1 if policies[group_id].per_prefix else pages)
                    assert extent.node is node
                    assert extent.pinned == (node.locks[group_id] > 0)
                    totals[group_id] += extent.size
        assert totals == self.num_pages

"""A request's own pages on their way into the trees, which adopt what they lack."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from sglang_jenga.radix.holdings import Holdings
from sglang_jenga.radix.node import Node, PrefixPages, Run, TokenPages, TreeObserver
from sglang_jenga.radix.paths import Paths


class Offers:
    """One request's offers, ``offers[g]`` of group g, for one `RadixTrees.insert`.

    ``adopted``: nodes and groups that received pages. ``declined[g]``: small ids that the trees did
    not take. Of the nodes that `append` has made and `fill` has gone through, for every group g:

        what offers[g] has for them == ids in adopted + ids in declined[g], none twice
    """

    def __init__(
        self,
        offers: Sequence[TokenPages | PrefixPages],
        paths: Paths,
        holdings: Holdings,
        observer: TreeObserver | None,
        image_ends: Sequence[int] = (),
        forks: Collection[int] = (),
    ) -> None:
        self.adopted: list[tuple[Node, int]] = []
        self.declined: list[list[np.ndarray]] = [[] for _ in offers]
        self._offers = offers
        self._paths, self._holdings, self._observer = paths, holdings, observer
        self._image_ends, self._forks = image_ends, forks

    def append(self, namespace: Hashable, parent: Node, key: np.ndarray) -> Node:
        """New nodes for the key behind ``parent``, cut where a group's pages begin or end."""
        paths, observer = self._paths, self._observer
        cuts = self._cuts(self._offers, parent.end, key.size)
        # A private copy: the caller's array may be a view of a longer, living one.
        run = Run(key[parent.end :].copy(), parent.end)
        for begin, end in pairwise([parent.end, *cuts, key.size]):
            edge = paths.edge(namespace, key, begin)
            base = paths.base_at(begin, self._image_ends)
            node = Node(parent, edge, namespace, run, begin, end, len(self._offers), base)
            parent.children[edge] = node
            for group_id, offer in enumerate(self._offers):
                ids = self._ids_for(node, offer)
                if ids is not None:
                    self._adopt(node, group_id, ids)
            if observer is not None:
                observer.stored(node)
            parent = node
        return parent

    def fill(self, node: Node) -> None:
        """An existing node of which the request brings a copy: fill its holes, decline the rest."""
        policies = self._paths.policies
        lacking = [
            offer
            for group_id, offer in enumerate(self._offers)
            if node.extents[group_id] is None or policies[group_id].per_prefix
        ]
        cuts = self._cuts(lacking, node.begin, node.end)
        for part in [*(self._paths.split(node, cut) for cut in cuts), node]:
            for group_id, offer in enumerate(self._offers):
                ids = self._ids_for(part, offer)
                if ids is None:
                    continue
                if part.extents[group_id] is None:
                    self._adopt(part, group_id, ids)
                    if policies[group_id].per_prefix and part.end in self._forks:
                        part.resume_point[group_id] = True
                else:
                    self.declined[group_id].append(ids)

    def _ids_for(self, node: Node, offer: TokenPages | PrefixPages) -> np.ndarray | None:
        """What an offer holds for a node: pages of its tokens, all or its last; or its prefix's."""
        if not isinstance(offer, TokenPages):
            return np.array([offer[node.end]]) if node.end in offer else None
        begin = max(node.begin, offer.begin)
        if begin >= node.end:
            return None
        step = self._paths.tokens_per_page
        ids = offer.ids[(begin - offer.begin) // step : (node.end - offer.begin) // step]
        low, high = max(offer.gone[0], begin), min(offer.gone[1], node.end)
        if low >= high:
            return ids if ids.size else None
        front, back = (low - begin) // step, (high - begin) // step
        left = np.concatenate([ids[:front], ids[back:]])
        return left if left.size else None

    def _adopt(self, node: Node, group_id: int, ids: np.ndarray) -> None:
        self._holdings.adopt(node, group_id, ids)
        self.adopted.append((node, group_id))

    def _cuts(self, offers: Iterable[TokenPages | PrefixPages], begin: int, end: int) -> list[int]:
        """Positions inside ``(begin, end)`` at which nodes must end for the offers."""
        cuts = set(self._image_ends)
        for offer in offers:
            cuts.update((offer.begin, *offer.gone) if isinstance(offer, TokenPages) else offer)
        return sorted(cut for cut in cuts if begin < cut < end)

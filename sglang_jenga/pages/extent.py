"""The small pages that one node of a radix tree holds in one group."""

from __future__ import annotations

from typing import Any

import numpy as np


class Extent:
    """Small pages ``ids`` (int64) of one group in token order, held by the prefix cache.

    ``number`` stands for the extent in the allocator's books. It is in one of three states:

        pinned      a running request needs it
        shielded    eviction may take it, but only when nothing else is left
        otherwise   evictable

    ``node`` is for the prefix cache, which sets and reads it.
    """

    __slots__ = ("group_id", "ids", "k", "node", "number", "pinned", "shielded")

    def __init__(self, group_id: int, ids: np.ndarray, k: int, number: int) -> None:
        self.group_id, self.ids, self.k, self.number = group_id, ids, k, number
        self.pinned = self.shielded = False
        self.node: Any = None

    @property
    def size(self) -> int:
        return self.ids.size

    @property
    def num_large(self) -> float:
        """Large pages' worth of bytes."""
        return self.ids.size / self.k

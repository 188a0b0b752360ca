"""Where the pool's bytes are at one moment, and which free ones nobody can take.

Numbers only; `memory.py` reads them from a scheduler and `result.py` defines the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Occupancy(NamedTuple):
    """Bytes. `held` and `cached` are per layer group, padding included; `lent` are free bytes that
    only one group (jenga) or one partition (stock) can take, `common` those that anybody can."""

    held: list[int]
    cached: list[int]
    lent: list[int]
    common: int
    padded: int

    def stranded(self, mix: Sequence[float]) -> int:
        """Free bytes left over when groups go on being served in the proportions `mix`.

        Finds the most bytes t with ``sum(max(0, t * mix[g] - lent[g])) <= common``.
        """
        free = sum(self.lent) + self.common
        # Groups in the order in which they use up what is theirs alone.
        order = sorted(
            (lent / share, share, lent)
            for lent, share in zip(self.lent, mix, strict=True)
            if share > 0
        )
        taken_share = taken_lent = 0.0
        best = float(free)  # nobody asks for anything
        for index, (_, share, lent) in enumerate(order):
            taken_share += share
            taken_lent += lent
            best = (self.common + taken_lent) / taken_share
            if index + 1 == len(order) or best <= order[index + 1][0]:
                break
        return max(0, int(free - best))

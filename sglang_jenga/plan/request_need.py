"""What one request takes of the pool: one answer for boot, for intake and for admission.

A request that has the server to itself can give up everything else that is cached, its own prefix
included. So it is served exactly if its need fits an empty pool, however the three ask:

    boot        the longest request that fits is SGLang's ``max_total_num_tokens``
    intake      a request that does not fit is refused, its answer cut if that helps
    admission   a request that is alone is let in if what it does not hold yet fits
"""

from __future__ import annotations

from sglang_jenga.layers.base import Load
from sglang_jenga.plan.planner import most_that_fits
from sglang_jenga.plan.spec import PoolPlan

MOST_BEHIND_WINDOW = 32
"""Tokens that a window may leave behind before they are given back. SGLang's default of 128 would
be as much again as a short window; giving back costs tens of microseconds each time."""


class RequestNeed:
    """Small pages per group of one request of ``tokens`` tokens, prompt and answer, at its peak.

    Its prompt may come in chunks of one small page, so a window group needs its window and one
    small page more; without chunks it needs the whole prompt at once. ``states``: those that a
    request begins with, its own and the ones it is tracked in.
    """

    def __init__(self, plan: PoolPlan, states: int = 1) -> None:
        self._plan = plan
        self._states = states

    def pages(self, tokens: int, *, at_once: int = 0, encoder: int = 0) -> list[int]:
        """``at_once``: tokens of a prompt that is not cut in chunks. ``encoder``: of the tokens,
        the first, which are its encoder's; fewer than it has if there are fewer ``tokens``."""
        load = Load(tokens, self._states, at_once, min(encoder, tokens))
        return [
            item.group.held(load) + item.group.kind.gaps(load, item.smalls_per_large)
            for item in self._plan.groups
        ]

    def fits(self, tokens: int, *, at_once: int = 0, encoder: int = 0) -> bool:
        """Whether an empty pool holds the request."""
        plan, need = self._plan, self.pages(tokens, at_once=at_once, encoder=encoder)
        need[plan.null_group] += plan.null_smalls  # of their large pages no more is lost
        larges = (
            -(-smalls // item.smalls_per_large)
            for item, smalls in zip(plan.groups, need, strict=True)
        )
        return sum(larges) <= plan.num_large

    def longest(self, most: int, *, at_once: int = 0, encoder: int = 0) -> int:
        """Tokens of the longest request that fits, at most ``most``; 0 if none does."""
        return most_that_fits(
            most, lambda tokens: self.fits(tokens, at_once=at_once, encoder=encoder)
        )

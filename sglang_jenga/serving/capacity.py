"""How much there is and what it takes: the pool's small pages in SGLang's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.plan.planner import most_that_fits
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.serving.groups import ServedGroups


class Capacity:
    """Answers for all groups at once, from counters that the allocator keeps: nothing is walked.

    ``states_per_request``: states that a new request takes, its own and those it is tracked in.
    """

    states_per_request = 0

    def __init__(self, core: Allocator, groups: ServedGroups, page_size: int) -> None:
        self._core, self._groups, self._page_size = core, groups, page_size

    # ---- one request ------------------------------------------------------------------------

    @cached_property
    def request_need(self) -> RequestNeed:
        return RequestNeed(self._core.plan, self.states_per_request)

    def need_of_rest(self, held: int, tokens: int, *, encoder: int = 0) -> list[int]:
        """Small pages per group that a request of ``tokens`` tokens, the first of them its
        ``encoder``'s, takes beyond those that it holds, or has locked, for the first ``held`` of
        them, a whole number of pages."""
        pages = self.request_need.pages(tokens, encoder=encoder)
        alive = [
            kind.alive_pages(self._groups.length_in(kind, held, encoder), self._page_size)
            for kind in self._groups.kinds
        ]
        return [max(0, count - own) for count, own in zip(pages, alive, strict=True)]

    def most_new_tokens(
        self, input_tokens: int, most: int, *, chunked: bool, encoder: int = 0
    ) -> int | None:
        """Tokens of the longest answer, at most ``most``, with which a request fits an empty pool;
        None if its prompt does not fit. A prompt that is not ``chunked`` is held at once; its first
        tokens are its ``encoder``'s."""
        at_once = 0 if chunked else input_tokens
        longest = self.request_need.longest(input_tokens + most, at_once=at_once, encoder=encoder)
        return None if longest < input_tokens else longest - input_tokens

    # ---- now --------------------------------------------------------------------------------

    def available(self) -> int:
        """Tokens that every group at once could take now, without evicting; of text, where an
        encoder has tokens of its own."""
        groups, size = self._groups, self._page_size
        most = min(self._core.obtainable(group) for group in (groups.row, *groups.mapped))
        if groups.mapped:
            most = most_that_fits(
                most, lambda pages: self._core.fits_now(groups.need(pages * size))
            )
        return most * size

    def group_available(self, group_id: int) -> int:
        """Tokens one group alone could take, the cached pages of other groups given up for it.

        Its own cached pages are not in it: SGLang counts them as evictable beside this number.
        """
        large = self._core.large
        larges = large.num_empty + large.num_reclaimable - large.reclaimable[group_id]
        smalls = large.free[group_id] + larges * self._core.plan.groups[group_id].smalls_per_large
        return smalls * self._page_size

    def group_allocated(self, group_id: int) -> int:
        """Tokens' worth of small pages handed out to requests or held by the cache."""
        core = self._core
        return (core.num_used[group_id] + core.num_cached[group_id]) * self._page_size

    # ---- once everything cached is evicted ---------------------------------------------------
    # Negative states are those that running requests are about to give up. They free large pages
    # only where one state fills one.

    def fits(self, need: Sequence[int], *, beside_shielded: bool = False) -> bool:
        """Whether ``need`` small pages per group fit, or fit ``beside_shielded`` windows."""
        return self._core.fits_after_evicting(
            need, beside_shielded=beside_shielded, larges_coming=self._given_up(need)
        )

    def tokens_beside(self, states: int, encoder: int = 0) -> int:
        """Tokens that fit together with ``states`` more states, or with those of an ``encoder``; -1
        if those alone do not."""
        need = self._groups.need(0, states=states, encoder=encoder)
        pages = self._core.most_after_evicting(
            self._groups.row, need, larges_coming=self._given_up(need)
        )
        return -1 if pages < 0 else pages * self._page_size

    def _given_up(self, need: Sequence[int]) -> int:
        """Large pages that states about to be given up leave empty."""
        state = self._groups.state
        if state is None or self._core.plan.groups[state].smalls_per_large > 1:
            return 0
        return max(0, -need[state])

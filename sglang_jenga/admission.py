"""Admission: what a round of prefills may promise, asked of the allocator for all groups together.

Where a prompt's next chunk does not fit it is parked, and then nobody else is admitted in that
round. Not only for fairness: SGLang counts a chunk in flight for the parked request as soon as a
batch is made, and would later drop the first token of its answer.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SharedSWAPrefillBudget


class _Round:
    """Common to all models: what has been promised and put off in one round of admission.

    A model with states gives every new request ``states_per_request`` of them beside its tokens,
    out of the same bytes; a prompt whose next chunk is asked for has its own already. States that
    running requests are tracked in are as good as cached ones: they are given up for new requests.

    Where SGLang does not track states inside a prompt, a request that parts from cached ones behind
    the last cached state is cut there: the chunk's end leaves a state at the branch point, which
    the next ones hit. SGLang runs one cut prompt at a time, so nobody is admitted after it.
    """

    _parked = False  # a chunk had to wait
    _cut_again = False  # a prompt in flight does not end in this round
    _cut_at_branch = False  # a new one is cut where it parts from others
    _states_promised = 0
    _to_give_up: int | None = None

    @property
    def states_wanted(self) -> int:
        """States promised in this round and those of one more request, beyond those that decoding
        requests can go on without; below zero if these are more."""
        if self._to_give_up is None:  # nothing changes them during a round
            self._to_give_up = self.allocator.states_to_give_up()
        return self._states_promised + self.allocator.states_per_request - self._to_give_up

    def fit_chunk(self, *, extend_input_len: int, **demand: Any) -> int | None:
        self._states_promised -= self.allocator.states_per_request
        try:
            limit = self._fit_chunk(extend_input_len=extend_input_len, **demand)
        finally:
            self._states_promised += self.allocator.states_per_request
        self._parked = limit is None
        self._cut_again = limit is None or limit < extend_input_len
        return limit

    def check_prefill(
        self, *, extend_input_len: int, chunk_limit: int | None, **demand: Any
    ) -> tuple[bool, int | None]:
        if self._parked:
            return False, None
        fits, limit = super().check_prefill(
            extend_input_len=extend_input_len, chunk_limit=chunk_limit, **demand
        )
        if not fits or limit is None:
            return fits, limit
        if self._cut_at_branch or self._cut_twice(extend_input_len, limit):
            return True, 0  # not now, though there is room
        # SGLang has matched this very request just before.
        branch = self.tree_cache.tokens_to_branch
        if not self._cut_again and 0 < branch < min(limit, extend_input_len):
            self._cut_at_branch = True
            return True, branch
        return True, limit

    def can_allocate_prefill(self, **demand: Any) -> bool:
        if self._parked or self._cut_twice(demand["extend_input_len"], demand["chunk_limit"]):
            return False
        return super().can_allocate_prefill(**demand)

    def _cut_twice(self, extend_input_len: int, chunk_limit: int | None) -> bool:
        """SGLang runs one cut prompt at a time, and takes it that a chunk uses up the round's
        tokens. Whole small pages may not, where decode steps have taken some of them."""
        return self._cut_again and chunk_limit is not None and chunk_limit < extend_input_len

    def reserve(self, *args: Any, is_chunked_continuation: bool = False, **kwargs: Any) -> None:
        super().reserve(*args, is_chunked_continuation=is_chunked_continuation, **kwargs)
        if not is_chunked_continuation:
            self._states_promised += self.allocator.states_per_request


class JengaDenseBudget(_Round, PrefillBudget):
    """Models with one attention group. SGLang's budget lets a prompt's next chunk run in any case
    and dies if decoding has taken the room meanwhile; here it is cut or parked."""

    def available_chunk_tokens(self, chunk_limit: int) -> int:
        """Whole small pages: a chunk that ends inside one leaves a state that no prefix names."""
        available = super().available_chunk_tokens(chunk_limit)
        return min(chunk_limit, max(self.page_size, available - available % self.page_size))

    def _fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        room = int(self.remaining_current) - self.page_size
        if min(extend_input_len, chunk_limit) <= room:
            return chunk_limit
        room -= room % self.page_size
        return room if room > 0 else None


class JengaStateBudget(JengaDenseBudget):
    """Models with full attention and states, which compete for the same large pages."""

    @property
    def remaining_total(self) -> int:
        return self.allocator.tokens_beside(self.states_wanted) - self.total_offset

    @property
    def remaining_current(self) -> int:
        return self.allocator.tokens_beside(self.states_wanted) - self.current_offset


class JengaSWABudget(_Round, SharedSWAPrefillBudget):
    """Models with full and window layers, and perhaps states, which compete for the same large
    pages."""

    _slid = False

    def _fit_chunk(self, **demand: Any) -> int | None:
        return SharedSWAPrefillBudget.fit_chunk(self, **demand)

    def _fits(self, full_tokens: float, swa_tokens: float, *, empty_pool: bool = False) -> bool:
        allocator, core = self.allocator, self.allocator.core
        if empty_pool:
            states = allocator.states_per_request
            return core.fits_empty_pool(allocator.need(full_tokens, swa_tokens, states=states))
        need = allocator.need(
            full_tokens + self.total_offset,
            swa_tokens + self.swa_offset,
            states=max(0, self.states_wanted),
        )
        if core.fits_after_evicting(need):
            return True
        if self._slid:
            return False
        self._slid = True  # once per admission round is enough
        self.tree_cache.slide(allocator.decoding, exactly=True)
        return core.fits_after_evicting(need)

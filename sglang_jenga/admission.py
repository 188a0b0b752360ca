"""Admission: what a round of prefills may promise, asked of the allocator for all groups together.

Where a prompt's next chunk does not fit it is parked, and then nobody else is admitted in that
round. Not only for fairness: SGLang counts a chunk in flight for the parked request as soon as a
batch is made, and would later drop the first token of its answer.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SharedSWAPrefillBudget


class _Parking:
    """Remembers in one round of admission that a chunk had to wait."""

    _parked = False

    def fit_chunk(self, **demand: Any) -> int | None:
        limit = self._fit_chunk(**demand)
        self._parked = limit is None
        return limit

    def check_prefill(self, **demand: Any) -> tuple[bool, int | None]:
        return (False, None) if self._parked else super().check_prefill(**demand)

    def can_allocate_prefill(self, **demand: Any) -> bool:
        return not self._parked and super().can_allocate_prefill(**demand)


class JengaDenseBudget(_Parking, PrefillBudget):
    """Models with one attention group. SGLang's budget lets a prompt's next chunk run in any case
    and dies if decoding has taken the room meanwhile; here it is cut or parked."""

    def _fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        room = int(self.remaining_current) - self.page_size
        if min(extend_input_len, chunk_limit) <= room:
            return chunk_limit
        room -= room % self.page_size
        return room if room > 0 else None


class JengaStateBudget(JengaDenseBudget):
    """Models with states: a new request takes one beside its tokens, out of the same bytes.

    A request whose prompt parts from cached ones behind the last cached state is cut there: the
    chunk's end leaves a state at the branch point, which the next ones hit. SGLang runs one cut
    prompt at a time, so nobody else is admitted after it in that round.
    """

    _states = 0  # promised in this round
    _has_cut = False  # a prompt in flight is cut again
    _branch_cut = False  # a new one is cut at its branch point

    def fit_chunk(self, *, extend_input_len: int, **demand: Any) -> int | None:
        limit = super().fit_chunk(extend_input_len=extend_input_len, **demand)
        self._has_cut = limit is None or limit < extend_input_len
        return limit

    def check_prefill(
        self, *, extend_input_len: int, chunk_limit: int | None, **demand: Any
    ) -> tuple[bool, int | None]:
        fits, limit = super().check_prefill(
            extend_input_len=extend_input_len, chunk_limit=chunk_limit, **demand
        )
        if not fits or limit is None:
            return fits, limit
        if self._branch_cut:
            return True, 0  # not now, though there is room
        # SGLang has matched this very request just before.
        branch = self.tree_cache.tokens_to_branch
        if not self._has_cut and 0 < branch < min(limit, extend_input_len):
            self._branch_cut = True
            return True, branch
        return True, limit

    @property
    def remaining_total(self) -> int:
        return self.allocator.tokens_beside(self._states + 1) - self.total_offset

    @property
    def remaining_current(self) -> int:
        return self.allocator.tokens_beside(self._states + 1) - self.current_offset

    def _fit_chunk(self, **demand: Any) -> int | None:
        # The prompt's next chunk: it has its state.
        self._states -= 1
        try:
            return super()._fit_chunk(**demand)
        finally:
            self._states += 1

    def reserve(self, *args: Any, is_chunked_continuation: bool = False, **kwargs: Any) -> None:
        super().reserve(*args, is_chunked_continuation=is_chunked_continuation, **kwargs)
        self._states += not is_chunked_continuation


class JengaSWABudget(_Parking, SharedSWAPrefillBudget):
    """Models with full and window layers, which compete for the same large pages."""

    _slid = False

    def _fit_chunk(self, **demand: Any) -> int | None:
        return SharedSWAPrefillBudget.fit_chunk(self, **demand)

    def _fits(self, full_tokens: float, swa_tokens: float, *, empty_pool: bool = False) -> bool:
        core = self.allocator.core
        if empty_pool:
            return core.fits_empty_pool(self.allocator.need(full_tokens, swa_tokens))
        need = self.allocator.need(full_tokens + self.total_offset, swa_tokens + self.swa_offset)
        if core.fits_after_evicting(need):
            return True
        if self._slid:
            return False
        self._slid = True  # once per admission round is enough
        self.tree_cache.slide(self.allocator.decoding, exactly=True)
        return core.fits_after_evicting(need)

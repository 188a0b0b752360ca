"""Admission: what a round of prefills may promise, asked of the allocator for all groups together.

Three rules beyond SGLang's own:

* A request that has the server to itself is admitted if it fits an empty pool (`RequestNeed`). If
  its own cached prefix stands in its way, it goes without the hit in the next round.
* Beside running requests, windows that decide about hits on pages in use (`Ageing`) are not counted
  as free. Nobody is torn down for them either: a prompt in flight and a decode step may have them.
* Where a prompt's next chunk does not fit it is parked, and then nobody else is admitted in that
  round. Not only for fairness: SGLang counts a chunk in flight for the parked request as soon as a
  batch is made, and would later drop the first token of its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SharedSWAPrefillBudget

from sglang_jenga.plan.planner import most_that_fits


class _Round:
    """Common to all models: what has been promised and put off in one round of admission.

    A model with states gives every new request ``states_per_request`` of them beside its tokens,
    out of the same bytes; a prompt whose next chunk is asked for has its own already. States that
    running requests are tracked in are as good as cached ones: they are given up for new requests.

    Where SGLang does not track states inside a prompt, a request that parts from cached ones behind
    the last cached state is cut there: the chunk's end leaves a state at the branch point, which
    the next ones hit. SGLang runs one cut prompt at a time, so nobody is admitted after it.
    """

    adder: Any = None  # SGLang's PrefillAdder of this round
    req: Any = None  # whom it asks for
    _parked = False  # a chunk had to wait
    _cut = False  # a prompt does not end in this round
    _cut_at_branch = False  # a new one is cut where it parts from others
    _states_promised = 0

    @property
    def _running(self) -> Sequence[Any]:
        batch = self.adder.running_batch
        return () if batch is None else batch.reqs

    @property
    def _alone(self) -> bool:
        """Whether the request asked for would have the server to itself."""
        return not self._running and not self.adder.can_run_list

    @cached_property
    def _states_to_give_up(self) -> int:
        return self.allocator.pressure.releasable_states()  # nothing changes them during a round

    @property
    def states_wanted(self) -> int:
        """States promised in this round and those of one more request, beyond those that decoding
        requests can go on without; below zero if these are more."""
        promised = self._states_promised + self.allocator.states_per_request
        return promised - self._states_to_give_up

    # ---- what SGLang asks -------------------------------------------------------------------

    def fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        """Tokens that the next chunk of the prompt in flight may have, None to park it."""
        wanted = min(extend_input_len, chunk_limit)
        limit: int | None = None
        for exactly in (False, True):
            if self.tree_cache.windows is not None:
                self.tree_cache.windows.slide_prompt(self.req, exactly=exactly)
            limit = self._next_chunk(extend_input_len, max_new_tokens, chunk_limit)
            if limit is not None and limit > wanted - self._window_large:
                break
            if self.tree_cache.windows is None:
                break  # nothing more to give back: the same answer again
        self._parked = limit is None
        self._cut = limit is None or limit < extend_input_len
        return limit

    def _next_chunk(self, extend: int, new: int, limit: int) -> int | None:
        if self._alone:
            return self._lone_chunk(extend, new, limit)
        self._states_promised -= self.allocator.states_per_request  # it has its own
        try:
            return self._fit_chunk(extend, new, limit)
        finally:
            self._states_promised += self.allocator.states_per_request

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
        **demand: Any,
    ) -> tuple[bool, int | None]:
        if self._parked:
            return False, None
        if self._alone:
            limit = self._lone_chunk(extend_input_len, max_new_tokens, chunk_limit)
            if limit is None:
                self.tree_cache.forgo_hit(self.req)
                return False, None
            fits = True
            if limit >= extend_input_len:
                limit = chunk_limit
        else:
            fits, limit = super().check_prefill(
                extend_input_len=extend_input_len,
                max_new_tokens=max_new_tokens,
                chunk_limit=chunk_limit,
                **demand,
            )
        if not fits or limit is None:
            return fits, limit
        if self._cut_at_branch or self._cut_twice(extend_input_len, limit):
            return True, 0  # not now, though there is room
        # SGLang has matched this very request just before.
        branch = self.tree_cache.tokens_to_branch
        if not self._cut and 0 < branch < min(limit, extend_input_len):
            self._cut_at_branch = True
            return True, branch
        self._cut = self._cut or limit < extend_input_len
        return True, limit

    def can_allocate_prefill(
        self,
        *,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
        **demand: Any,
    ) -> bool:
        """Asked where nothing is cached and answers have known lengths."""
        if self._parked or self._cut_twice(extend_input_len, chunk_limit):
            return False
        if not self._alone:
            return super().can_allocate_prefill(
                extend_input_len=extend_input_len,
                max_new_tokens=max_new_tokens,
                chunk_limit=chunk_limit,
                **demand,
            )
        limit = self._lone_chunk(extend_input_len, max_new_tokens, chunk_limit)
        if limit is not None and limit < extend_input_len:
            self.adder.rem_chunk_tokens = limit  # SGLang takes all of it for the first chunk
            self._cut = True
        return limit is not None

    def _cut_twice(self, extend_input_len: int, chunk_limit: int | None) -> bool:
        """SGLang runs one cut prompt at a time, and takes it that a chunk uses up the round's
        tokens. Whole small pages may not, where decode steps have taken some of them."""
        return self._cut and chunk_limit is not None and chunk_limit < extend_input_len

    def reserve(self, *args: Any, is_chunked_continuation: bool = False, **kwargs: Any) -> None:
        super().reserve(*args, is_chunked_continuation=is_chunked_continuation, **kwargs)
        if not is_chunked_continuation:
            self._states_promised += self.allocator.states_per_request

    # ---- a request that is alone ------------------------------------------------------------

    def _lone_chunk(self, extend: int, new: int, limit: int | None) -> int | None:
        """Tokens that its next chunk may have: ``extend`` at most if ``limit`` allows as much,
        whole pages otherwise; None if it does not fit now."""
        core, page_size = self.allocator.core, self.page_size
        prefix = self.req.prefix_len
        rest = self.allocator.need_of_rest(prefix, prefix + extend + new)
        groups = self.allocator.groups
        if self.req.kv.holds_kv and groups.state is not None:
            rest[groups.state] = 0  # it has its states

        def fits(chunk: int) -> bool:
            pages = -(-chunk // page_size)
            # Every token group has to hold the chunk, the last one while the window is read too.
            need = list(rest)
            for group_id in groups.of_tokens:
                need[group_id] = max(pages, need[group_id])
            return core.fits_after_evicting(need)

        chunk = extend if limit is None else min(extend, limit)
        if not fits(chunk):
            most = 0 if limit is None else (chunk - 1) // page_size
            chunk = most_that_fits(most, lambda pages: fits(pages * page_size)) * page_size
        if chunk < extend:
            chunk -= chunk % page_size
            if chunk > self._window_large:
                chunk -= chunk % self._window_large
        return chunk or None

    @cached_property
    def _window_large(self) -> int:
        """Tokens in a large page of windows; 1 without windows. A lone request takes such large
        pages whole and leaves them behind one after the other, so that there are no gaps."""
        plans = [self.allocator.core.plan.groups[group] for group in self.allocator.groups.mapped]
        sizes = (plan.smalls_per_large * plan.group.tokens_per_page for plan in plans)
        return max(sizes, default=1)


class JengaDenseBudget(_Round, PrefillBudget):
    """Models with one attention group. SGLang's budget lets a prompt's next chunk run in any case
    and dies if decoding has taken the room meanwhile; here it is cut or parked."""

    @property
    def remaining_current(self) -> int:
        # Where nothing is cached, SGLang forecasts how requests of known lengths end. It counts a
        # page too many and keeps a token free, which a request that is alone can do without.
        spare = 2 * self.page_size + 2 if self._alone else 0
        return self._tokens_left + spare - self.current_offset

    @property
    def _tokens_left(self) -> int:
        """Tokens that could be had if everything cached went for them."""
        return self._available_and_evictable()

    def available_chunk_tokens(self, chunk_limit: int) -> int:
        """Whole small pages: a chunk that ends inside one leaves a state that no prefix names."""
        available = super().available_chunk_tokens(chunk_limit)
        return min(chunk_limit, max(self.page_size, available - available % self.page_size))

    def _fit_chunk(self, extend: int, new: int, limit: int) -> int | None:
        room = int(self.remaining_current) - self.page_size
        if min(extend, limit) <= room:
            return limit
        room -= room % self.page_size
        return room if room > 0 else None


class JengaStateBudget(JengaDenseBudget):
    """Models with full attention and states, which compete for the same large pages."""

    @property
    def remaining_total(self) -> int:
        return self._tokens_left - self.total_offset

    @property
    def _tokens_left(self) -> int:
        return self.allocator.tokens_beside(self.states_wanted)


class JengaSWABudget(_Round, SharedSWAPrefillBudget):
    """Models with full and window layers, and perhaps states, which compete for the same large
    pages."""

    _slid = False  # once per round is enough
    _in_flight = False  # the prompt asked for holds memory already

    @cached_property
    def _window_growth(self) -> list[float]:
        """Window tokens, per window group, that running requests will come to hold by decoding on.

        SGLang reserves full tokens for that, window tokens not: in its own fixed window pool they
        are worth little. Here they are most of the bytes.
        """
        return self.tree_cache.windows.growth(
            self._running, self.adder._get_running_request_total_token_offset
        )

    def _fit_chunk(self, extend: int, new: int, limit: int) -> int | None:
        self._in_flight = True
        try:
            return SharedSWAPrefillBudget.fit_chunk(
                self, extend_input_len=extend, max_new_tokens=new, chunk_limit=limit
            )
        finally:
            self._in_flight = False

    def _fits(self, full_tokens: float, swa_tokens: float, *, empty_pool: bool = False) -> bool:
        allocator, core = self.allocator, self.allocator.core
        need = allocator.groups.need
        if empty_pool:
            states = allocator.states_per_request
            return core.fits_empty_pool(need(full_tokens, swa_tokens, states))
        states = max(0, self.states_wanted)
        full_tokens += self.total_offset
        swa_tokens += self.swa_offset

        def fits(growth: Sequence[float]) -> bool:
            smalls = need(full_tokens, [swa_tokens + more for more in growth], states)
            return core.fits_after_evicting(
                smalls, beside_shielded=not self._in_flight and not self._alone
            )

        # Most rounds of a full server end here, without asking every running request.
        if fits([0] * len(allocator.groups.mapped)) and fits(self._window_growth):
            return True
        if self._slid:
            return False
        self._slid = True
        self.tree_cache.windows.slide(allocator.pressure.decoding, exactly=False)
        return fits(self._window_growth)

"""Admission: what a round of prefills may promise, asked of the allocator for all groups together.

Four rules beyond SGLang's own:

* A request that has the server to itself is admitted if it fits an empty pool (`RequestNeed`). If
  its own cached prefix stands in its way, it goes without the hit in the next round.
* Beside running requests, windows that decide about hits on pages in use (`Ageing`) are not counted
  as free. Nobody is torn down for them either: a prompt in flight and a decode step may have them.
* While prompts keep the GPU busy, a request that computes more than it hits evicts nothing, if the
  longest cached prefix goes first (`Newcomers`).
* Where a prompt's next chunk does not fit it is parked, and then nobody else is admitted in that
  round. Not only for fairness: SGLang counts a chunk in flight for the parked request as soon as a
  batch is made, and would later drop the first token of its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SharedSWAPrefillBudget

from sglang_jenga.serving.encoders import missing_encoder
from sglang_jenga.serving.lone_request import LoneRequest


class JengaBudget(SharedSWAPrefillBudget):
    """What has been promised and put off in one round of admission.

    * Tokens of every group are promised together: all groups compete for the same large pages.
    * A new request is promised its states as well, its own and those it is tracked in. A prompt in
      flight has its own already. States that running requests are tracked in count as free: they
      are given up for new requests.
    * A new request is promised its encoder's tokens once, from cross attention's small pages; its
      text, and all that it decodes, takes full attention's.
    * Where SGLang does not track states inside a prompt, a request that parts from cached ones
      behind the last cached state is cut there: the chunk's end leaves a state at the branch
      point, which the next ones hit. SGLang runs one cut prompt at a time, so nobody is admitted
      after it.

    With mapped groups the round asks as SGLang does of a shared pool, and without as SGLang does
    of a pool of one kind; there the two differ in whom they set memory aside for.
    """

    adder: Any = None  # SGLang's PrefillAdder of this round
    req: Any = None  # whom it asks for
    _parked = False  # a chunk had to wait
    _cut = False  # a prompt does not end in this round
    _cut_at_branch = False  # a new one is cut where it parts from others
    _in_flight = False  # the prompt asked for holds memory already
    _slid = False  # windows have been slid; once per round is enough
    _states_promised = 0
    _to_give_up: tuple[int, int] | None = None  # states of tracking, with so many preempted
    _encoder_promised = 0  # tokens of encoders, of those admitted in this round
    _reserved: Any = None  # whom the last promise was made to

    def __init__(self, allocator: Any, tree_cache: Any, **kwargs: Any) -> None:
        super().__init__(allocator, tree_cache, **kwargs)
        self._groups = allocator.groups
        self._capacity = allocator.capacity
        self._lone = LoneRequest(allocator)

    @property
    def _running(self) -> Sequence[Any]:
        batch, beside = self.adder.running_batch, self.allocator.pressure.beside
        running = () if batch is None else batch.reqs
        return [*running, *beside] if beside else running

    @property
    def _alone(self) -> bool:
        """Whether the request asked for would have the server to itself."""
        others = self._running or self.adder.can_run_list or self.allocator.sending
        return not others

    # ---- what is left -----------------------------------------------------------------------

    @property
    def _states_to_give_up(self) -> int:
        # Nothing changes them during a round but who is preempted.
        preempted = len(self.adder.preempt_list)
        if self._to_give_up is None or self._to_give_up[0] != preempted:
            self._to_give_up = preempted, self.allocator.pressure.releasable_states()
        return self._to_give_up[1]

    @property
    def states_wanted(self) -> int:
        """States promised in this round and those of one more request, beyond those that decoding
        requests can go on without; below zero if these are more."""
        promised = self._states_promised + self._states_of_one
        return promised - self._states_to_give_up

    @property
    def _states_of_one(self) -> int:
        """States that the request which is asked for takes; before any is, the most of all."""
        if self.req is None or self._groups.state is None:
            return self._capacity.states_per_request
        states: int = self.tree_cache.req_to_token_pool.states_of(self.req)
        return states

    @property
    def _tokens_left(self) -> int:
        """Tokens that could be had if everything cached went for them, those of encoders among
        them."""
        encoder = self._encoder_tokens
        return self._capacity.tokens_beside(self.states_wanted, encoder) + encoder

    @property
    def _encoder_tokens(self) -> int:
        """Of the tokens that SGLang counts as promised and as asked for, those of encoders."""
        if self._groups.encoder is None:
            return 0
        asked = 0 if self.req is self._reserved else missing_encoder(self.req)
        return self._encoder_promised + asked

    @property
    def remaining_total(self) -> int:
        return self._tokens_left - self.total_offset

    @property
    def remaining_current(self) -> int:
        # Where nothing is cached, SGLang forecasts how requests of known lengths end. It counts a
        # page too many and keeps a token free, which a request that is alone can do without.
        spare = 2 * self.page_size + 2 if self._alone else 0
        return self._tokens_left + spare - self.current_offset

    @cached_property
    def _window_growth(self) -> list[float]:
        """Window tokens, per mapped group, that running requests will come to hold by decoding on.

        SGLang reserves full tokens for that, window tokens not: in its own fixed window pool they
        are worth little. Here they are most of the bytes.
        """
        return self.tree_cache.windows.growth(
            self._running, self.adder._get_running_request_total_token_offset
        )

    def _fits(self, full_tokens: float, swa_tokens: float, *, empty_pool: bool = False) -> bool:
        """Whether so many tokens, and states of one more request, fit beside what is promised."""
        need, mapped = self._groups.need, self._groups.mapped
        if empty_pool:
            return True  # intake has refused whoever does not fit an empty pool
        full_tokens += self.total_offset
        swa_tokens += self.swa_offset
        states, encoder = self.states_wanted, self._encoder_tokens
        full_tokens -= encoder

        new = not self._in_flight and not self._alone

        def fits(growth: Sequence[float]) -> bool:
            smalls = need(full_tokens, [swa_tokens + more for more in growth], states, encoder)
            if not self._capacity.fits(smalls, beside_shielded=new):
                return False
            return not (new and self._evicts_nothing) or self.allocator.core.fits_now(smalls)

        if not mapped:
            return fits(())
        # Most rounds of a full server end here, without asking every running request.
        if fits([0] * len(mapped)) and fits(self._window_growth):
            return True
        if self._slid:
            return False
        self._slid = True
        self.tree_cache.windows.slide(self.allocator.pressure.decoding, exactly=False)
        return fits(self._window_growth)

    @property
    def _evicts_nothing(self) -> bool:
        """Whether the request asked for is to take free memory alone."""
        if self.req is None or self.req is self._reserved:
            return False  # SGLang asks whether anybody more could get in
        return self.allocator.newcomers.waits(*self._hit_and_missed)

    @property
    def _hit_and_missed(self) -> tuple[int, int]:
        """Tokens of its prompt that the request asked for hits, and that it has to compute."""
        hit = self.req.prefix_len
        return hit, len(self.req.full_untruncated_fill_ids) - hit

    # ---- the prompt in flight ---------------------------------------------------------------

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        if self._groups.mapped:
            return super().available_chunk_tokens(chunk_limit)
        available = PrefillBudget.available_chunk_tokens(self, chunk_limit)
        # Whole small pages: a chunk that ends inside one leaves a state that no prefix names.
        return min(chunk_limit, max(self.page_size, available - available % self.page_size))

    def fit_chunk(
        self, *, extend_input_len: int, max_new_tokens: int, chunk_limit: int
    ) -> int | None:
        """Tokens that the next chunk of the prompt in flight may have, None to park it."""
        windows = self.tree_cache.windows
        enough = min(extend_input_len, chunk_limit) - self._lone.window_large
        limit: int | None = None
        for exactly in (False, True):
            if windows is not None:
                windows.slide_prompt(self.req, exactly=exactly)
            limit = self._next_chunk(extend_input_len, max_new_tokens, chunk_limit)
            if windows is None or (limit is not None and limit > enough):
                break
        self._parked = limit is None
        self._cut = limit is None or limit < extend_input_len
        return limit

    def _next_chunk(self, extend: int, new: int, limit: int) -> int | None:
        if self._alone:
            return self._lone.chunk(self.req, extend, new, limit)
        self._states_promised -= self._states_of_one  # it has its own
        self._in_flight = True
        try:
            if self._groups.mapped:
                return super().fit_chunk(
                    extend_input_len=extend, max_new_tokens=new, chunk_limit=limit
                )
            return self._chunk_in_what_is_left(extend, limit)
        finally:
            self._states_promised += self._states_of_one
            self._in_flight = False

    def _chunk_in_what_is_left(self, extend: int, limit: int) -> int | None:
        """Of a pool of one kind of slots SGLang sets nothing aside for running requests here, and
        dies if decoding has taken the room meanwhile; ours cuts the chunk or parks it."""
        room = int(self.remaining_current) - self.page_size
        if min(extend, limit) <= room:
            return limit
        room -= room % self.page_size
        return room if room > 0 else None

    # ---- a new request ----------------------------------------------------------------------

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
            limit = self._lone.chunk(self.req, extend_input_len, max_new_tokens, chunk_limit)
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
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        """Asked where nothing is cached and answers have known lengths."""
        if self._parked or self._cut_twice(extend_input_len, chunk_limit):
            return False
        if not self._alone:
            # Of a pool of one kind of slots SGLang forecasts next how running requests end.
            sglangs = SharedSWAPrefillBudget if self._groups.mapped else PrefillBudget
            return sglangs.can_allocate_prefill(
                self,
                paged_input=paged_input,
                extend_input_len=extend_input_len,
                max_new_tokens=max_new_tokens,
                chunk_limit=chunk_limit,
            )
        limit = self._lone.chunk(self.req, extend_input_len, max_new_tokens, chunk_limit)
        if limit is not None and limit < extend_input_len:
            self.adder.rem_chunk_tokens = limit  # SGLang takes all of it for the first chunk
            self._cut = True
        return limit is not None

    def _cut_twice(self, extend_input_len: int, chunk_limit: int | None) -> bool:
        """SGLang runs one cut prompt at a time, and takes it that a chunk uses up the round's
        tokens. Whole small pages may not, where decode steps have taken some of them."""
        return self._cut and chunk_limit is not None and chunk_limit < extend_input_len

    def reserve(
        self,
        extend_input_len: int,
        *args: Any,
        is_chunked_continuation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().reserve(
            extend_input_len, *args, is_chunked_continuation=is_chunked_continuation, **kwargs
        )
        newcomers = self.allocator.newcomers
        newcomers.note_tokens(extend_input_len)
        self._encoder_promised, self._reserved = self._encoder_tokens, self.req
        if not is_chunked_continuation:
            newcomers.note_admitted(*self._hit_and_missed)
            self._states_promised += self._states_of_one

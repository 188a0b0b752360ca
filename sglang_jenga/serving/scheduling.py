"""Where SGLang's scheduler asks for memory and gives it back: our part of its rounds and steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import numpy as np
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_policy import WAITING_QUEUE_PREFIX_MATCH_MAX, CacheAwarePolicy
from sglang.srt.runtime_context import get_disagg

from sglang_jenga.pages.tables import StepDemand
from sglang_jenga.serving import micro_batches
from sglang_jenga.serving.allocator import is_ours
from sglang_jenga.serving.encoders import encoder_length
from sglang_jenga.serving.host_arrays import host_array
from sglang_jenga.serving.rounds import PATIENCE, Rounds, Stuck

logger = logging.getLogger(__name__)

# ---- a round of admission -------------------------------------------------------------------


def next_prefill(
    original: Callable[..., Any], self: Any, prefill_delayer_single_pass: Any, running_batch: Any
) -> tuple[Any, Any]:
    """After a refusal nobody is asked for before a request has left the batch, or the queue is
    another one. SGLang does so where ``batch_is_full``, but takes that back in every round where
    there are windows: in its pool they give tokens back as requests decode. Here those have been
    counted on already. Without windows it is taken back once, after a round that admitted somebody:
    what a prompt sets aside while it is computed has come back then. Nor is it left there where
    somebody waited for prompts in front of it (`Newcomers`), and need not any more."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return original(self, prefill_delayer_single_pass, running_batch)
    rounds = allocator.rounds
    if self.tree_cache.windows is not None:
        self.tree_cache.windows.begin_round()
    # Of a prompt in flight the chunk before is in another micro-batch, and is no neighbour of it.
    neighbours = [req for req in micro_batches.beside(self) if req is not self.chunked_req]
    allocator.pressure.beside = neighbours
    if self.disaggregation_mode is DisaggregationMode.PREFILL:
        allocator.sending = self.disagg_prefill_inflight_queue
    if allocator.groups.state is not None:
        _spare_states(self, rounds, running_batch)
    released = allocator.newcomers.begin_round(by_prefix=_goes_by_prefix(self))
    if not self.is_hybrid_swa:
        if rounds.again or released:
            running_batch.batch_is_full = False
    elif (
        rounds.is_refused(self.waiting_queue)
        and not released
        and running_batch.batch_is_full
        and not running_batch.is_empty()
        and not self.enable_priority_preemption
        and not self.grammar_manager.has_waiting_grammars()
        and self.chunked_req is None
        and prefill_delayer_single_pass is None
    ):
        rounds.pass_over()
        return None, running_batch
    batch, running_batch = original(self, prefill_delayer_single_pass, running_batch)
    rounds.note_admission(
        self.waiting_queue,
        refused=running_batch.batch_is_full,
        admitted=batch is not None,
        rows_left=self.req_to_token_pool.available_size() > 0,
    )
    return batch, running_batch


def _spare_states(scheduler: Any, rounds: Rounds, running_batch: Any) -> None:
    """Short prompts go without a state to leave while somebody waits for memory, or while all who
    could run would take more states than there are. Who waits for a row of requests does not."""
    rows = scheduler.req_to_token_pool
    running = len(running_batch.reqs) + len(scheduler.token_to_kv_pool_allocator.pressure.beside)
    asking = min(len(scheduler.waiting_queue) + running, rows.size)
    too_many = asking * rows.states_per_request > rows.mamba_allocator.size
    rows.tracking.sparing = too_many or rounds.want_memory


def _goes_by_prefix(scheduler: Any) -> bool:
    """Whether the longest cached prefix goes first. In another order a request that waits holds up
    others behind it that hit; a prefill server has no batch that decodes."""
    return (
        scheduler.policy.policy is CacheAwarePolicy.LPM
        and len(scheduler.waiting_queue) <= WAITING_QUEUE_PREFIX_MATCH_MAX  # else by arrival
        and not scheduler.enable_priority_scheduling
        and scheduler.disaggregation_mode is DisaggregationMode.NULL
    )


def begin_round(result: None, self: Any, *_: Any, **__: Any) -> None:
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return
    self.memory_budget.adder = self
    # SGLang sets nothing aside for what other micro-batches of a pipeline will decode.
    self.memory_budget.total_offset += sum(
        map(self._get_running_request_total_token_offset, allocator.pressure.beside)
    )


def ask_for_chunk(original: Callable[..., Any], self: Any, req: Any) -> Any:
    _ask(self, req)
    return original(self, req)


def ask_for_request(
    original: Callable[..., Any],
    self: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    _ask(self, req)
    return original(self, req, has_chunked_req, truncation_align_size)


def _ask(adder: Any, req: Any) -> None:
    adder.memory_budget.req = req
    if is_ours(adder.token_to_kv_pool_allocator):
        adder.token_to_kv_pool_allocator.rounds.asked = True


def note_round(plan: Any, self: Any, *_: Any, **__: Any) -> None:
    """A round of scheduling has its plan; those of prefill and decode servers too."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return
    if allocator.embeddings is not None and self.chunked_req is None:
        allocator.embeddings.note_no_prompt_in_flight()
    if allocator.rank_trace is not None:
        allocator.rank_trace.note_round(idle=_runs_nothing(plan))


def _runs_nothing(plan: Any) -> bool:
    """With DP attention a rank runs an idle batch while others run theirs."""
    batch = plan.batch_to_run
    return batch is None or batch.forward_mode.is_idle()


def next_batch(plan: Any, self: Any, *_: Any, **__: Any) -> None:
    """What to do if something waits, nothing runs, and nobody is admitted.

    A prompt in flight begins anew as soon as its last chunk has been computed. Otherwise this is
    the last resort against a server that waits for ever: no known load comes here; if one does, a
    request fails with a reason."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return
    note_round(plan, self)
    stuck = allocator.rounds.note_end(
        idle=_runs_nothing(plan)
        and plan.running_batch.is_empty()
        and not micro_batches.beside(self),
        waiting=bool(self.waiting_queue or self.chunked_req),
    )
    if stuck is Stuck.BEGIN_ANEW and self.chunked_req is not None:
        _begin_anew(self, self.chunked_req)
    elif stuck is Stuck.GIVE_UP:
        _give_up(self)


def _begin_anew(scheduler: Any, req: Any) -> None:
    from sglang.srt.managers.schedule_batch import release_req

    if not scheduler.tree_cache.begin_anew(req):
        return
    scheduler.chunked_req = None
    release_req(
        req=req,
        remaing_req_count=0,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
    )
    scheduler._add_request_to_queue(req, is_retracted=True)


def _give_up(scheduler: Any) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.managers.scheduler import _make_abort_req

    allocator = scheduler.token_to_kv_pool_allocator
    req = scheduler.chunked_req or scheduler.waiting_queue[0]
    wanted = len(req.origin_input_ids) + req.sampling_params.max_new_tokens
    message = (
        f"no memory for this request in {PATIENCE} rounds of scheduling with nothing else running: "
        f"{wanted} tokens wanted, {len(req.output_ids)} of them answered, "
        f"{allocator.debug_print()}"
    )
    logger.error("jenga gives request %s up: %s", req.rid, message)
    reason = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR)
    if scheduler.chunked_req is not None:
        req.discard_output_reason = reason
        scheduler._pending_chunked_abort_req = req
        return
    scheduler.waiting_queue.remove(req)
    scheduler._release_aborted_request(req)
    scheduler.send_abort_output(_make_abort_req(req, finished_reason=reason.to_json()), req)


# ---- a step ---------------------------------------------------------------------------------


def alloc_for_extend(original: Callable[..., Any], batch: Any) -> Any:
    allocator = batch.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return original(batch)
    starts = np.array(batch.prefix_lens, dtype=np.int64)
    ends = starts + np.array(batch.extend_lens, dtype=np.int64)
    fresh = [index for index, req in enumerate(batch.reqs) if not req.kv.holds_kv]
    if batch.tree_cache.supports_mamba():
        batch.tree_cache.states.before_extend(batch.reqs)
    step = StepDemand(
        batch.reqs,
        starts,
        ends,
        allocator.page_size,
        fresh=fresh,
        prefix_pages=batch.tree_cache.prefix_pages,
        borders=_borders(allocator, batch.reqs),
        totals=np.array([len(req.full_untruncated_fill_ids) for req in batch.reqs]),
    )
    with allocator.allocating(step):
        return original(batch)


def _borders(allocator: Any, reqs: Sequence[Any]) -> np.ndarray | None:
    """How many positions of each request are its encoder's; None where the model has none."""
    if allocator.groups.encoder is None:
        return None
    return np.array([encoder_length(req) for req in reqs], dtype=np.int64)


def alloc_for_decode(original: Callable[..., Any], batch: Any, token_per_req: int) -> Any:
    allocator = batch.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return original(batch, token_per_req)
    starts, rows = host_array(batch.seq_lens_cpu), host_array(batch.req_pool_indices_cpu)
    borders = None
    if allocator.groups.encoder is not None:  # SGLang counts the text alone here
        borders = allocator.tables.borders[rows]
        starts = starts + borders
    allocator.pressure.decoding = batch.reqs
    if batch.tree_cache.supports_mamba():
        batch.tree_cache.states.before_decode(batch.reqs)
    step = StepDemand(
        batch.reqs,
        starts,
        starts + token_per_req,
        allocator.page_size,
        rows=rows,
        borders=borders,
    )
    with allocator.allocating(step):
        return original(batch, token_per_req)


def take_second_slots(original: Callable[..., None], self: Any, mamba_track_interval: int) -> None:
    """SGLang looks at every request of a step for those that come to a track boundary, with a read
    of a tensor each; there are one or two."""
    if is_ours(self.token_to_kv_pool_allocator):
        lengths, takes = host_array(self.seq_lens_cpu), self.req_to_token_pool.tracking.takes_slot
        due = np.flatnonzero(lengths % mamba_track_interval == 0).tolist()
        at = [index for index in due if takes(self.reqs[index], int(lengths[index]))]
        self = SimpleNamespace(
            reqs=[self.reqs[index] for index in at],
            seq_lens_cpu=self.seq_lens_cpu[at],
            req_to_token_pool=self.req_to_token_pool,
        )
    original(self, mamba_track_interval)


def maybe_evict_swa(original: Callable[..., Any], self: Any) -> None:
    ours = is_ours(self.token_to_kv_pool_allocator) and self.forward_mode.is_decode()
    if not ours or self.tree_cache.windows is None or not self.tree_cache.windows.step():
        original(self)


# ---- a step that does not fit ---------------------------------------------------------------


def update_running_batch(original: Callable[..., Any], self: Any, batch: Any) -> Any:
    allocator = self.token_to_kv_pool_allocator
    if is_ours(allocator):
        allocator.pressure.prompt_in_flight = self.chunked_req
        allocator.pressure.beside = micro_batches.beside(self)
        if self.disaggregation_mode is DisaggregationMode.DECODE:
            # Requests whose pages another server is writing, and those that have not run yet.
            allocator.pressure.beside += [
                *(coming.req for coming in self.disagg_decode_transfer_queue.queue),
                *self.waiting_queue,
            ]
    return original(self, batch)


def retract_decode(original: Callable[[Any], tuple[Any, ...]], self: Any) -> tuple[Any, ...]:
    """SGLang aborts the last request that decodes if it does not fit alone. With a prompt in
    flight, another micro-batch, or prompts on their way from another server it is not alone: it
    waits for those, and goes on where it was. Else it begins anew, once. Unless it has been aborted
    before, which stands."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return original(self)
    reasons = {req: req.to_finish for req in self.reqs if req.to_finish is not None}
    with _all_kept(self):
        retracted, ratio, aborted = original(self)
    if self.reqs:
        return retracted, ratio, aborted
    alone = allocator.pressure.prompt_in_flight is None and not allocator.pressure.beside
    again = []
    for req in aborted:
        if req in reasons:
            req.to_finish = reasons[req]
        elif not alone or self.tree_cache.begin_anew(req):
            req.to_finish = None
            again.append(req)
        else:
            req.kv.retraction_backup = None
    return [*retracted, *again], ratio, [req for req in aborted if req not in again]


@contextmanager
def _all_kept(batch: Any) -> Iterator[None]:
    """A decode server cannot compute a prompt again: what SGLang takes from the last request it
    copies to the host as well, as what it takes from others."""
    if get_disagg().disaggregation_mode == "decode":

        def release_req(idx: int, remaining: int, offload_kv: bool = True) -> bool:
            kept: bool = type(batch).release_req(batch, idx, remaining)
            return kept

        batch.release_req = release_req
    try:
        yield
    finally:
        vars(batch).pop("release_req", None)


# ---- a request comes in -------------------------------------------------------------------------


def settle_answer(original: Callable[..., None], self: Any, req: Any) -> None:
    """SGLang asks how long an answer may be by the prompt's length alone; an encoder's tokens take
    other pages than text."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator):
        return original(self, req)
    allocator.asked_by = req
    try:
        return original(self, req)
    finally:
        allocator.asked_by = None


# ---- checks ---------------------------------------------------------------------------------


def check_page_invariants(original: Callable[[Any], None], self: Any) -> None:
    """SGLang looks for double frees in its own free lists. Here every page is recounted: the trees,
    and what each large page says that it holds; and no row may claim more than it has."""
    if not is_ours(self.token_to_kv_pool_allocator):
        return original(self)
    row_width = self.req_to_token_pool.req_to_token.shape[1]
    for req in self._requests_owning_rows():
        assert 0 <= req.kv.kv_committed_len <= req.kv.kv_allocated_len <= row_width, req.rid
    self.tree_cache.sanity_check()

"""What ends a request that cannot be served: it never ends the server, nor waits for ever."""

from __future__ import annotations

from unittest import mock

import pytest

from sglang_jenga.serving import rounds
from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.rig import Rig
from tests.faces.symbols import answer


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("model", ["dense", "windows"])
def test_a_client_that_asks_for_beams_is_told_so_and_nobody_else_notices(model, page_size):
    with Rig(MODELS[model][page_size], Settings(page_size=page_size)) as rig:
        rig.submit(answer([0], 9), 8)
        rig.turn(2)
        rig.fails.add(beams := rig.submit(answer([1], 9), 8, beam_width=2))
        rig.run()
        assert rig.ended(beams).reason == "abort"
        assert "beam" in rig.ended(beams).message.lower()
        rig.check_nothing_lost()


def aborted_after(forbidden: str) -> str:
    """Why a request was aborted that found no room: what ``forbidden`` names has never any."""
    from sglang_jenga.serving import admission, lone_request

    owner, name = {
        "a lone request": (lone_request.LoneRequest, "chunk"),
        "the next chunk": (admission.JengaBudget, "_next_chunk"),
    }[forbidden]
    with Rig(MODELS["windows"][1], Settings(chunk=8)) as rig:
        rig.fails.add(rid := rig.submit(answer([0], 20), 8))
        with (
            mock.patch.object(rounds, "PATIENCE", 20),
            mock.patch.object(owner, name, lambda *args: None),
        ):
            rig.turn(100)
        message = rig.ended(rid).message
        assert rig.ask(answer([1], 9), 8).reason == "length"  # the next one is served
        rig.check_nothing_lost()
    return message


def test_who_is_never_admitted_is_given_up_and_told_what_was_wanted_and_what_there_was():
    message = aborted_after("a lone request")
    assert "28 tokens wanted, 0 of them answered" in message
    assert "#empty large pages" in message


def test_a_prompt_whose_next_chunk_never_fits_begins_anew_and_is_then_given_up():
    message = aborted_after("the next chunk")
    assert "28 tokens wanted, 0 of them answered" in message


def test_a_prompt_that_cannot_go_on_among_its_own_gaps_begins_anew_in_an_empty_pool():
    from sglang_jenga.serving.admission import JengaBudget

    lone = JengaBudget._next_chunk
    with Rig(MODELS["windows"][1], Settings(chunk=8)) as rig:

        def refused_once(self, *args):
            return lone(self, *args) if self.req.retraction_count else None

        rid = rig.submit(answer([0], 30), 8)
        with mock.patch.object(JengaBudget, "_next_chunk", refused_once):
            rig.run()
        assert (rig.ended(rid).reason, rig.ended(rid).retractions) == ("length", 1)
        rig.check_nothing_lost()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_nobody_is_given_up_while_the_engine_is_paused(mode):
    with Rig(MODELS["windows"][1], Settings(chunk=8)) as rig:
        rid = rig.submit(answer([0], 30), 8)
        rig.turn(2)
        rig.pause(mode)
        with mock.patch.object(rounds, "PATIENCE", 5):
            rig.turn(30)
            rig.resume()
            rig.run()
        assert rig.ended(rid).reason == "length"


def test_who_waits_for_something_else_than_memory_is_not_given_up():
    with Rig(MODELS["dense"][1], Settings()) as rig:
        rig.scheduler.enable_lora = True
        rig.scheduler.can_schedule_lora_req = lambda *_: False  # the adapter is on its way
        rid = rig.submit(answer([0], 10), 4)
        with mock.patch.object(rounds, "PATIENCE", 20):
            rig.turn(100)
        assert rig.ended(rid) is None
        rig.scheduler.enable_lora = False
        rig.run()
        assert rig.ended(rid).reason == "length"


def test_rounds_count_in_which_other_ranks_run_and_this_one_an_idle_batch():
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from sglang_jenga.serving.admission import JengaBudget

    usual = JengaBudget._next_chunk

    def refused_once(budget, *arguments):
        return usual(budget, *arguments) if budget.req.retraction_count else None

    with Rig(MODELS["windows"][1], Settings(chunk=8, overlap=False)) as rig:
        scheduler = rig.scheduler
        run, process = scheduler.run_batch, scheduler.process_batch_result

        def idle_instead_of_none(batch, need_sync=False):
            if batch is None:
                batch = ScheduleBatch.init_new(
                    [],
                    scheduler.req_to_token_pool,
                    scheduler.token_to_kv_pool_allocator,
                    scheduler.tree_cache,
                    scheduler.model_config,
                    scheduler.enable_overlap,
                    scheduler.spec_algorithm,
                )
                batch.prepare_for_idle()
            return batch

        def unless_idle(function):
            return lambda batch, *rest: (
                None if batch.forward_mode.is_idle() else function(batch, *rest)
            )

        scheduler.dp_attn_adapter.maybe_prepare_mlp_sync_batch = idle_instead_of_none
        scheduler.run_batch = unless_idle(run)
        scheduler.process_batch_result = unless_idle(process)
        rid = rig.submit(answer([0], 30), 8)
        with mock.patch.object(JengaBudget, "_next_chunk", refused_once):
            rig.turn(100)
        assert (rig.ended(rid).reason, rig.ended(rid).retractions) == ("length", 1)


def test_a_client_s_abort_stands_where_the_request_could_begin_anew():
    with Rig(MODELS["dense"][1], Settings(overlap=False)) as rig:
        rid = rig.submit(answer([0], 10), 40)
        rig.turn(4)
        rig.abort(rid)
        full = mock.patch.object(
            type(rig.pools.allocator), "check_decode_capacity", lambda *_, **__: False
        )
        with full:
            rig.turn()
        rig.run()
        assert rig.ended(rid).reason == "abort"
        rig.check_nothing_lost()

"""What ends a request that cannot be served: it never ends the server, nor waits for ever."""

from __future__ import annotations

from unittest import mock

import pytest

from sglang_jenga import scheduling
from tests.faces.cells import MODELS
from tests.faces.context import Settings
from tests.faces.pools import Shape
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


def aborted_after(shape: Shape, forbidden: str, *, prompt: int, settings: Settings) -> str:
    """Why a request was aborted that found no room: ``forbidden`` never has any."""
    from sglang_jenga.admission import JengaSWABudget

    with Rig(shape, settings) as rig:
        rig.fails.add(rid := rig.submit(answer([0], prompt), 8))
        with (
            mock.patch.object(scheduling, "PATIENCE", 20),
            mock.patch.object(JengaSWABudget, forbidden, lambda *args: None),
        ):
            rig.turn(100)
        message = rig.ended(rid).message
        assert rig.ask(answer([1], 9), 8).reason == "length"  # the next one is served
        rig.check_nothing_lost()
    return message


def test_who_is_never_admitted_is_given_up_and_told_what_was_wanted_and_what_there_was():
    message = aborted_after(
        MODELS["windows"][1], "_lone_chunk", prompt=20, settings=Settings(chunk=8)
    )
    assert "28 tokens wanted, 0 of them answered" in message
    assert "#empty large pages" in message


def test_a_prompt_whose_next_chunk_never_fits_begins_anew_and_is_then_given_up():
    message = aborted_after(
        MODELS["windows"][1], "_next_chunk", prompt=20, settings=Settings(chunk=8)
    )
    assert "28 tokens wanted, 0 of them answered" in message


def test_a_prompt_that_cannot_go_on_among_its_own_gaps_begins_anew_in_an_empty_pool():
    from sglang_jenga.admission import JengaSWABudget

    lone = JengaSWABudget._next_chunk
    with Rig(MODELS["windows"][1], Settings(chunk=8)) as rig:

        def refused_once(self, *args):
            return lone(self, *args) if self.req.retraction_count else None

        rid = rig.submit(answer([0], 30), 8)
        with mock.patch.object(JengaSWABudget, "_next_chunk", refused_once):
            rig.run()
        assert (rig.ended(rid).reason, rig.ended(rid).retractions) == ("length", 1)
        rig.check_nothing_lost()


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_nobody_is_given_up_while_the_engine_is_paused(mode):
    with Rig(MODELS["windows"][1], Settings(chunk=8)) as rig:
        rid = rig.submit(answer([0], 30), 8)
        rig.turn(2)
        rig.pause(mode)
        with mock.patch.object(scheduling, "PATIENCE", 5):
            rig.turn(30)
            rig.resume()
            rig.run()
        assert rig.ended(rid).reason == "length"

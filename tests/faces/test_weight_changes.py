"""Weights that are exchanged while requests wait: nobody goes on from an answer of the old ones."""

from __future__ import annotations

import pytest

from tests.faces.cells import MODELS
from tests.faces.rig import Rig
from tests.faces.symbols import answer

PROMPT = 12


def retracted_with_an_answer(rig: Rig):
    """A request that was retracted in the middle of its answer, beside one that runs on."""
    for first in (0, 1):
        rig.submit([first, *answer([first], PROMPT - 1)], 20)
    rig.turn(8)
    rig.retract()
    rig.turn()
    (waiting,) = rig.scheduler.waiting_queue
    assert len(waiting.output_ids) > 2
    return waiting


def prefix_of_next_prompt(rig: Rig) -> int:
    """Tokens that the next prompt in line finds in the cache."""
    found = []
    forward = rig.scheduler.model.forward_batch_generation

    def watched(batch, **options):
        if batch.forward_mode.is_extend():
            found.extend(batch.prefix_lens)
        return forward(batch, **options)

    rig.scheduler.tp_worker.forward_batch_generation = watched
    rig.run()
    return found[0]


@pytest.mark.parametrize("model", ["dense", "windows"])
def test_who_was_retracted_before_computes_the_answer_again(model: str):
    with Rig(MODELS[model][1]) as rig:
        retracted_with_an_answer(rig)
        rig.exchange_weights()

        assert prefix_of_next_prompt(rig) == 0
        rig.check_nothing_lost()


@pytest.mark.parametrize("model", ["dense", "windows"])
def test_with_the_same_weights_it_goes_on_from_what_it_had(model: str):
    with Rig(MODELS[model][1]) as rig:
        said = len(retracted_with_an_answer(rig).output_ids)

        assert prefix_of_next_prompt(rig) == PROMPT + said - 1
        rig.check_nothing_lost()


def test_while_nobody_waits_with_an_answer_the_cache_is_kept():
    with Rig(MODELS["dense"][1]) as rig:
        prompt = answer([0], PROMPT)
        rig.ask(prompt)
        rig.exchange_weights()
        rig.turn()

        assert rig.ask([*prompt, 1, 2]).hit >= PROMPT

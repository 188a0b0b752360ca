"""Whatever clients do, nobody reads another's memory, nobody waits for ever, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given

from sglang_jenga.serving import newcomers
from tests.faces.cells import CELLS, MODELS
from tests.faces.examples import examples
from tests.faces.programs import PROGRAMS, play
from tests.faces.rig import Rig


def play_some(name: str, share: float, order: str = "fcfs") -> None:
    cell = CELLS[name]

    @examples(0.05)
    @given(PROGRAMS)
    def holds(program):
        with Rig(cell.shape, cell.settings, share=share, order=order) as rig:
            play(rig, program)

    holds()


@pytest.mark.parametrize("name", CELLS)
def test_requests_of_half_the_pool_are_served_whatever_happens(name: str):
    play_some(name, 0.5)


@pytest.mark.parametrize("name", CELLS)
def test_requests_as_long_as_the_pool_are_served_whatever_happens(name: str):
    play_some(name, 1.0)


@pytest.mark.parametrize("model", MODELS)
def test_requests_are_served_whatever_happens_where_newcomers_evict_nothing(model, monkeypatch):
    monkeypatch.setattr(newcomers, "BUSY_TOKENS", 0)
    monkeypatch.setattr(newcomers, "IDLE_TOKENS", 0)
    monkeypatch.setattr(newcomers, "STEPS", 1)  # the last request is the mean of all
    name = next(name for name in CELLS if name.startswith(f"{model} ") and "page 4" in name)
    play_some(name, 0.5, "lpm")

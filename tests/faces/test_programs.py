"""Whatever clients do, nobody reads another's memory, nobody waits for ever, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.faces.cells import CELLS
from tests.faces.examples import examples
from tests.faces.programs import PROGRAMS, play
from tests.faces.rig import Rig


def play_some(name: str, share: float) -> None:
    cell = CELLS[name]

    @examples(0.05)
    @given(PROGRAMS)
    def holds(program):
        with Rig(cell.shape, cell.settings, share=share) as rig:
            play(rig, program)

    holds()


@pytest.mark.parametrize("name", CELLS)
def test_requests_of_half_the_pool_are_served_whatever_happens(name: str):
    play_some(name, 0.5)


@pytest.mark.parametrize("name", CELLS)
def test_requests_as_long_as_the_pool_are_served_whatever_happens(name: str):
    play_some(name, 1.0)

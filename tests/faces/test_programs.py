"""Whatever clients do, nobody reads another's memory and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faces.cells import CELLS
from tests.faces.examples import examples
from tests.faces.programs import ACTIONS, play
from tests.faces.rig import Rig


@pytest.mark.parametrize("name", CELLS)
def test_no_program_reads_wrong_tokens_or_loses_memory(name: str):
    cell = CELLS[name]

    @examples(0.05)
    @given(st.lists(ACTIONS, min_size=1, max_size=20))
    def holds(program):
        with Rig(cell.shape, cell.settings) as rig:
            play(rig, program)

    holds()

"""A step takes states first and tokens then: the first never take what the others were promised."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_jenga.testing.context import Settings
from tests.faces.examples import examples
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

PAGES = Settings(page_size=16, chunk=32, overlap=False, strategy="extra_buffer", track_interval=16)
TWO_STATES_A_PAGE = Shape(full=7, state_k=2, num_large=4, context=1024)
# As LFM2-1.2B: three states in a large page.
THREE_STATES_A_PAGE = Shape(full=12, state_k=3, num_large=8, context=1024)
CELLS = {
    "tracked": (TWO_STATES_A_PAGE, PAGES),
    "tracked lazily": (
        TWO_STATES_A_PAGE,
        PAGES._replace(overlap=True, strategy="extra_buffer_lazy"),
    ),
    "not tracked": (THREE_STATES_A_PAGE, Settings(overlap=False)),
    "beside windows": (
        TWO_STATES_A_PAGE._replace(window_k=3, window=20, num_large=8),
        PAGES,
    ),
}
# Which text, tokens of the prompt and of the answer, and passes of the event loop until the next.
requests = st.tuples(
    st.integers(0, 5), st.integers(1, 75), st.sampled_from([1, 2, 5, 20, 40]), st.integers(0, 5)
)


@pytest.mark.parametrize("cell", CELLS)
@examples(0.25)
@given(st.lists(requests, min_size=2, max_size=8))
@example([(5, 19, 20, 2), (4, 25, 40, 4)])
@example([(4, 17, 40, 3), (5, 19, 20, 2), (4, 25, 40, 4)])
@example([(3, 47, 2, 5), (5, 18, 1, 1), (3, 33, 20, 1), (4, 2, 2, 5)])
@example([(5, 9, 1, 0), (2, 43, 5, 3), (1, 31, 1, 5)])
@example([(3, 39, 2, 0), (2, 44, 40, 1)])
def test_what_admission_promised_is_to_be_had(cell, program):
    with Rig(*CELLS[cell]) as rig:
        for text, prompt, new, turns in program:
            rig.submit(answer([text % 3, text // 3], prompt), new)
            rig.turn(turns)
        rig.run()
        rig.check_nothing_lost()

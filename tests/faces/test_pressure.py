"""Requests that fit one by one, but not all at once: SGLang makes them wait, or come again."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

FITS = Settings(overlap=False)


def submit(rig: Rig, *requests: tuple[int, int]) -> None:
    """Requests of so many tokens and so many new ones, of which admission counts on a share."""
    for text, (length, max_new) in enumerate(requests):
        rig.submit(answer([text], length), max_new, known_length=False)


@pytest.mark.parametrize("radix", [True, False], ids=["radix cache", "no radix cache"])
def test_no_second_prompt_is_cut_while_one_is_in_flight(radix: bool):
    shape = Shape(full=3, window_k=2, window=8, num_large=29)
    if radix:
        shape = Shape(full=1, window_k=1, window=2, num_large=27)
    with Rig(shape, FITS._replace(radix=radix)) as rig:
        submit(rig, *([(1, 1), (14, 5), (12, 1)] if radix else [(50, 2), (41, 20)]))
        rig.run()


@pytest.mark.parametrize(
    ("shape", "settings", "requests"),
    [
        pytest.param(
            Shape(full=3, window_k=2, window=2, num_large=17),
            Settings(chunk=8, overlap=False),
            [(1, 7), (38, 1)],
            id="windows",
        ),
        pytest.param(
            Shape(full=2, window_k=1, window=2, num_large=12),
            Settings(chunk=8, radix=False),
            [(1, 5), (5, 5)],
            id="windows without radix cache",
        ),
        pytest.param(
            Shape(full=2, window_k=1, window=2, state_k=1, num_large=13),
            Settings(chunk=8, overlap=False, strategy="extra_buffer"),
            [(1, 10), (6, 1)],
            id="windows and states",
        ),
    ],
)
def test_no_request_that_fits_is_aborted(shape: Shape, settings: Settings, requests):
    with Rig(shape, settings) as rig:
        submit(rig, *requests)
        rig.run()

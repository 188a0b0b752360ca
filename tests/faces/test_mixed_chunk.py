"""Decoding requests ride along with a prompt's chunk (``--enable-mixed-chunk``)."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.cells import MODELS
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer


class Mixed(NamedTuple):
    model: str
    page_size: int
    overlap: bool
    strategy: str = "no_buffer"

    large_pages: int = 1  # times the pool of `MODELS`

    @property
    def quick(self) -> bool:
        """In a full pool, small pages with overlap and larger ones without."""
        return self.large_pages == 1 and self.overlap == (self.page_size == 1)

    def __str__(self) -> str:
        overlap = "overlap" if self.overlap else "no overlap"
        room = "in a full pool" if self.large_pages == 1 else "with room"
        return ", ".join([f"{self.model} page {self.page_size}", overlap, self.strategy, room])


CASES = [
    pytest.param(case, marks=() if case.quick else pytest.mark.slow, id=str(case))
    for case in [
        Mixed(model, page_size, overlap, strategy, large_pages)
        for model, shapes in MODELS.items()
        for page_size in (1, 4)
        for overlap in (True, False)
        for strategy in (
            ("extra_buffer", "extra_buffer_lazy") if shapes[1].has_states else ("no_buffer",)
        )
        for large_pages in (1, 4)
    ]
]


@pytest.mark.parametrize("case", CASES)
def test_requests_that_ride_along_with_a_chunk_are_answered(case: Mixed):
    shape = MODELS[case.model][case.page_size]
    settings = Settings(
        page_size=case.page_size, overlap=case.overlap, strategy=case.strategy, mixed_chunk=True
    )
    rng = random.Random(4)
    with Rig(shape._replace(num_large=case.large_pages * shape.num_large), settings) as rig:
        for i in range(8):
            prompt = answer([i % 3], rng.randrange(1, min(60, rig.pools.longest // 2)))
            rig.submit(prompt, rng.randrange(1, 12))
            rig.turn(rng.randrange(5))
        rig.run()
        rig.check_nothing_lost()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("interval", "requests"),
    [
        (1, [(0, 4, 21, 8), (1, 62, 5, 0), (2, 57, 1, 0)]),
        (4, [(0, 41, 35, 2), (1, 53, 6, 0), (2, 45, 18, 6)]),
    ],
)
def test_a_chunk_still_reads_what_is_locked_when_requests_in_it_take_states(
    interval: int, requests: list[tuple[int, int, int, int]], overlap: bool
):
    """Their slots are allocated when the chunk has its memory already, and has not run."""
    settings = Settings(
        chunk=16,
        strategy="extra_buffer_lazy",
        mixed_chunk=True,
        slide_interval=interval,
        overlap=overlap,
    )
    with Rig(Shape(full=12, window_k=6, window=24, state_k=1, num_large=27), settings) as rig:
        for text, prompt, new, turns in requests:
            rig.submit(answer([text], prompt), new)
            rig.turn(turns)
        rig.run()
        rig.check_nothing_lost()

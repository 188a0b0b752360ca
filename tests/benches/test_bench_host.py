"""The host benchmark: its sides play the same, lose nothing, and every call of all is timed."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from benchmarks.host import bench_host, tables
from benchmarks.host.bench_host import Cell, chats, run_cell
from sglang_jenga.testing.context import configured

SMALL = {windows: Cell(windows, batch=4, pool=1200) for windows in (False, True)}


@pytest.mark.parametrize("cell", SMALL.values())
def test_running_requests_fill_half_of_the_pool_at_most(cell: Cell):
    assert cell.batch * cell.request <= cell.shape.num_tokens // 2


def test_every_request_outgrows_the_window():
    for batch in bench_host.BATCHES:
        for pool in bench_host.POOLS:
            cell = Cell(True, batch, pool)
            if cell.request >= bench_host.LEAST_REQUEST:
                assert cell.window < cell.request // 2


def test_chats_share_heads_and_have_answers_of_their_own():
    cell = SMALL[False]
    found = list(islice(chats(cell, random.Random(1)), 40))

    assert all(len(chat.prompt) + len(chat.answer) <= cell.request for chat in found)
    heads = [tuple(chat.prompt[: (cell.request - cell.answer) // 4]) for chat in found]
    assert 1 < len(set(heads)) <= 4
    assert len({tuple(chat.prompt) for chat in found}) == len(found)


@pytest.fixture(scope="module")
def played():
    with configured():
        yield {windows: run_cell(cell, 40, cell.sides) for windows, cell in SMALL.items()}


@pytest.mark.slow
@pytest.mark.parametrize("windows", SMALL)
def test_every_call_of_every_side_is_timed(played, windows: bool):
    for side in played[windows]:
        for call in (*tables.STEP_CALLS, "step"):
            assert len(side.seconds["full", call]) == 40
            assert len(side.seconds["spare", call]) == SMALL[windows].answer - 2
        counts = {len(side.seconds["full", call]) for call in tables.REQUEST_CALLS}
        assert len(counts) == 1
        assert counts.pop() > 0


@pytest.mark.slow
@pytest.mark.parametrize("windows", SMALL)
def test_the_pool_is_full_of_prefixes_that_are_hit(played, windows: bool):
    for side in played[windows]:
        assert side.hit_tokens > 0
        assert side.cache.full_evictable_size() > 0
        assert side.allocator.available_size() < SMALL[windows].request


@pytest.mark.slow
@pytest.mark.parametrize("windows", SMALL)
def test_what_ran_can_all_be_evicted_again(played, windows: bool):
    for side in played[windows]:
        side.phase = None
        side.release_all()
        side.cache.reset()
        if side.name == "jenga":
            large = side.allocator.core.large
            assert large.num_empty == large.owner.size - 1

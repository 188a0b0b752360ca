"""Cross attention as a layer type: which positions of a row are whose, counted one by one."""

import numpy as np
import pytest

from sglang_jenga.layers.base import Address, Load
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.window import Window
from sglang_jenga.pages.tables import PageTables, StepDemand, span
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan

TEXT, IMAGE = 0, 1


def plan(*kinds, tokens_per_page=1):
    groups = (LayerGroup(kind, (i,), 8, tokens_per_page) for i, kind in enumerate(kinds))
    return PoolPlan(tuple(GroupPlan(group, 8, 3) for group in groups), 24 * tokens_per_page, 64)


@pytest.mark.parametrize("border", range(6))
def test_each_position_is_one_groups(border: int):
    for start in range(6):
        for end in range(start, 7):
            mine = [
                set(range(*span(address, start, end, border)))
                for address in (Address.ENCODER, Address.ROW)
            ]

            assert mine[0] == {at for at in range(start, end) if at < border}
            assert mine[1] == set(range(start, end)) - mine[0]


def test_a_request_holds_its_image_once_and_its_text_as_it_grows():
    for tokens, encoder, held in ((100, 68, (32, 68)), (100, 0, (100, 0)), (30, 68, (0, 30))):
        assert RequestNeed(plan(Full(), Cross())).pages(tokens, encoder=encoder) == list(held)
    assert Cross().growth(100, 50) == 0
    assert Full().held(Load(100, encoder=68), 1) == 32


class Kv:
    def __init__(self, row):
        self.req_pool_idx = row


class Req:
    def __init__(self, row):
        self.kv = Kv(row)


def test_a_steps_pages_enter_rows_and_slots_as_the_rows_name_them():
    """Three requests: an image and two tokens, a text, and a text behind an image that is hit."""
    tables = PageTables(plan(Full(), Cross()), 3, 20)
    reqs = [Req(0), Req(1), Req(2)]
    starts, ends = np.array([0, 0, 6]), np.array([5, 2, 7])
    step = StepDemand(reqs, starts, ends, 1, borders=np.array([3, 0, 4]))
    tables.borders[:] = step.borders
    ids = [np.array([11, 12, 21, 22, 31]), np.array([51, 52, 53])]

    for group_id in (TEXT, IMAGE):
        tables.enter(group_id, step, ids[group_id])

    assert step.num_encoder == 3
    assert tables.in_row_order(step, ids).tolist() == [51, 52, 53, 11, 12, 21, 22, 31]
    assert tables.pages(IMAGE, 0, 0, 5).tolist() == [51, 52, 53]
    assert tables.pages(TEXT, 0, 0, 5).tolist() == [11, 12]
    assert tables.pages(TEXT, 1, 0, 2).tolist() == [21, 22]
    assert tables.pages(IMAGE, 1, 0, 2).size == 0
    assert tables.pages(TEXT, 2, 6, 7).tolist() == [31]


def test_a_decode_step_takes_text_alone():
    tables = PageTables(plan(Full(), Cross()), 2, 20)
    step = StepDemand(
        [Req(0), Req(1)],
        np.array([5, 7]),
        np.array([6, 8]),
        1,
        rows=np.array([0, 1]),
        borders=np.array([3, 0]),
    )
    tables.borders[:] = step.borders
    ids = [np.array([13, 23]), np.zeros(0, dtype=np.int64)]

    for group_id in (TEXT, IMAGE):
        tables.enter(group_id, step, ids[group_id])

    assert step.num_encoder == 0
    assert tables.in_row_order(step, ids).tolist() == [13, 23]
    assert [tables.pages(TEXT, row, at, at + 1)[0] for row, at in ((0, 5), (1, 7))] == [13, 23]


@pytest.mark.parametrize(
    ("kinds", "tokens_per_page", "why"),
    [
        ((Full(), Window(8), Cross()), 1, "beside full attention alone"),
        ((Full(), Cross()), 4, "pages of one token, not 4"),
    ],
)
def test_what_cannot_be_served_with_an_encoder_is_said(kinds, tokens_per_page, why):
    groups = pytest.importorskip("sglang_jenga.serving.groups")

    with pytest.raises(ValueError, match=why):
        groups.ServedGroups(plan(*kinds, tokens_per_page=tokens_per_page))

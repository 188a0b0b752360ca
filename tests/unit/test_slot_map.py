"""The record of which window page stands beside every full page, and the copy that kernels read."""

import numpy as np
import pytest
import torch

from sglang_jenga.serving.slot_map import SlotMap

PAGE_SIZES = pytest.mark.parametrize("tokens_per_page", [1, 4])


def pages(*ids):
    return np.array(ids, dtype=np.int64)


class Counted:
    """Copies to the "device", and how often."""

    def __init__(self):
        self.copies = 0

    def __call__(self, array):
        self.copies += 1
        return torch.from_numpy(array.copy())


def slot_map(tokens_per_page, num_pages=8):
    copy = Counted()
    return SlotMap(num_pages, tokens_per_page, "cpu", copy), copy


def window_slots(found, full_page, tokens_per_page):
    begin = full_page * tokens_per_page
    return found.tensor[begin : begin + tokens_per_page].tolist()


@PAGE_SIZES
def test_after_an_upload_every_slot_of_a_page_leads_to_its_partner(tokens_per_page):
    found, _ = slot_map(tokens_per_page)
    found.pair(pages(3, 5), pages(2, 7))
    found.upload()
    for full, window in ((3, 2), (5, 7)):
        begin = window * tokens_per_page
        assert window_slots(found, full, tokens_per_page) == list(
            range(begin, begin + tokens_per_page)
        )
    found.check(pages(3, 5), pages(2, 7))


@PAGE_SIZES
def test_a_page_without_a_partner_leads_to_the_null_page(tokens_per_page):
    found, _ = slot_map(tokens_per_page)
    found.pair(pages(3), pages(2))
    found.upload()
    found.part(pages(3))
    found.upload()
    assert window_slots(found, 3, tokens_per_page) == list(range(tokens_per_page))
    found.check(pages(3), pages(0))


def test_no_previous_slot_stays_no_previous_slot():
    found, _ = slot_map(1)
    found.pair(pages(*range(1, 8)), pages(*range(7, 0, -1)))
    found.upload()
    assert found.tensor[-1] == -1 and found.tensor[0] == 0


def test_what_the_record_says_last_is_what_kernels_see():
    found, _ = slot_map(1)
    found.pair(pages(3, 4), pages(2, 5))
    found.part(pages(3))
    found.pair(pages(3, 6), pages(7, 1))
    found.upload()
    assert found.tensor[[3, 4, 6]].tolist() == [7, 5, 1]


def test_what_is_known_already_costs_no_copy():
    found, copy = slot_map(1)
    found.pair(pages(3), pages(2))
    found.upload()
    found.pair(pages(3), pages(2))
    found.upload()
    assert copy.copies == 1


def test_slots_of_a_step_and_what_has_changed_go_in_one_copy():
    found, copy = slot_map(4)
    found.pair(pages(3), pages(2))
    beside = pages(12, 13, 14)
    assert found.upload(beside).tolist() == beside.tolist()
    assert copy.copies == 1
    assert found.upload(beside).tolist() == beside.tolist()
    found.check(pages(3), pages(2))


def test_the_check_sees_a_tensor_that_says_something_else():
    found, _ = slot_map(1)
    found.pair(pages(3), pages(2))
    found.upload()
    found.tensor[3] = 4
    with pytest.raises(AssertionError):
        found.check(pages(3), pages(2))


def test_the_check_sees_a_record_that_says_something_else():
    found, _ = slot_map(1)
    found.pair(pages(3), pages(2))
    with pytest.raises(AssertionError):
        found.check(pages(3), pages(0))

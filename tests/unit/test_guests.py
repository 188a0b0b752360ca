"""What lies in empty large pages: who goes first, and that nobody else notices."""

from __future__ import annotations

import numpy as np

from sglang_jenga.pages.guests import Guests
from tests.models.small_pools import alloc_one, pool


def nothing_more(count):
    """Nothing can be emptied for a guest."""


def guests_of(packings=(1,), num_large=9):
    """Guests of a pool of 8 empty large pages."""
    allocator = pool(packings, num_large)
    return allocator, Guests(allocator)


def admit(guests, key, count, more=nothing_more):
    ids = guests.admit(key, count, more)
    return None if ids is None else ids.tolist()


def test_pages_of_a_guest_are_free_and_are_handed_out_last():
    allocator, guests = guests_of()
    ids = admit(guests, "image", 3)

    assert allocator.large.num_empty == 8
    others = alloc_one(allocator, 0, 5)

    assert not set(ids) & set(others)
    assert guests.get("image").tolist() == ids
    guests.check()


def test_a_guest_goes_whole_as_soon_as_one_of_its_pages_is_handed_out():
    allocator, guests = guests_of()
    ids = admit(guests, "image", 3)

    taken = alloc_one(allocator, 0, 6)

    assert len(set(ids) & set(taken)) == 1
    assert guests.get("image") is None
    assert guests.num_larges == 0
    allocator.free(0, np.array(taken, dtype=np.int64))
    assert guests.get("image") is None, "the page is empty again, its bytes are another's"


def test_a_page_that_a_guest_leaves_is_zeroed_before_it_is_used():
    allocator, guests = guests_of()
    ids = admit(guests, "image", 2)
    guests.drop("image")

    alloc_one(allocator, 0, 8)

    assert sorted(allocator.large.take_stale()) == sorted(ids)


def test_guests_go_one_after_another_and_not_in_parts():
    allocator, guests = guests_of()
    for key in range(4):
        admit(guests, key, 2)
    left = []
    for _ in range(4):
        alloc_one(allocator, 0, 2)
        left.append(len(guests.keys))
        guests.check()

    assert left == [3, 2, 1, 0]


def test_which_guest_goes_is_drawn_and_the_same_everywhere():
    def order(seed_of_load):
        allocator, guests = guests_of(num_large=21)
        for key in range(20):
            admit(guests, key, 1)
        gone = []
        for _ in range(20):
            before = set(guests.keys)
            alloc_one(allocator, 0, 1)
            gone += before - set(guests.keys)
        return gone

    assert order(1) == order(2)
    assert order(1) not in (list(range(20)), list(range(20))[::-1])


def test_a_wanted_guest_goes_last():
    for wanted in range(4):
        allocator, guests = guests_of()
        for key in range(4):
            admit(guests, key, 2)
        guests.want([wanted])

        alloc_one(allocator, 0, 6)

        assert guests.keys == [wanted]
        guests.want([])
        guests.check()


def test_a_new_guest_takes_the_place_of_those_that_nobody_wants():
    _, guests = guests_of()
    guests.want(["wanted"])
    admit(guests, "wanted", 4)
    admit(guests, "other", 4)

    assert admit(guests, "too large", 5) is None
    assert guests.keys == ["wanted", "other"], "who does not fit takes nobody's place"
    assert admit(guests, "new", 3) is not None
    assert guests.keys == ["wanted", "new"]
    guests.check()


def test_only_for_a_wanted_guest_more_pages_are_emptied():
    allocator, guests = guests_of()
    extent = allocator.adopt(0, np.array(alloc_one(allocator, 0, 6), dtype=np.int64))
    asked = []

    def more(count):
        asked.append(count)
        allocator.evict(extent)

    assert admit(guests, "image", 5, more) is None
    assert asked == []
    guests.want(["image"])
    assert admit(guests, "image", 5, more) is not None
    assert asked == [3]
    guests.check()


def test_a_dropped_guest_leaves_the_others_where_they_are():
    allocator, guests = guests_of()
    for key in range(3):
        admit(guests, key, 2)

    assert guests.drop(1)
    assert not guests.drop(1)

    alloc_one(allocator, 0, 4)
    assert guests.keys == [0, 2]
    guests.check()


def test_a_flush_takes_them_all():
    allocator, guests = guests_of()
    admit(guests, "image", 3)
    guests.want(["image"])

    allocator.clear()
    guests.clear()

    assert guests.get("image") is None
    assert guests.num_wanted_larges == 0
    guests.check()
    assert admit(guests, "image", 8) is not None


def test_bytes_that_came_back_from_the_card_are_no_guest():
    allocator, guests = guests_of()
    admit(guests, "image", 3)

    allocator.large.forget_formats()

    assert guests.get("image") is None


def test_guests_have_so_many_pages_at_most_whatever_is_idle(monkeypatch):
    monkeypatch.setattr("sglang_jenga.pages.guests.MOST", 5)
    _, guests = guests_of(num_large=20)
    for key in range(4):
        assert admit(guests, key, 2) is not None
        assert guests.num_larges <= 5
    guests.want(guests.keys)
    assert admit(guests, "another", 2) is None, "those are wanted"
    guests.check()


def test_whoever_is_wanted_no_more_takes_the_place_of_his_rank():
    allocator, guests = guests_of(num_large=20)
    for key in range(6):
        admit(guests, key, 2)
    before = allocator.large.handed_out_last(12).tolist()

    guests.want([1, 4, 5])
    guests.check()
    guests.want([4, 2])
    guests.check()
    guests.want(())
    guests.check()

    assert allocator.large.handed_out_last(12).tolist() == before

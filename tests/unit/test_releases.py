"""What is given up when memory is short: the cheapest first, and no more than is needed."""

from __future__ import annotations

from sglang_jenga.serving.pressure import Need, Pressure, Price
from tests.conftest import RecordingAllocator, plan_of


class Held:
    """A release that gives back so many small pages of a request, one at a time."""

    def __init__(self, allocator, count: int, log: list[str], name: str, only_to_run=False):
        self._allocator, self._log, self._name = allocator, log, name
        self._only_to_run = only_to_run
        ids = allocator.alloc(["request"], [[count]])[0]
        self.ids = ids.tolist()

    def free(self, until: Need) -> bool:
        import numpy as np

        if self._only_to_run and not until.to_run:
            return until.met
        while self.ids and not until.met:
            self._log.append(self._name)
            self._allocator.free(0, np.array([self.ids.pop()]))
        return until.met

    def num_releasable(self) -> int:
        return len(self.ids) if self._only_to_run else 0


def full_pool():
    """A pool of eight small pages but for the null page, all of them held by four releases."""
    allocator, log = RecordingAllocator(plan_of((1,), 9)), []
    pressure = Pressure(allocator)
    releases = {}
    # Added in an order that is not that of their prices.
    for price, name in (
        (Price.TRACKED, "tracked"),
        (Price.CACHED, "cached"),
        (Price.BEHIND_WINDOWS, "behind"),
        (Price.LAST_BEHIND_WINDOWS, "last behind"),
    ):
        releases[name] = Held(allocator, 2, log, name, only_to_run=name == "tracked")
        pressure.add(price, releases[name])
    return pressure, releases, log


def test_nothing_is_given_up_while_there_is_room():
    pressure, _, log = full_pool()

    assert pressure.make_room([0])
    assert log == []


def test_the_cheapest_goes_first_and_only_as_much_as_is_needed():
    pressure, _, log = full_pool()

    assert pressure.make_room([3])
    assert log == ["behind", "behind", "cached"]


def test_what_requests_are_tracked_in_goes_last_and_only_for_who_must_run():
    pressure, _, log = full_pool()

    assert not pressure.make_room([8], to_run=False)
    assert "tracked" not in log and len(log) == 6
    assert pressure.make_room([8])
    assert log[6:] == ["tracked", "tracked"]


def test_what_nothing_can_hit_goes_even_if_there_is_room():
    pressure, _, log = full_pool()
    seen = []

    class Unreachable:
        def free(self, until: Need) -> bool:
            seen.append(list(until.smalls))
            return until.met

    pressure.add(Price.UNREACHABLE, Unreachable())

    assert pressure.make_room([0])
    assert seen == [[0]] and log == []


def test_when_all_is_given_up_and_it_is_not_enough_the_answer_is_no():
    pressure, _, _ = full_pool()

    assert not pressure.make_room([9])


def test_states_that_could_be_given_up_are_those_of_the_tracked():
    pressure, releases, _ = full_pool()

    assert pressure.releasable_states() == 2
    assert pressure.make_room([7])
    assert pressure.releasable_states() == len(releases["tracked"].ids) == 1

"""Guests: what lies in empty large pages until they are handed out (paper section 5.3).

A guest's large pages are empty as far as the allocator knows: it counts them as free, promises them
and hands them out without asking. So nobody ever waits for a guest, and none can be lost. Guests
have the pages that are handed out last; and a page that is handed out changes its number format,
by which its guest is known to be gone.

    empty large pages, in the order in which they are handed out:

        [ without a guest ][ rank 9 ][ rank 4 ][ rank 1 ][ wanted ][ wanted ]
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.layout import FOREIGN, UNBOUND

_RANK_BITS = 24

MOST = 1 << 16
"""Large pages of all guests at most: to admit one moves half of the others in the list of empty
ones, a millisecond for so many. Beyond that a large page is small, and many gigabytes are kept."""


class Guest(NamedTuple):
    """``large_ids``: int64, the last of them handed out first. Of two guests the one with the
    higher ``rank`` goes first, whole; of equal ranks the later one."""

    large_ids: np.ndarray
    rank: int
    number: int


Place = tuple[bool, int, int, Hashable]
"""Of a guest: whether nobody wants it, its rank and number, its key. The one to go first is last.
Numbers differ, so that keys are never compared."""


class Guests:
    """Guests by key. Which one goes is drawn, one rank for all pages of a guest, from a sequence
    that is the same on every tensor-parallel rank.

    ``wanted``: keys of guests that somebody has not done with. They go last, and no other guest
    takes their place.

    Invariant: the large pages that are handed out last are those of the guests, in their order. So
    guests that are gone are the last in it, and looking for them takes no time if there are none.
    """

    def __init__(self, core: Allocator) -> None:
        self._core = core
        self._draw = random.Random(0)
        self._number = 0
        self.clear()

    def clear(self) -> None:
        """All of them go, and nobody wants one. Also after `Allocator.clear`."""
        self._guests: dict[Hashable, Guest] = {}
        self._order: list[Place] = []
        self._num_larges = self._num_wanted = 0
        self.wanted: frozenset[Hashable] = frozenset()

    def get(self, key: Hashable) -> np.ndarray | None:
        """Large pages of a guest, in the order of its bytes; None if it is gone."""
        self._forget_gone()
        guest = self._guests.get(key)
        return None if guest is None else guest.large_ids

    @property
    def keys(self) -> list[Hashable]:
        self._forget_gone()
        return list(self._guests)

    def __len__(self) -> int:
        self._forget_gone()
        return len(self._guests)

    @property
    def num_larges(self) -> int:
        """Large pages with a guest."""
        self._forget_gone()
        return self._num_larges

    @property
    def num_wanted_larges(self) -> int:
        """Of these, the ones whose guest is wanted."""
        self._forget_gone()
        return self._num_wanted

    def want(self, keys: Iterable[Hashable]) -> None:
        """These keys are the wanted ones from now on; there need be no such guest yet."""
        self._forget_gone()
        keys = frozenset(keys)
        moved = {key: self._guests[key] for key in keys ^ self.wanted if key in self._guests}
        for key in moved:
            self._take_out(key)
        self.wanted = keys
        # Taken out they lie behind all guests, each before those that were taken out earlier.
        for key, guest in reversed(moved.items()):
            self._put_in(key, guest)

    def drop(self, key: Hashable) -> bool:
        """A guest goes; whether there was one."""
        self._forget_gone()
        if key not in self._guests:
            return False
        self._take_out(key)
        return True

    def admit(
        self, key: Hashable, count: int, empty_more: Callable[[int], None]
    ) -> np.ndarray | None:
        """Large pages for a new guest, ``[count]``, one at least; None if they cannot be had.
        Whoever writes there does so behind all forwards so far.

        Guests that nobody wants make room, and for a wanted one ``empty_more(num_larges)`` may
        empty further large pages.
        """
        self._forget_gone()
        large = self._core.large
        assert key not in self._guests and count > 0
        if self._num_wanted + count > MOST:
            return None
        room = large.num_empty - self._num_wanted
        if room < count and key in self.wanted:
            empty_more(count - room)
            room = large.num_empty - self._num_wanted
        if room < count:
            return None
        while self._num_larges + count > min(large.num_empty, MOST):
            self._take_out(self._order[-1][3])
        large_ids = large.handed_out_last(self._num_larges + count)[self._num_larges :]
        large.formats[large_ids] = FOREIGN
        self._number += 1
        guest = Guest(large_ids, self._draw.getrandbits(_RANK_BITS), self._number)
        self._put_in(key, guest)
        return large_ids

    def _forget_gone(self) -> None:
        """Those of whose pages one has been handed out since."""
        formats = self._core.large.formats
        while self._order:
            key = self._order[-1][3]
            if formats[self._guests[key].large_ids[-1]] == FOREIGN:
                break
            self._remove(key, len(self._order) - 1)

    def _put_in(self, key: Hashable, guest: Guest) -> None:
        """``guest``, whose pages come behind those of all guests, is one of them."""
        place = self._place(key, guest)
        index = bisect_left(self._order, place)
        size = guest.large_ids.size
        before = self._num_before(index)
        self._core.large.turn_last(before, self._num_larges + size, size)
        self._order.insert(index, place)
        self._guests[key] = guest
        self._num_larges += size
        self._num_wanted += size if key in self.wanted else 0

    def _take_out(self, key: Hashable) -> None:
        """A guest that is there is none any more; its pages come behind those of all others."""
        guest = self._guests[key]
        index = bisect_left(self._order, self._place(key, guest))
        self._core.large.turn_last(self._num_before(index), self._num_larges, -guest.large_ids.size)
        self._remove(key, index)

    def _remove(self, key: Hashable, index: int) -> None:
        size = self._guests.pop(key).large_ids.size
        del self._order[index]
        self._num_larges -= size
        self._num_wanted -= size if key in self.wanted else 0

    def _place(self, key: Hashable, guest: Guest) -> Place:
        return key not in self.wanted, guest.rank, guest.number, key

    def _num_before(self, index: int) -> int:
        """Large pages of the guests that come before a place; counted from the nearer end."""
        if 2 * index < len(self._order):
            return _size(self._guests[place[3]] for place in self._order[:index])
        return self._num_larges - _size(self._guests[place[3]] for place in self._order[index:])

    def check(self) -> None:
        """Recount. For tests and debugging."""
        self._forget_gone()
        large = self._core.large
        places = [self._place(key, guest) for key, guest in self._guests.items()]
        assert sorted(places) == self._order
        ids = np.concatenate([_NOTHING, *(self._guests[p[3]].large_ids for p in self._order)])
        assert self._num_larges == ids.size
        assert self._num_wanted == _size(
            guest for key, guest in self._guests.items() if key in self.wanted
        )
        assert np.unique(ids).size == ids.size, "a large page of two guests"
        assert (large.owner[ids] == UNBOUND).all(), "a guest in a large page of a group"
        assert (large.formats[ids] == FOREIGN).all()
        last = large.handed_out_last(ids.size)
        assert np.array_equal(last, ids), "guests are not handed out last"


_NOTHING = np.zeros(0, dtype=np.int64)


def _size(guests: Iterable[Guest]) -> int:
    return sum(guest.large_ids.size for guest in guests)

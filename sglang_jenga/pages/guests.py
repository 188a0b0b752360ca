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
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.layout import FOREIGN, UNBOUND

_RANK_BITS = 24


class Guest(NamedTuple):
    """``large_ids``: int64. Of two guests the one with the higher ``rank`` goes first, whole."""

    large_ids: np.ndarray
    rank: int


class Guests:
    """Guests by key. Which one goes is drawn, one rank for all pages of a guest, from a sequence
    that is the same on every tensor-parallel rank.

    ``wanted``: keys of guests that somebody has not done with. They go last, and no other guest
    takes their place.
    """

    def __init__(self, core: Allocator) -> None:
        self._core = core
        self._guests: dict[Hashable, Guest] = {}
        self._draw = random.Random(0)
        self.wanted: frozenset[Hashable] = frozenset()

    def clear(self) -> None:
        """All of them go, and nobody wants one. Also after `Allocator.clear`."""
        self._guests.clear()
        self.wanted = frozenset()

    def get(self, key: Hashable) -> np.ndarray | None:
        """Large pages of a guest, in the order of its bytes; None if it is gone."""
        guest = self._present().get(key)
        return None if guest is None else guest.large_ids

    @property
    def keys(self) -> list[Hashable]:
        return list(self._present())

    @property
    def num_larges(self) -> int:
        """Large pages with a guest."""
        return _size(self._present().values())

    @property
    def num_wanted_larges(self) -> int:
        """Of these, the ones whose guest is wanted."""
        if not self.wanted or not self._guests:
            return 0
        guests = self._present()
        return _size(guests[key] for key in self.wanted if key in guests)

    def want(self, keys: Iterable[Hashable]) -> None:
        """These keys are the wanted ones from now on; there need be no such guest yet."""
        keys = frozenset(keys)
        if keys != self.wanted:
            self.wanted = keys
            self._order(self._present(), among=self.num_larges)

    def drop(self, key: Hashable) -> bool:
        """A guest goes; whether there was one."""
        guests = self._present()
        among = self.num_larges
        if guests.pop(key, None) is None:
            return False
        self._order(guests, among)
        return True

    def admit(
        self, key: Hashable, count: int, empty_more: Callable[[int], None]
    ) -> np.ndarray | None:
        """Large pages for a new guest, ``[count]``, None if they cannot be had; whoever writes
        there does so behind all forwards so far.

        Guests that nobody wants make room, and for a wanted one ``empty_more(num_larges)`` may
        empty further large pages.
        """
        guests, large = self._present(), self._core.large
        assert key not in guests
        room = large.num_empty - self.num_wanted_larges
        if room < count and key in self.wanted:
            empty_more(count - room)
            room = large.num_empty - self.num_wanted_larges
        if room < count:
            return None
        among = self.num_larges
        for other in self._in_order(guests)[::-1]:
            if large.num_empty - _size(guests.values()) >= count:
                break
            del guests[other]
        self._order(guests, among)
        held = _size(guests.values())
        large_ids = large.handed_out_last(held + count)[held:]
        large.formats[large_ids] = FOREIGN
        guests[key] = Guest(large_ids, self._draw.getrandbits(_RANK_BITS))
        self._order(guests, held + count)
        return large_ids

    def _present(self) -> dict[Hashable, Guest]:
        """Those of whose pages none has been handed out since."""
        formats = self._core.large.formats
        for key, guest in list(self._guests.items()):
            if (formats[guest.large_ids] != FOREIGN).any():
                del self._guests[key]
        return self._guests

    def _in_order(self, guests: dict[Hashable, Guest]) -> list[Hashable]:
        """The one to go last first."""
        return sorted(guests, key=lambda key: (key not in self.wanted, guests[key].rank))

    def _order(self, guests: dict[Hashable, Guest], among: int) -> None:
        """See that their pages are handed out last, and in order."""
        ids = [guests[key].large_ids for key in self._in_order(guests)]
        self._core.large.hand_out_last(np.concatenate([_NOTHING, *ids]), among)

    def check(self) -> None:
        """Recount. For tests and debugging."""
        guests, large = self._present(), self._core.large
        ids = np.concatenate([_NOTHING, *(guests[key].large_ids for key in self._in_order(guests))])
        assert np.unique(ids).size == ids.size, "a large page of two guests"
        assert (large.owner[ids] == UNBOUND).all(), "a guest in a large page of a group"
        assert (large.formats[ids] == FOREIGN).all()
        last = large.handed_out_last(ids.size)
        assert np.array_equal(last, ids), "guests are not handed out last"


_NOTHING = np.zeros(0, dtype=np.int64)


def _size(guests: Iterable[Guest]) -> int:
    return sum(guest.large_ids.size for guest in guests)

"""What is given up when memory is short, cheapest loss first.

Each place that can give something up is a `Release` with a price. The allocator asks `make_room`;
who holds what can be given up adds the releases. A layer type with something of its own to give up
adds one more.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from sglang_jenga.pages.allocator import Allocator


class Price(IntEnum):
    """What a release costs those who come later."""

    FOR_WANTED_IMAGES = -10  # somebody may come back for it; but a prompt in flight needs an image
    UNREACHABLE = 0  # nothing can hit it any more
    BEHIND_WINDOWS = 10  # no running request reads it, and a fair amount has gathered
    CACHED = 20  # somebody may come back for it
    LAST_BEHIND_WINDOWS = 30  # a page or two of each request: many looks for little
    TRACKED = 40  # a running request goes on, but its answer can be hit less far


class Need:
    """Small pages per group that have to fit. ``to_run``: a request cannot go on without them."""

    __slots__ = ("_core", "smalls", "to_run")

    def __init__(self, core: Allocator, smalls: Sequence[int], *, to_run: bool) -> None:
        self._core, self.smalls, self.to_run = core, smalls, to_run

    @property
    def met(self) -> bool:
        return self._core.fits_now(self.smalls)


class Release:
    """One way to give memory up."""

    def free(self, until: Need) -> bool:
        """Give up as little as meets the need, or all there is; whether it is met."""
        raise NotImplementedError

    def num_releasable(self) -> int:
        """States that running requests hold, could give up here, and go on."""
        return 0


class Pressure:
    """The releases of a server, and the requests that they ask.

    ``decoding``: those of the last decode step; some may have finished since. ``prompt_in_flight``:
    the one whose prompt has been computed in part, if any. ``beside``: those of a pipeline's other
    micro-batches, and on a decode server those that have not run there yet.
    """

    def __init__(self, core: Allocator) -> None:
        self._core = core
        self._releases: list[tuple[int, int, Release]] = []
        self.decoding: Sequence[Any] = ()
        self.prompt_in_flight: Any = None
        self.beside: Sequence[Any] = ()

    def add(self, price: int, release: Release) -> None:
        insort(self._releases, (price, len(self._releases), release))

    def make_room(self, smalls: Sequence[int], *, to_run: bool = True) -> bool:
        """Free memory until ``smalls`` small pages per group fit. False if that cannot be: SGLang
        then retracts a request.

        Tokens that nothing can hit go even if the rest would do, before another large page is taken
        for new ones: it may be wanted for a state. So do cached prefixes, before images that are
        wanted: these lie in empty large pages.
        """
        need = Need(self._core, smalls, to_run=to_run)
        met: bool | None = None  # not asked yet
        for price, _, release in self._releases:
            if price > Price.UNREACHABLE:
                met = need.met if met is None else met
                if met:
                    return True
            met = release.free(need)
        return need.met if met is None else met

    def releasable_states(self) -> int:
        """States that decoding requests are tracked in, and can go on without."""
        return sum(release.num_releasable() for _, _, release in self._releases)

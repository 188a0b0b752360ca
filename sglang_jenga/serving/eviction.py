"""What goes when memory is short and nobody runs on it: cached prefixes, the oldest first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.pressure import Need, Release

MOST_AHEAD = 15
"""Large pages emptied besides each one that is missing."""


class Eviction:
    """Evicts from the trees until the allocator has what it needs.

    ``report(num_smalls, started)`` is told of each eviction, ``started`` by `time.perf_counter`.
    """

    def __init__(
        self, trees: RadixTrees, core: Allocator, report: Callable[[int, float], None]
    ) -> None:
        self._trees, self._core, self._report = trees, core, report

    def everything(self) -> None:
        """Give up all that no running request needs."""
        self.of_each(self._core.num_cached)

    def of_each(self, counts: Sequence[int]) -> list[int]:
        """Evict so many small pages of each group, whatever that frees; how many it were."""
        started = time.perf_counter()
        evicted = [self._trees.evict_small(*wanted) for wanted in enumerate(list(counts))]
        self._report(sum(evicted), started)
        return evicted

    def of_larges(self, count: int) -> None:
        """Empty so many large pages; none at all if there are not so many to be emptied."""
        if not 0 < count <= self._core.large.num_reclaimable:
            return
        with self._reported():
            self._trees.evict_large(count)

    def to_fit(self, need: Sequence[int]) -> None:
        """Evict until ``need`` small pages per group can be had (paper section 5.4, steps 3 to 5).

        Evicts nothing when even everything would not be enough: the caller will retract.
        """
        core, trees = self._core, self._trees
        if not core.fits_after_evicting(need):
            return
        with self._reported():
            while (missing := core.larges_missing(need)) and (
                trees.evict_smalls_before_large(core.smalls_missing(need))
                or trees.evict_large(missing + self._ahead(missing))
            ):
                pass  # an emptied large page may have had small pages that were counted on
            while core.larges_missing(need):
                # No large page can be emptied any more: single small pages, of groups that are
                # short.
                wanted = core.smalls_to_spare_a_large(need)
                if not sum(trees.evict_small(*short) for short in enumerate(wanted)):
                    raise RuntimeError(
                        "the allocator promised more than the prefix cache can evict"
                    )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """What goes from the trees inside is one eviction."""
        started, before = time.perf_counter(), sum(self._trees.num_pages)
        yield
        self._report(before - sum(self._trees.num_pages), started)

    def _ahead(self, missing: int) -> int:
        """Large pages to evict besides: finding and cutting victims costs most of an eviction, and
        the next steps will want as much again. A 64th of what could go, so that nothing is hit
        less; of the little that running requests leave to be cached an eighth, but of the pool no
        more than a 512th."""
        reclaimable = self._core.large.num_reclaimable
        little = min(self._core.plan.num_large // 512, reclaimable // 8)
        return min(MOST_AHEAD * missing, max(little, reclaimable // 64))


class CachedPrefixes(Release):
    """What nobody runs on, the oldest first."""

    def __init__(self, eviction: Eviction) -> None:
        self._eviction = eviction

    def free(self, until: Need) -> bool:
        self._eviction.to_fit(until.smalls)
        return until.met

"""The allocator against a model that knows only bytes: who owns each byte of the pool.

The model derives everything it expects (empty large pages, free small pages, capacity) from a map
of bytes and never reads a counter of the allocator.
"""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sglang_jenga.pages.allocator import Allocator, Chunks
from tests.conftest import plan_of
from tests.models.byte_model import PoolBytes

GEOMETRIES = [
    (1, 1),
    (2, 3),
    (26, 5),
    (1,),
    (6, 1),
    (3, 2, 1),
    (48, 6, 1),  # a state of 48 small pages of one group, 8 of the other
    (4, 28, 2),
    (7, 2, 30),
]


class PageModel:
    """Who holds each small page ``(group, small_id)``; what is free follows from the bytes."""

    def __init__(self, pool):
        self.pool = pool
        self.cached = {}  # small page -> None; what only the prefix cache holds
        self.pinned = {}  # small page -> None; what the cache holds and a request needs
        self.used = {}  # small page -> the request that holds it

    def capacity(self, *, cached=True):
        """(empty large pages, free small pages per group), also if all cached ones were gone."""
        return self.pool.capacity(self.used, self.pinned, self.cached if cached else ())

    def fits(self, need, *, cached=True):
        return self.pool.fits(need, self.used, self.pinned, self.cached if cached else ())


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(
        packings=st.sampled_from(GEOMETRIES),
        num_large=st.integers(2, 6),
        order=st.sampled_from(["packed", "paper", "fullest"]),
    )
    def start(self, packings, num_large, order):
        self.packings, self.num_large = packings, num_large
        self.allocator = Allocator(plan_of(packings, num_large), order=order)
        self.model = PageModel(PoolBytes(packings, num_large))
        self.extents = {}  # extent -> its small pages, as the model knows them
        self.fresh = self.model.capacity()
        self.next_request = 0

    # ---- helpers --------------------------------------------------------------------------

    def draw_need(self, data, num_requests):
        top = [k + 2 if k > 1 else 2 for k in self.packings]
        counts = st.tuples(*(st.integers(0, most) for most in top))
        per_request = data.draw(st.lists(counts, min_size=num_requests, max_size=num_requests))
        return [[row[group_id] for row in per_request] for group_id in range(len(top))]

    def draw_pages(self, data, among):
        """Some small pages of one group, in some order."""
        group_id = data.draw(st.sampled_from(sorted({group for group, _ in among})))
        choices = sorted(small_id for group, small_id in among if group == group_id)
        first = data.draw(st.integers(0, len(choices) - 1))
        stop = data.draw(st.integers(first + 1, len(choices)))
        step = data.draw(st.sampled_from([1, -1, 2]))
        return group_id, choices[first:stop][::step]

    def draw_extent(self, data, *, pinned):
        """An extent of the cache, None if there is none like that."""
        choices = [extent for extent in self.extents if extent.pinned == pinned]
        return data.draw(st.sampled_from(choices)) if choices else None

    def move(self, extent, before, after):
        for small_id in self.extents[extent]:
            del before[extent.group_id, small_id]
            after[extent.group_id, small_id] = None

    def alloc(self, requests, need, chunks=None):
        totals = [sum(counts) for counts in need]
        expected = self.model.fits(totals)
        assert self.allocator.fits_now(totals) == expected
        got = self.allocator.alloc(requests, need, chunks)
        assert (got is not None) == expected
        for group_id, ids in enumerate(got or []):
            owners = [r for r, n in zip(requests, need[group_id], strict=True) for _ in range(n)]
            for small_id, request in zip(ids.tolist(), owners, strict=True):
                assert (group_id, small_id) not in self.model.used
                self.model.used[group_id, small_id] = request
        return got

    # ---- rules ----------------------------------------------------------------------------

    @rule(data=st.data(), count=st.integers(0, 3))
    def alloc_for_new_requests(self, data, count):
        requests = list(range(self.next_request, self.next_request + count))
        self.next_request += count
        self.alloc(requests, self.draw_need(data, count))

    @precondition(lambda self: self.model.used)
    @rule(data=st.data())
    def alloc_for_running_requests(self, data):
        running = sorted(set(self.model.used.values()))
        self.alloc(running, self.draw_need(data, len(running)))

    @precondition(lambda self: self.model.used)
    @rule(data=st.data())
    def alloc_chunks_of_prompts(self, data):
        """Some go on after a small page that they hold, of all more may come."""
        running = sorted(set(self.model.used.values()))
        group_id = data.draw(st.integers(0, len(self.packings) - 1))
        last = np.full(len(running), -1)
        for at, request in enumerate(running):
            own = sorted(
                small_id
                for (group, small_id), holder in self.model.used.items()
                if (group, holder) == (group_id, request)
            )
            last[at] = data.draw(st.sampled_from([-1, *own]))
        most = 2 * self.packings[group_id]
        coming = np.array([data.draw(st.integers(0, most)) for _ in running])
        need = self.draw_need(data, len(running))
        self.alloc(running, need, Chunks(group_id, last, coming))

    @rule(data=st.data())
    def alloc_one_small_page_more_than_fits(self, data):
        group_id = data.draw(st.integers(0, len(self.packings) - 1))
        need = [[0]] * len(self.packings)
        need[group_id] = [self.allocator.obtainable(group_id) + 1]
        assert self.alloc(["greedy"], need) is None

    @precondition(lambda self: self.model.cached)
    @rule(data=st.data())
    def alloc_after_evicting(self, data):
        need = self.draw_need(data, 1)
        totals = [sum(counts) for counts in need]
        promised = self.model.fits(totals, cached=False)
        assert self.allocator.fits_after_evicting(totals) == promised
        while promised and not self.allocator.fits_now(totals):
            self.evict(self.draw_extent(data, pinned=False))
        if promised:
            assert self.alloc([self.next_request], need) is not None
            self.next_request += 1

    @precondition(lambda self: self.model.used)
    @rule(data=st.data())
    def free_used(self, data):
        group_id, small_ids = self.draw_pages(data, self.model.used)
        self.free(group_id, small_ids)

    def free(self, group_id, small_ids):
        self.allocator.free(group_id, np.array(small_ids, dtype=np.int64))
        for small_id in small_ids:
            del self.model.used[group_id, small_id]

    @precondition(lambda self: self.model.used)
    @rule(data=st.data())
    def adopt_used(self, data):
        group_id, small_ids = self.draw_pages(data, self.model.used)
        extent = self.allocator.adopt(group_id, np.array(small_ids, dtype=np.int64))
        self.extents[extent] = small_ids
        for small_id in small_ids:
            del self.model.used[group_id, small_id]
            self.model.cached[group_id, small_id] = None

    @rule(data=st.data())
    def pin_cached(self, data):
        extent = self.draw_extent(data, pinned=False)
        if extent is not None:
            self.allocator.pin(extent)
            self.move(extent, self.model.cached, self.model.pinned)

    @rule(data=st.data())
    def unpin_pinned(self, data):
        extent = self.draw_extent(data, pinned=True)
        if extent is not None:
            self.allocator.unpin(extent)
            self.move(extent, self.model.pinned, self.model.cached)

    @rule(data=st.data())
    def shield_or_not(self, data):
        extent = self.draw_extent(data, pinned=False)
        if extent is not None:
            self.allocator.shield(extent, not extent.shielded)

    @rule(data=st.data(), pinned=st.booleans())
    def split_an_extent(self, data, pinned):
        extent = self.draw_extent(data, pinned=pinned)
        if extent is None or extent.size == 1:
            return
        index = data.draw(st.integers(1, extent.size - 1))
        small_ids, shielded = self.extents.pop(extent), extent.shielded
        halves = self.allocator.split(extent, index)
        for half, ids in zip(halves, (small_ids[:index], small_ids[index:]), strict=True):
            assert half.ids.tolist() == ids
            assert half.pinned == pinned and half.shielded == shielded
            self.extents[half] = ids

    @rule(data=st.data())
    def evict_cached(self, data):
        extent = self.draw_extent(data, pinned=False)
        if extent is not None:
            self.evict(extent)

    def evict(self, extent):
        self.allocator.evict(extent)
        for small_id in self.extents.pop(extent):
            del self.model.cached[extent.group_id, small_id]

    @precondition(lambda self: self.model.used)
    @rule(data=st.data())
    def end_a_request(self, data):
        request = data.draw(st.sampled_from(sorted(set(self.model.used.values()))))
        for group_id in range(len(self.packings)):
            mine = [i for (g, i), r in self.model.used.items() if g == group_id and r == request]
            self.free(group_id, mine)
        self.allocator.forget(request)

    @precondition(lambda self: len(self.model.used) + len(self.model.cached) > 20)
    @rule()
    def clear(self):
        self.allocator.clear()
        self.model = PageModel(self.model.pool)
        self.extents = {}

    # ---- what must always hold ------------------------------------------------------------

    @invariant()
    def counters_are_those_of_the_model(self):
        allocator, model = self.allocator, self.model
        allocator.check(self.extents)
        empty, free = model.capacity()
        assert allocator.large.num_empty == empty
        for group_id, k in enumerate(self.packings):
            used = [*model.used, *model.pinned]
            assert allocator.num_used[group_id] == sum(g == group_id for g, _ in used)
            assert allocator.num_cached[group_id] == sum(g == group_id for g, _ in model.cached)
            assert allocator.obtainable(group_id) == free[group_id] + empty * k

    @invariant()
    def the_turn_of_every_large_page_is_known(self):
        """Times are the extents' ages in the model: the first to come is the oldest."""
        times = np.zeros(1 + max((extent.number for extent in self.extents), default=0), np.int64)
        for age, extent in enumerate(self.extents, 1):
            times[extent.number] = age * 7 % 11
        for extent, mine in self.extents.items():
            k = self.packings[extent.group_id]
            turns = {}
            for large_id in {small_id // k for small_id in mine}:
                around = [(extent.group_id, large_id * k + i) for i in range(k)]
                null = extent.group_id == self.model.pool.null_group and large_id == 0
                if null or any(p in self.model.used or p in self.model.pinned for p in around):
                    continue
                holders = [
                    other
                    for other, small_ids in self.extents.items()
                    if {(other.group_id, i) for i in small_ids} & set(around)
                ]
                turns[large_id] = max(int(times[other.number]) for other in holders)
            if extent.pinned:
                continue
            turn = self.allocator.turn(extent, times)
            assert turn == min(turns.values(), default=None)
            if turn is not None:
                due = self.allocator.due(extent, times, turn).tolist()
                assert sorted(due) == sorted(i for i, time in turns.items() if time == turn)

    @invariant()
    def what_eviction_could_free_is_predicted(self):
        shielded = [
            (extent.group_id, small_id)
            for extent, small_ids in self.extents.items()
            if extent.shielded
            for small_id in small_ids
        ]
        for kept in ([], shielded):
            held = (self.model.used, self.model.pinned, kept)
            empty, free = self.model.pool.capacity(*held)
            for group_id, k in enumerate(self.packings):
                need = [0] * len(self.packings)
                need[group_id] = free[group_id] + empty * k
                fits = self.allocator.fits_after_evicting
                assert fits(need, beside_shielded=bool(kept))
                need[group_id] += 1
                assert not fits(need, beside_shielded=bool(kept))

    def teardown(self):
        if not hasattr(self, "model"):
            return
        for group_id in range(len(self.packings)):
            self.free(group_id, [i for g, i in self.model.used if g == group_id])
        for extent in list(self.extents):
            if extent.pinned:
                self.allocator.unpin(extent)
                self.move(extent, self.model.pinned, self.model.cached)
            self.evict(extent)
        self.allocator.check([])
        assert self.model.capacity() == self.fresh
        empty, free = self.fresh
        assert self.allocator.large.num_empty == empty == self.num_large - 1
        assert self.allocator.large.free == free == self.allocator.large.slack
        assert self.allocator.large.num_reclaimable == 0
        assert self.allocator.num_used == self.allocator.num_cached == [0] * len(free)


TestAllocatorMachine = AllocatorMachine.TestCase

"""Guests against a model of who has written each large page last, and against a pool without any.

The model knows guests only by what was written. The twin is an allocator that never had a guest:
whatever it grants, empties or refuses, the pool with guests does too.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.guests import Guests
from tests.conftest import plan_of

GEOMETRIES = [(1,), (2, 3), (6, 1), (1, 1), (48, 6, 1)]
KEYS = st.integers(0, 7)


class GuestMachine(RuleBasedStateMachine):
    @initialize(
        packings=st.sampled_from(GEOMETRIES),
        num_large=st.integers(3, 12),
        order=st.sampled_from(["packed", "paper", "fullest"]),
    )
    def start(self, packings, num_large, order):
        self.packings = packings
        plan = plan_of(packings, num_large)
        self.pool, self.twin = Allocator(plan, order=order), Allocator(plan, order=order)
        self.guests = Guests(self.pool)
        self.written = {}  # large page -> key and which of its admissions wrote it last
        self.placed = {}  # key -> its admission and its large pages
        self.used, self.cached = [], []  # the same small pages, or extents, in pool and twin
        self.count = 0

    # ---- model --------------------------------------------------------------------------------

    def intact(self):
        """Keys whose large pages nobody has written since."""
        return {
            key
            for key, (admission, pages) in self.placed.items()
            if all(self.written.get(page) == admission for page in pages)
        }

    def empty_by_rank(self):
        guests, wanted = self.guests._guests, self.guests.wanted
        return sorted(self.intact(), key=lambda key: (key not in wanted, guests[key].rank))

    def overwrite(self, group_id, small_ids):
        for small_id in small_ids.tolist():
            self.written[small_id // self.packings[group_id]] = "KV"

    # ---- requests and the prefix cache ----------------------------------------------------------

    @rule(data=st.data())
    def alloc(self, data):
        need = [[data.draw(st.integers(0, k + 2))] for k in self.packings]
        self.count += 1
        order = self.empty_by_rank()
        got, expected = self.pool.alloc([self.count], need), self.twin.alloc([self.count], need)
        assert (got is None) == (expected is None), "a guest made somebody wait"
        if got is None:
            return
        before = {key: set(self.placed[key][1]) for key in order}
        for group_id, ids in enumerate(got):
            self.overwrite(group_id, ids)
            if ids.size:
                self.used.append((group_id, ids, expected[group_id]))
        gone = [key for key in order if key not in self.intact()]
        # Whole guests, from the end of the order on: of the last of them perhaps a part is written.
        assert gone == order[len(order) - len(gone) :]
        for key in gone[1:]:
            assert all(self.written[page] == "KV" for page in before[key]), "a guest went too early"
        taken = set(self.pool.large.take_stale())
        assert taken <= {page for page, who in self.written.items() if who == "KV"}
        for key in gone:
            written = {page for page in before[key] if self.written[page] == "KV"}
            assert written <= taken, "bytes of a guest in a page of KV"
            for page in before[key] - written:
                self.written[page] = "left"

    @precondition(lambda self: self.used)
    @rule(data=st.data(), cache=st.booleans())
    def give_back(self, data, cache):
        index = data.draw(st.integers(0, len(self.used) - 1))
        group_id, mine, others = self.used.pop(index)
        if cache:
            pair = self.pool.adopt(group_id, mine), self.twin.adopt(group_id, others)
            self.cached.append(pair)
            return
        self.pool.free(group_id, mine)
        self.twin.free(group_id, others)

    @precondition(lambda self: self.cached)
    @rule()
    def evict(self):
        mine, others = self.cached.pop(0)
        self.pool.evict(mine)
        self.twin.evict(others)

    # ---- guests -----------------------------------------------------------------------------

    @rule(key=KEYS, count=st.integers(1, 6))
    def admit(self, key, count):
        present = self.intact()
        if key in present:
            return
        wanted = key in self.guests.wanted
        kept = {other for other in present if other in self.guests.wanted}
        kept_pages = sum(len(self.placed[other][1]) for other in kept)

        def more(missing):
            assert wanted and missing == count - (self.pool.large.num_empty - kept_pages)
            while self.cached and self.pool.large.num_empty - kept_pages < count:
                self.evict()

        order = self.empty_by_rank()
        ids = self.guests.admit(key, count, more)
        room = self.pool.large.num_empty - kept_pages
        assert (ids is not None) == (room >= count)
        if ids is None:
            assert set(self.guests.keys) == present
            return
        still = set(self.guests.keys) - {key}
        assert kept <= still, "a wanted guest lost its place"
        assert still == set(order[: len(still)]), "another guest went than the last in order"
        rest = sum(len(self.placed[other][1]) for other in still)
        if still != present:
            first = order[len(still)]
            assert rest + len(self.placed[first][1]) + count > self.pool.large.num_empty
        self.count += 1
        self.placed = {other: self.placed[other] for other in still}
        self.placed[key] = (self.count, ids.tolist())
        self.written.update(dict.fromkeys(ids.tolist(), self.count))

    @rule(keys=st.frozensets(KEYS, max_size=2))
    def want(self, keys):
        self.guests.want(keys)

    @rule(key=KEYS)
    def drop(self, key):
        assert self.guests.drop(key) == (key in self.intact())
        self.placed.pop(key, None)

    @precondition(lambda self: not self.used)
    @rule()
    def flush(self):
        for allocator in (self.pool, self.twin):
            allocator.clear()
        self.guests.clear()
        self.placed, self.cached = {}, []

    # ---- what always holds --------------------------------------------------------------------

    @invariant()
    def guests_are_those_whose_bytes_are_there(self):
        if not hasattr(self, "pool"):
            return
        present = self.intact()
        assert set(self.guests.keys) == present
        for key in present:
            assert self.guests.get(key).tolist() == self.placed[key][1]
        pages = sum(len(self.placed[key][1]) for key in present)
        assert self.guests.num_larges == pages <= self.pool.large.num_empty
        self.guests.check()

    @invariant()
    def nobody_else_notices(self):
        if not hasattr(self, "pool"):
            return
        assert self.pool.large.num_empty == self.twin.large.num_empty
        assert self.pool.large.free == self.twin.large.free
        assert self.pool.large.reclaimable == self.twin.large.reclaimable
        self.pool.check([mine for mine, _ in self.cached])


TestGuests = GuestMachine.TestCase

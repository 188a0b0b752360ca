"""Trees and allocator together, with a memory and a model beside them, and what must always hold.

A small page that is written holds what it stands for, whole prefix and namespace included. What a
running request can still see, and what a hit promises, must read back exactly. What is cached,
locked, declined, evicted and hit must be what `CacheModel` derives from its dictionary, and what
fits what `PoolBytes` counts byte by byte. Subclasses name the geometries.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.layers.state import StatePolicy
from sglang_jenga.layers.window import WindowPolicy
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix import queues
from sglang_jenga.radix.node import PathLock
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import plan_of
from tests.models.age_model import AgeModel
from tests.models.byte_model import Memory, PoolBytes
from tests.models.cache_model import CacheModel, place_of


class Held(NamedTuple):
    """A lock's receipt, and per group the places that it keeps."""

    receipt: PathLock
    places: list[set]


class Request:
    """Tokens and pages of a running request; ``pages[g]`` holds 0 where there is none any more.

    The tree owns the pages before ``protected``; group g's pages before ``slid[g]`` are gone.
    ``state`` is the small id of the state after all of ``key``; ``tracked`` maps lengths to those
    of states that it left behind itself and that no tree has yet. 0 and nothing without states.
    """

    def __init__(self, request_id, namespace, key, pages, protected, held):
        self.request_id, self.namespace, self.key, self.pages = request_id, namespace, key, pages
        self.protected, self.held = protected, held
        self.slid = [0] * len(pages)
        self.state, self.tracked = 0, {}

    def own_from(self, group_id):
        return max(self.protected, self.slid[group_id])


class ModelledAllocator(Allocator):
    """Tells the models what is evicted."""

    model: CacheModel
    ages: AgeModel

    def evict(self, extent):
        for place in self.model.evict(extent.group_id, extent.ids.tolist()):
            self.ages.evict(extent.group_id, place)
        super().evict(extent)


class Rig(RuleBasedStateMachine):
    """``geometries``: small pages per large page of each group; ``states``: the last is states."""

    geometries: tuple[tuple[int, ...], ...]
    states = False

    @initialize(
        data=st.data(),
        tpp=st.sampled_from([1, 2, 4]),
        reaches=st.lists(st.integers(0, 9), min_size=2, max_size=2),
        grains=st.lists(st.sampled_from([1, 1, 3, 4, 8]), min_size=2, max_size=2),
        order=st.sampled_from(["packed", "paper", "fullest"]),
        balanced=st.sampled_from([True, True, False]),
        aligned=st.sampled_from([True, True, False]),
        state_cost=st.sampled_from([0, 4, 99]),
        grace_tokens=st.sampled_from([0, 7]),
        shield=st.sampled_from([True, True, False]),
        tidy=st.sampled_from([2, 1024]),
        most=st.sampled_from([None, None, 1, 2]),
    )
    def start(
        self,
        data,
        tpp,
        reaches,
        grains,
        order,
        balanced,
        aligned,
        state_cost,
        grace_tokens,
        shield,
        tidy,
        most,
    ):
        queues.MANY = tidy
        packings, states = data.draw(st.sampled_from(self.geometries)), self.states
        num_large = data.draw(st.sampled_from(self.sizes(packings)))
        plan = plan_of(packings, num_large)
        self.pool, self.tpp = PoolBytes(packings, num_large), tpp
        self.memory = Memory(self.pool)
        windows = len(packings) - 1 - states
        self.model = CacheModel(tpp, reaches[:windows], grains[:windows], states)
        self.groups, self.token_groups = self.model.groups, self.model.token_groups
        self.states_at = self.model.states_at
        self.allocator = ModelledAllocator(plan, order=order)
        self.allocator.model = self.model
        self.ages = self.allocator.ages = AgeModel(self.model, state_cost, grace_tokens, shield)
        self.balanced, self.aligned = balanced, aligned
        self.ages_known = not states  # tokens that no state lets hit age by a rule not modelled yet
        policies = [FullPolicy(), *map(WindowPolicy, self.model.reaches, self.model.grains)]
        policies += [StatePolicy()] * states
        self.trees = RadixTrees(
            policies,
            tpp,
            self.allocator,
            balanced=balanced,
            aligned=aligned,
            state_cost_tokens=state_cost,
            grace_tokens=grace_tokens,
            shield=shield,
            most_on_path=most,
        )
        self.running, self.past_keys, self.next_id = [], [], 0

    @staticmethod
    def sizes(packings):
        """Numbers of large pages to try: pools for a handful of requests."""
        raise NotImplementedError

    # ---- helpers --------------------------------------------------------------------------

    def draw_key(self, data):
        """A new key, or one that branches off an old one."""
        tail = self.draw_tokens(data, 6 * self.tpp)
        if not self.past_keys:
            return tail
        old = data.draw(st.sampled_from(self.past_keys[-6:]))
        half = old.size // 2
        cut = data.draw(st.sampled_from([old.size, old.size - 1, half, half - half % self.tpp, 0]))
        return np.concatenate([old[:cut], tail])

    def draw_tokens(self, data, most):
        """Between 1 and ``most`` tokens, mostly equal, so that keys share prefixes by chance."""
        length = data.draw(st.sampled_from(range(1, most + 1)))
        odd_one = data.draw(st.integers(0, most))
        return np.array([1 + (i == odd_one) for i in range(length)], dtype=np.int64)

    def draw_running(self, data):
        return self.running[data.draw(st.integers(0, len(self.running) - 1))]

    def draw_lengths(self, data, begin, end, *favoured):
        """Some page-aligned lengths of ``(begin, end]`` to keep states of; none without states."""
        lengths = range(begin - begin % self.tpp + self.tpp, end + 1, self.tpp)
        if self.states_at is None or not lengths:
            return []
        choices = [*(length for length in favoured if length in lengths), *lengths]
        return sorted(data.draw(st.sets(st.sampled_from(choices), max_size=3)))

    def assert_cached(self, namespace, key, node):
        """What a hit at ``node`` promises is there, to the byte."""
        for group_id in self.groups:
            if group_id == self.states_at:
                ids = {node.end: int(node.extents[group_id].ids[0])} if node.end else {}
            else:
                shown = self.trees.pages_to(node, group_id)
                assert shown.size * self.tpp == node.end <= key.size
                ids = {(page + 1) * self.tpp: int(i) for page, i in enumerate(shown)}
            for place in self.model.places_read(group_id, namespace, key, node.end):
                self.memory.assert_holds(group_id, ids[place.length], place)

    def assert_reads(self, request, length):
        """The token at ``length`` finds all it reads, and nobody may evict that."""
        used = self.small_pages_of(request) | self.model.split_by_lock()[0]
        for group_id in self.token_groups:
            for page in self.model.pages_read(group_id, length):
                small_id = int(request.pages[group_id][page])
                place = place_of(request.namespace, request.key, (page + 1) * self.tpp)
                self.memory.assert_holds(group_id, small_id, place)
                assert (group_id, small_id) in used, "needed, but evictable"

    def write(self, request, begin):
        """Write what the request has computed from token ``begin`` on."""
        for group_id in self.token_groups:
            for page in range(begin // self.tpp, len(request.pages[group_id])):
                place = place_of(request.namespace, request.key, (page + 1) * self.tpp)
                self.memory.write(group_id, int(request.pages[group_id][page]), place)
        for length, small_id in self.states_of(request):
            place = place_of(request.namespace, request.key, length)
            if length > begin:
                self.memory.write(self.states_at, small_id, place)

    def states_of(self, request):
        own = [(request.key.size, request.state)] if request.state else []
        return own + list(request.tracked.items())

    def small_pages_of(self, request):
        """What the request itself uses, as small pages ``(group, small_id)``."""
        found = {(self.states_at, small_id) for _, small_id in self.states_of(request)}
        for group_id in self.token_groups:
            own = request.pages[group_id][request.own_from(group_id) // self.tpp :]
            assert (own > 0).all()
            found |= {(group_id, small_id) for small_id in own.tolist()}
        return found

    def used(self):
        """What running requests use, each small page of one of them alone."""
        found = [self.small_pages_of(request) for request in self.running]
        together = set().union(*found)
        assert len(together) == sum(map(len, found))
        return together

    def match(self, namespace, key):
        """The longest hit is that of the model; every byte it promises must be there."""
        agreed, expected = self.model.agreed(namespace, key), self.model.hit(namespace, key)
        match = self.trees.match(namespace, key)
        assert (match.agreed, match.node.end) == (agreed, expected)
        self.ages.hit(namespace, key, expected)
        self.assert_cached(namespace, key, match.node)
        lengths = [agreed, *(miss.after for miss in match.misses)]
        assert lengths == [*(miss.before for miss in match.misses), expected]
        for miss in match.misses:
            begin, end = miss.lost
            lost = range(begin // self.tpp, -(-end // self.tpp))
            reads = self.model.places_read(miss.group_id, namespace, key, miss.before)
            absent = {place_of(namespace, key, (page + 1) * self.tpp) for page in lost}
            assert absent and absent <= set(reads)
            assert not absent & set(self.model.small_ids[miss.group_id])
        return match

    def lock(self, node, namespace, key, without=()):
        receipt = self.trees.lock(node, without=without)
        places = [
            set()
            if group_id in without
            else set(self.model.places_kept(group_id, namespace, key, node.end))
            for group_id in self.groups
        ]
        self.model.locks.append(places)
        return Held(receipt, places)

    def unlock(self, held):
        self.trees.unlock(held.receipt)
        self.model.locks = [places for places in self.model.locks if places is not held.places]

    def alloc(self, request_id, pages, states=0):
        """Small pages for one request, evicting if need be; None exactly if that cannot help.

        Returns per group an array: ``pages`` of each token group, ``states`` of the states.
        """
        need = [states if group_id == self.states_at else pages for group_id in self.groups]
        locked, cached = self.model.split_by_lock()
        in_use = [*self.used(), *locked]
        promised = self.allocator.fits_after_evicting(need)
        assert promised == self.pool.fits(need, in_use)
        assert self.allocator.fits_now(need) == self.pool.fits(need, in_use, cached)
        spare = self.allocator.fits_after_evicting(need, beside_shielded=True)
        assert spare == self.pool.fits(need, in_use, self.ages.shielded())
        missing = self.allocator.larges_missing
        while promised and missing(need) and self.evict_large(missing(need)):
            pass
        while promised and missing(need):
            wanted = self.allocator.smalls_to_spare_a_large(need)
            evicted = [self.evict_small(*short) for short in enumerate(wanted)]
            assert sum(evicted), "promised, and nothing to evict"
        got = self.allocator.alloc([request_id], [[count] for count in need])
        assert (got is not None) == promised
        return got

    # ---- eviction -------------------------------------------------------------------------

    def evict_small(self, group_id, count):
        """Those go whose turn it is, in other groups only what they take with them."""
        cached, before = self.allocator.num_cached[group_id], set(self.model.small_ids[group_id])
        victims = self.ages.next_victims(group_id, count)
        evicted = self.trees.evict_small(group_id, count)
        assert evicted == cached - self.allocator.num_cached[group_id] >= min(count, cached)
        if self.aligned and self.ages_known:
            assert set(victims) == before - set(self.model.small_ids[group_id])
        return evicted

    def evict_large(self, count):
        """Enough go if there are enough, among them the one whose turn it is."""
        before, idle = self.allocator.large.num_empty, self.idle_larges()
        enough = self.trees.evict_large(count)
        assert enough == (len(idle) >= count)
        assert self.allocator.large.num_empty >= before + min(count, len(idle))
        if idle and self.ages_known:
            gone = set(idle) - set(self.idle_larges())
            assert self.first_turn(idle) == self.first_turn({i: idle[i] for i in gone})
        return enough

    def first_turn(self, turns):
        return min((turn[1:] if self.balanced else turn) for turn in turns.values())

    def idle_larges(self):
        """Large pages that eviction could empty, by id: their group and when the last of their
        small pages has its turn."""
        place_by_page = {
            (group_id, small_id): place
            for group_id, small_ids in enumerate(self.model.small_ids)
            for place, small_id in small_ids.items()
        }
        locked, cached = self.model.split_by_lock()
        turns = {}
        for group_id, small_id in cached:
            large_id = small_id // self.pool.packings[group_id]
            time = self.ages.time(group_id, place_by_page[group_id, small_id])
            turns[large_id] = max(turns.get(large_id, (group_id, time)), (group_id, time))
        kept = {small_id // self.pool.packings[g] for g, small_id in [*self.used(), *locked]}
        return {large_id: turn for large_id, turn in turns.items() if large_id not in kept | {0}}

    # ---- what must always hold ------------------------------------------------------------

    @invariant()
    def bookkeeping_is_consistent(self):
        self.trees.check()
        self.allocator.check(self.trees.extents())

    @invariant()
    def running_requests_read_what_they_wrote(self):
        for request in self.running:
            self.assert_reads(request, request.key.size)
            for length, small_id in self.states_of(request):
                place = place_of(request.namespace, request.key, length)
                self.memory.assert_holds(self.states_at, small_id, place)

    @invariant()
    def the_trees_have_what_the_model_has(self):
        found = [{} for _ in self.groups]
        locked = set()
        for node in self.trees.nodes():
            key, above = [node.key], node.parent
            while above is not None:
                key.insert(0, above.key)
                above = above.parent
            key = np.concatenate(key)
            for group_id, extent in enumerate(node.extents):
                if extent is None:
                    continue
                last_only = group_id == self.states_at
                first = node.end if last_only else node.begin + self.tpp
                ends = range(first, node.end + 1, self.tpp)
                for end, small_id in zip(ends, extent.ids.tolist(), strict=True):
                    found[group_id][place_of(node.namespace, key, end)] = small_id
                    if extent.pinned:
                        locked.add((group_id, small_id))
        assert found == self.model.small_ids
        assert locked == self.model.split_by_lock()[0]

    @invariant()
    def every_byte_has_one_owner(self):
        used, (locked, cached) = self.used(), self.model.split_by_lock()
        empty, free = self.pool.capacity([*used, *locked, *cached])
        allocator = self.allocator
        assert allocator.large.num_empty == empty and allocator.large.free == free
        for group_id in self.groups:
            count = sum(group == group_id for group, _ in [*used, *locked])
            assert allocator.num_used[group_id] == count, "a small page that nobody owns"
            assert allocator.num_cached[group_id] == sum(group == group_id for group, _ in cached)

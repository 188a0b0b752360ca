"""Trees and allocator together, as SGLang drives them, against a fake memory of bytes.

A small page that is written holds the tokens it stands for, whole prefix and namespace included.
What a running request can still see, and what a hit promises, must read back exactly; two owners of
one byte or a stale hit show up as wrong content.
"""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_jenga.allocator import USED, Allocator
from sglang_jenga.radix.node import TokenPages
from sglang_jenga.radix.policy import FullPolicy, WindowPolicy
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import plan_of

FULL = 0
GEOMETRIES = [(1,), (1, 1), (3, 2), (2, 5), (1, 4), (4, 2, 1)]


class Memory:
    """The pool's bytes: each holds the content of the small page it was last written as."""

    def __init__(self, plan):
        self.sizes = [group.small_page_bytes for group in plan.groups]
        self.bytes = [None] * plan.pool_bytes

    def write(self, group_id, small_id, content):
        size = self.sizes[group_id]
        self.bytes[small_id * size : (small_id + 1) * size] = [(group_id, content)] * size

    def assert_holds(self, group_id, small_id, content):
        size = self.sizes[group_id]
        assert small_id > 0, "a hole where a page is needed"
        found = self.bytes[small_id * size : (small_id + 1) * size]
        assert found == [(group_id, content)] * size, f"group {group_id}, small page {small_id}"


class Request:
    """Tokens and pages of a running request; ``pages[g]`` holds 0 where there is none any more.

    The tree owns the pages before ``protected``; group g's pages before ``slid[g]`` are gone.
    """

    def __init__(self, request_id, namespace, key, pages, protected, lock):
        self.request_id, self.namespace, self.key, self.pages = request_id, namespace, key, pages
        self.protected, self.lock = protected, lock
        self.slid = [0] * len(pages)

    def own_from(self, group_id):
        return max(self.protected, self.slid[group_id])


class JengaMachine(RuleBasedStateMachine):
    @initialize(
        packings=st.sampled_from(GEOMETRIES),
        num_smalls=st.sampled_from([10, 20, 30, 40]),  # of the largest small pages
        tpp=st.sampled_from([1, 2, 4]),
        reaches=st.lists(st.integers(0, 9), min_size=2, max_size=2),
        order=st.sampled_from(["packed", "paper", "fullest"]),
        balanced=st.sampled_from([True, True, False]),
        aligned=st.sampled_from([True, True, False]),
    )
    def start(self, packings, num_smalls, tpp, reaches, order, balanced, aligned):
        plan = plan_of(packings, 2 + num_smalls // min(packings))
        self.tpp, self.reaches, self.groups = tpp, reaches, range(len(packings))
        self.allocator = Allocator(plan, order=order)
        self.memory = Memory(plan)
        policies = [FullPolicy(), *map(WindowPolicy, reaches)][: len(packings)]
        self.trees = RadixTrees(policies, tpp, self.allocator, balanced=balanced, aligned=aligned)
        self.running, self.past_keys, self.next_id = [], [], 0

    # ---- helpers --------------------------------------------------------------------------

    def content(self, namespace, key, page):
        return namespace, key[: (page + 1) * self.tpp].tobytes()

    def first_in_reach(self, group_id, length):
        """First position that the token at ``length`` reads."""
        return 0 if group_id == FULL else max(0, length - self.reaches[group_id - 1])

    def pages_in_reach(self, group_id, length):
        first = self.first_in_reach(group_id, length)
        return range(first // self.tpp, -(-length // self.tpp)) if first < length else range(0)

    def assert_reads(self, request, length):
        """The token at ``length`` finds all it reads, and nobody may evict that."""
        kept = [set() for _ in self.groups]
        for extent in self.trees.extents():
            if extent.pinned:
                kept[extent.group_id].update(extent.ids.tolist())
        for group_id in self.groups:
            for page in self.pages_in_reach(group_id, length):
                small_id = int(request.pages[group_id][page])
                content = self.content(request.namespace, request.key, page)
                self.memory.assert_holds(group_id, small_id, content)
                used = self.allocator._state[group_id][small_id] == USED
                assert used or small_id in kept[group_id], "needed, but evictable"

    def write(self, request, begin):
        """Write what the request has computed from token ``begin`` on."""
        for group_id in self.groups:
            for page in range(begin // self.tpp, len(request.pages[group_id])):
                content = self.content(request.namespace, request.key, page)
                self.memory.write(group_id, int(request.pages[group_id][page]), content)

    def draw_key(self, data):
        """A new key, or one that branches off an old one."""
        tail = self.draw_tokens(data, 6 * self.tpp)
        if not self.past_keys:
            return tail
        old = data.draw(st.sampled_from(self.past_keys[-6:]))
        cut = data.draw(st.sampled_from([old.size, old.size - 1, old.size // 2, 1, 0]))
        return np.concatenate([old[:cut], tail])

    def draw_tokens(self, data, most):
        """Between 1 and ``most`` tokens, mostly equal, so that keys share prefixes by chance."""
        length = data.draw(st.sampled_from(range(1, most + 1)))
        odd_one = data.draw(st.integers(0, most))
        return np.array([1 + (i == odd_one) for i in range(length)], dtype=np.int64)

    def draw_running(self, data):
        return self.running[data.draw(st.integers(0, len(self.running) - 1))]

    def match(self, namespace, key):
        """Longest hit; every byte it promises must be there."""
        node = self.trees.match(namespace, key).node
        for group_id in self.groups:
            pages = self.trees.pages_to(node, group_id)
            assert pages.size * self.tpp == node.end <= key.size
            for page in self.pages_in_reach(group_id, node.end):
                content = self.content(namespace, key, page)
                self.memory.assert_holds(group_id, int(pages[page]), content)
        return node

    def alloc(self, request_id, count):
        """Small pages for one request, evicting if need be; None exactly if that cannot help."""
        need = [count for _ in self.groups]
        promised = self.allocator.fits_after_evicting(need)
        missing = self.allocator.larges_missing
        while promised and missing(need) and self.trees.evict_large(missing(need)):
            pass
        while promised and missing(need):
            wanted = self.allocator.smalls_to_spare_a_large(need)
            evicted = [self.trees.evict_small(*short) for short in enumerate(wanted)]
            assert sum(evicted), "promised, and nothing to evict"
        got = self.allocator.alloc([request_id], [[count] for _ in self.groups])
        assert (got is not None) == promised
        return got

    # ---- rules ----------------------------------------------------------------------------

    @rule(data=st.data(), namespace=st.sampled_from([None, None, "x"]))
    def start_request(self, data, namespace):
        self.launch(data, namespace)

    def launch(self, data, namespace):
        key = self.draw_key(data)
        node = self.match(namespace, key[:-1])
        hit, lock = node.end, self.trees.lock(node)
        self.next_id += 1
        got = self.alloc(self.next_id, -(-key.size // self.tpp) - hit // self.tpp)
        if got is None:
            self.trees.unlock(lock)
            return None
        pages = [np.concatenate([self.trees.pages_to(node, g), got[g]]) for g in self.groups]
        request = Request(self.next_id, namespace, key, pages, hit, lock)
        self.assert_reads(request, hit)
        self.write(request, hit)
        self.running.append(request)
        self.past_keys.append(key)
        return request

    @rule(data=st.data(), namespace=st.sampled_from([None, None, "x"]))
    def serve_request(self, data, namespace):
        request = self.launch(data, namespace)
        if request is not None:
            self.insert(request)
            self.release(request)

    @precondition(lambda self: self.past_keys)
    @rule(data=st.data())
    def only_look(self, data):
        self.match(data.draw(st.sampled_from([None, "x"])), self.draw_key(data))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def decode(self, data):
        request = self.draw_running(data)
        more = self.draw_tokens(data, 3)
        size = request.key.size
        new_pages = -(-(size + more.size) // self.tpp) - len(request.pages[FULL])
        got = self.alloc(request.request_id, new_pages)
        if got is None:
            return
        request.key = np.concatenate([request.key, more])
        request.pages = [np.concatenate([request.pages[g], got[g]]) for g in self.groups]
        self.write(request, size)

    @precondition(lambda self: self.running and len(self.groups) > 1)
    @rule(data=st.data(), lag=st.integers(0, 4))
    def slide(self, data, lag):
        request = self.draw_running(data)
        for group_id in self.groups[1:]:
            seen_from = max(0, self.first_in_reach(group_id, request.key.size) - lag)
            dead_to = seen_from // self.tpp * self.tpp
            begin = request.own_from(group_id)
            if dead_to > begin:
                self.free_own(request, group_id, begin, dead_to)
                request.slid[group_id] = dead_to
            at = request.key.size - lag
            request.lock = self.trees.advance(request.lock, group_id, max(at, 0))

    def free_own(self, request, group_id, begin, end):
        pages = request.pages[group_id][begin // self.tpp : -(-end // self.tpp)]
        self.allocator.free(group_id, pages.copy())
        pages[:] = 0

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def checkpoint(self, data):
        self.insert(self.draw_running(data))

    def insert(self, request):
        """Offer the request's whole pages to the trees and go on from what the trees have."""
        end = request.key.size // self.tpp * self.tpp
        if end <= request.protected:
            return
        key, first = request.key[:end], request.protected // self.tpp
        begins = [request.own_from(group_id) for group_id in self.groups]
        offers = [
            TokenPages(begin, pages[begin // self.tpp : end // self.tpp])
            for begin, pages in zip(begins, request.pages, strict=True)
        ]
        start = request.lock.node
        assert start.end == request.protected
        outcome = self.trees.insert(start, request.namespace, key, offers)
        for group_id, parts in enumerate(outcome.declined):
            for ids in parts:
                self.allocator.free(group_id, ids)
        lock = self.trees.lock(outcome.node)
        self.trees.unlock(request.lock)
        request.lock, request.protected = lock, end
        for group_id in self.groups:
            shown = self.trees.pages_to(outcome.node, group_id)
            request.pages[group_id][first : shown.size] = shown[first:]
        alive = all(
            begins[group_id] <= self.first_in_reach(group_id, end) for group_id in self.groups[1:]
        )
        assert not alive or self.match(request.namespace, key).end == end

    @precondition(lambda self: self.running)
    @rule(data=st.data(), insert=st.sampled_from([True, True, False]))
    def end_request(self, data, insert):
        """Finish (with insert) or retract (without)."""
        request = self.draw_running(data)
        if insert:
            self.insert(request)
        self.release(request)

    def release(self, request):
        for group_id in self.groups:
            self.free_own(request, group_id, request.own_from(group_id), request.key.size)
        self.trees.unlock(request.lock)
        self.allocator.forget(request.request_id)
        self.running.remove(request)

    @precondition(lambda self: any(self.allocator.num_cached))
    @rule(count=st.integers(1, 6))
    def evict_large_pages(self, count):
        large = self.allocator.large
        before, idle = large.num_empty, large.num_idle
        assert self.trees.evict_large(count) == (idle >= count)
        assert large.num_empty >= before + min(count, idle)

    @precondition(lambda self: any(self.allocator.num_cached))
    @rule(data=st.data(), count=st.integers(1, 6))
    def evict_small_pages(self, data, count):
        group_id = data.draw(st.sampled_from(self.groups))
        cached = self.allocator.num_cached[group_id]
        evicted = self.trees.evict_small(group_id, count)
        assert evicted == cached - self.allocator.num_cached[group_id]
        assert evicted >= min(count, cached)
        assert evicted == min(count, cached) or group_id == FULL, "only full takes others with it"

    @precondition(lambda self: not self.running and len(self.past_keys) > 9)
    @rule()
    def flush(self):
        self.trees.clear()
        assert not self.trees.root.children
        assert self.allocator.num_used == self.allocator.num_cached == [0 for _ in self.groups]

    # ---- what must always hold ------------------------------------------------------------

    @invariant()
    def bookkeeping_is_consistent(self):
        self.trees.check()
        self.allocator.check(self.trees.extents())

    @invariant()
    def running_requests_read_what_they_wrote(self):
        for request in self.running:
            self.assert_reads(request, request.key.size)

    @invariant()
    def every_small_page_has_one_owner(self):
        for group_id in self.groups:
            owned = [extent.ids for extent in self.trees.extents() if extent.group_id == group_id]
            for request in self.running:
                owned.append(request.pages[group_id][request.own_from(group_id) // self.tpp :])
            ids = np.concatenate(owned) if owned else np.zeros(0, dtype=np.int64)
            assert np.unique(ids).size == ids.size
            assert (self.allocator._state[group_id][ids] > 0).all()
            held = self.allocator.num_used[group_id] + self.allocator.num_cached[group_id]
            assert held == ids.size, "a small page that nobody owns"

    def teardown(self):
        if hasattr(self, "running"):
            for request in list(self.running):
                self.release(request)
            self.flush()
            assert self.allocator.large.num_empty == self.allocator.plan.num_large - 1


TestJengaMachine = JengaMachine.TestCase

"""What requests do to trees and allocator, as SGLang drives them: the rules of the state machine.

They start on a hit, decode, slide, leave states behind, are cached on the way, finish or are
retracted, and evictions come at any time. `tests.models.radix_rig` says what must hold all along.
Subclasses name the geometries.
"""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sglang_jenga.radix.node import TokenPages
from tests.models.cache_model import FULL, place_of
from tests.models.radix_rig import Held, Request, Rig

NAMESPACES = st.sampled_from([None, None, None, "x"])


class JengaMachine(Rig):
    # ---- requests -------------------------------------------------------------------------

    @rule(data=st.data(), namespace=NAMESPACES)
    def start_request(self, data, namespace):
        self.launch(data, namespace, self.draw_key(data))

    def launch(self, data, namespace, key):
        match = self.match(namespace, key[:-1])
        node, hit = match.node, match.node.end
        held = self.lock(node, namespace, key)
        lengths = self.draw_lengths(data, hit, key.size, match.agreed)
        self.next_id += 1
        got = self.alloc(self.next_id, -(-key.size // self.tpp) - hit // self.tpp, 1 + len(lengths))
        if got is None:
            self.unlock(held)
            return None
        pages = [np.concatenate([self.trees.pages_to(node, g), got[g]]) for g in self.token_groups]
        request = Request(self.next_id, namespace, key, pages, hit, held)
        if self.states_at is not None:
            request.state, *tracked = got[self.states_at].tolist()
            request.tracked = dict(zip(lengths, tracked, strict=True))
            self.assert_cached(namespace, key, node)  # whence its own state is copied
        self.assert_reads(request, hit)
        self.write(request, hit)
        self.running.append(request)
        self.past_keys.append(key)
        return request

    @rule(data=st.data(), namespace=NAMESPACES, turns=st.integers(1, 3))
    def serve_chat(self, data, namespace, turns):
        """Requests one after the other, each going on from the one before."""
        key = self.draw_key(data)
        for _ in range(turns):
            request = self.launch(data, namespace, key)
            if request is None:
                break
            self.insert(data, request, leaves=True)
            self.release(request)
            key = np.concatenate([key, self.draw_tokens(data, 2 * self.tpp)])

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
        lengths = self.draw_lengths(data, size, size + more.size)
        got = self.alloc(request.request_id, new_pages, len(lengths))
        if got is None:
            return
        request.key = np.concatenate([request.key, more])
        request.pages = [np.concatenate([request.pages[g], got[g]]) for g in self.token_groups]
        if lengths:
            request.tracked |= zip(lengths, got[self.states_at].tolist(), strict=True)
        self.write(request, size)

    @precondition(lambda self: self.running and len(self.token_groups) > 1)
    @rule(data=st.data(), lag=st.integers(0, 4), exactly=st.booleans())
    def slide(self, data, lag, exactly):
        request = self.draw_running(data)
        at = max(request.key.size - lag, 0)
        for group_id in self.token_groups[1:]:
            seen_from = max(0, self.model.first_read(group_id, request.key.size) - lag)
            dead_to = seen_from // self.tpp * self.tpp
            begin = request.own_from(group_id)
            if dead_to > begin:
                self.free_own(request, group_id, begin, dead_to)
                request.slid[group_id] = dead_to
            receipt = self.trees.advance(request.held.receipt, group_id, at, exactly=exactly)
            end = receipt.node.end
            kept = self.model.pages_read(group_id, max(at, end), kept=not exactly)
            request.held.places[group_id] &= {
                place_of(request.namespace, request.key, (page + 1) * self.tpp) for page in kept
            }
            request.held = Held(receipt, request.held.places)

    def free_own(self, request, group_id, begin, end):
        pages = request.pages[group_id][begin // self.tpp : -(-end // self.tpp)]
        self.allocator.free(group_id, pages.copy())
        pages[:] = 0

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def checkpoint(self, data):
        self.insert(data, self.draw_running(data), leaves=False)

    def insert(self, data, request, *, leaves):
        """Offer the request's whole pages to the trees and go on from what the trees have."""
        end = request.key.size // self.tpp * self.tpp
        if request.tracked and data.draw(st.booleans()):  # what lies behind could not be hit
            end = max(request.tracked)
        if end <= request.protected:
            return
        key, first = request.key[:end], request.protected // self.tpp
        offers = [self.offer_tokens(request, group_id, end) for group_id in self.token_groups]
        if self.states_at is not None:
            # Before the tree is walked: making room for a copy may change it.
            offers.append(self.offer_states(data, request, end, leaves))
        known = self.model.agreed(request.namespace, key)
        taken = [
            self.model.insert(group_id, self.places_offered(request.namespace, key, offer))
            for group_id, offer in enumerate(offers)
        ]
        forks = self.draw_forks(data, offers)
        self.ages.insert(request.namespace, key, [adopted for adopted, _ in taken], known, forks)
        start = request.held.receipt.node
        assert start.end == request.protected
        lent = key.copy()
        outcome = self.trees.insert(start, request.namespace, lent, offers, forks=forks)
        for group_id, parts in enumerate(outcome.declined):
            assert [small_id for ids in parts for small_id in ids.tolist()] == taken[group_id][1]
            for ids in parts:
                self.allocator.free(group_id, ids)
        for array in (lent, *(offers[group_id].ids for group_id in self.token_groups)):
            array.fill(-1)  # it is the request's again
        without = () if self.states_at is None else data.draw(st.sampled_from(self.unlockable()))
        held = self.lock(outcome.node, request.namespace, key, without)
        self.unlock(request.held)
        request.held, request.protected = held, end
        for group_id in self.token_groups:
            shown = self.trees.pages_to(outcome.node, group_id)
            request.pages[group_id][first : shown.size] = shown[first:]
        self.match(request.namespace, key)

    def draw_forks(self, data, offers):
        """One of the lengths that states are offered of, or none."""
        if self.states_at is None:
            return ()
        lengths = sorted(offers[self.states_at])
        return data.draw(st.sampled_from([(), *((length,) for length in lengths)]))

    def unlockable(self):
        """A request that goes on has a state of its own, so it need not lock the cached one."""
        return [(self.states_at,), (self.states_at,), ()]

    def offer_tokens(self, request, group_id, end):
        begin = request.own_from(group_id)
        pages = request.pages[group_id]
        return TokenPages(begin, pages[begin // self.tpp : end // self.tpp].copy())

    def offer_states(self, data, request, end, leaves):
        """States of lengths up to ``end``: tracked ones, and its own, or a copy if it goes on."""
        offer = {length: i for length, i in request.tracked.items() if length <= end}
        if end == request.key.size and end not in offer and data.draw(st.integers(0, 2)):
            if leaves:
                offer[end], request.state = request.state, 0
            elif (got := self.alloc(request.request_id, 0, 1)) is not None:
                offer[end] = int(got[self.states_at][0])
                place = place_of(request.namespace, request.key, end)
                self.memory.write(self.states_at, offer[end], place)
        for length in offer:
            request.tracked.pop(length, None)
        return offer

    def places_offered(self, namespace, key, offer):
        if isinstance(offer, TokenPages):
            ends = range(offer.begin + self.tpp, key.size + 1, self.tpp)
            offer = dict(zip(ends, offer.ids.tolist(), strict=True))
        return {place_of(namespace, key, length): i for length, i in offer.items()}

    @precondition(lambda self: self.running)
    @rule(data=st.data(), insert=st.sampled_from([True, True, False]))
    def end_request(self, data, insert):
        """Finish (with insert) or retract (without)."""
        request = self.draw_running(data)
        if insert:
            self.insert(data, request, leaves=True)
        self.release(request)

    def release(self, request):
        for group_id in self.token_groups:
            self.free_own(request, group_id, request.own_from(group_id), request.key.size)
        states = np.array([small_id for _, small_id in self.states_of(request)], dtype=np.int64)
        if states.size:
            self.allocator.free(self.states_at, states)
        self.unlock(request.held)
        self.allocator.forget(request.request_id)
        self.running.remove(request)

    # ---- the cache ------------------------------------------------------------------------

    @precondition(lambda self: any(self.allocator.num_cached))
    @rule(count=st.integers(1, 6))
    def evict_large_pages(self, count):
        self.evict_large(count)

    @precondition(lambda self: any(self.allocator.num_cached))
    @rule(data=st.data(), count=st.integers(1, 6))
    def evict_small_pages(self, data, count):
        self.evict_small(data.draw(st.sampled_from(self.groups)), count)

    @precondition(lambda self: self.states and self.allocator.num_cached[self.states_at] > 1)
    @rule(count=st.integers(1, 3))
    def evict_states(self, count):
        self.evict_small(self.states_at, count)

    @precondition(lambda self: not self.running and len(self.past_keys) > 9)
    @rule()
    def flush(self):
        self.trees.clear()
        assert not self.trees.root.children
        assert self.allocator.num_used == self.allocator.num_cached == [0 for _ in self.groups]

    def teardown(self):
        if hasattr(self, "running"):
            for request in list(self.running):
                self.release(request)
            self.flush()
            assert self.allocator.large.num_empty == self.allocator.plan.num_large - 1

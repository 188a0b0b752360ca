"""What requests with images do to trees and allocator, and what must hold, by flat dictionaries.

Two groups: full attention holds text, cross attention the images before it. `Owners` has no tree,
no node and no extent. It knows an image by all its tokens and by the images before it, and a text
by its images and the tokens that lead to it; what the trees take, hit, keep and evict, it derives.
"""

from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_jenga.layers.cross import CrossPolicy
from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix.node import TokenPages
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import plan_of
from tests.models.byte_model import Memory, PoolBytes

TEXT, IMAGE = 0, 1
# Tokens of images, all larger than those of text: lengths differ, three have a name in common, one
# of them is as long as another twice, and one parts from another inside.
IMAGES = ((90,) * 5, (91,) * 3, (92,) * 8, (91,) * 4, (91,) * 6, (92,) * 5 + (93,) * 3, (94, 95))


class Key(NamedTuple):
    images: tuple[tuple[int, ...], ...]
    text: tuple[int, ...]

    @property
    def tokens(self):
        return np.array([*chain(*self.images), *self.text], dtype=np.int64)

    @property
    def image_ends(self):
        return list(accumulate(map(len, self.images)))

    @property
    def border(self):
        return sum(map(len, self.images))

    def places(self):
        """Group and place of each token."""
        found = [
            (IMAGE, (self.images[:count], at))
            for count, image in enumerate(self.images, 1)
            for at in range(len(image))
        ]
        return found + [
            (TEXT, (self.images, self.text[:end])) for end in range(1, len(self.text) + 1)
        ]


class Owners:
    """``cached[place]``: the small page of each place; ``locks``: the places that requests need."""

    def __init__(self):
        self.cached = {}
        self.locks = []

    def reach(self, key):
        """How many of the key's tokens the trees can have: of what follows the same images and
        begins alike, an image or a text, they keep the first."""
        length = 0
        for count, part in enumerate((*key.images, *([None] if key.text else []))):
            before, first = key.images[:count], (key.text if part is None else part)[0]
            images = {
                images[-1]
                for group, (images, _) in self.cached
                if group == IMAGE and images[:-1] == before and images[-1][0] == first
            }
            texts = {
                None
                for group, (images, text) in self.cached
                if group == TEXT and images == before and text[0] == first
            }
            if not images | texts <= {part}:
                return length
            length += len(part or key.text)
        return length

    def hit(self, key):
        """Places of the longest hit: the first images, each as a whole, and the text behind all."""
        found = []
        for place in key.places()[: self.reach(key)]:
            if place not in self.cached:
                break
            found.append(place)
        whole = len(found) >= key.border or len(found) in [0, *key.image_ends]
        assert whole, "the trees have a part of an image"
        return found

    def locked(self):
        return set().union(*self.locks)

    def insert(self, key, ids):
        """The request's own pages, by place; returns those that the trees decline."""
        places = set(key.places()[: self.reach(key)])
        offered = {place: page for place, page in ids.items() if place in places}
        declined = [(place, page) for place, page in offered.items() if place in self.cached]
        self.cached = {**offered, **self.cached}
        return declined

    def evict(self, group_id, small_ids):
        gone = {
            place
            for place, page in self.cached.items()
            if place[0] == group_id and page in small_ids
        }
        assert len(gone) == len(small_ids) and not gone & self.locked(), "evicted under a lock"
        if group_id == IMAGE:
            (images,) = {place[0] for _, place in gone}
            assert len(gone) == len(images[-1]), "a part of an image is evicted"
        for place in gone:
            del self.cached[place]

    def check(self):
        """Nothing is cached that nothing could hit."""
        for group_id, (images, text) in self.cached:
            before = images if group_id == TEXT else images[:-1]
            for count, image in enumerate(before, 1):
                places = [(IMAGE, (images[:count], at)) for at in range(len(image))]
                assert self.cached.keys() >= set(places)
            if group_id == TEXT:
                assert len(text) == 1 or (TEXT, (images, text[:-1])) in self.cached


class TellingAllocator(Allocator):
    owners: Owners

    def evict(self, extent):
        self.owners.evict(extent.group_id, set(extent.ids.tolist()))
        super().evict(extent)


class Request:
    """``pages``: the small page of each place; the trees own those of the first ``protected``."""

    def __init__(self, name, key, pages, protected, lock, places):
        self.name, self.key, self.pages = name, key, pages
        self.protected, self.lock, self.places = protected, lock, places

    @property
    def own(self):
        return dict(list(self.pages.items())[self.protected :])


class ImageMachine(RuleBasedStateMachine):
    @initialize(
        packings=st.sampled_from([(1, 1), (1, 4), (3, 2), (2, 5), (4, 1)]),
        order=st.sampled_from(["packed", "paper", "fullest"]),
        pages=st.sampled_from([20, 30, 60]),
        aligned=st.booleans(),
        balanced=st.booleans(),
    )
    def start(self, packings, order, pages, aligned, balanced):
        num_large = 2 + pages // min(packings)
        self.owners = Owners()
        self.allocator = TellingAllocator(plan_of(packings, num_large), order=order)
        self.allocator.owners = self.owners
        self.trees = RadixTrees(
            [FullPolicy(), CrossPolicy()], 1, self.allocator, aligned=aligned, balanced=balanced
        )
        self.pool = PoolBytes(packings, num_large)
        self.memory = Memory(self.pool)
        self.running, self.past, self.names = [], [Key((), (0,))], 0

    # ---- requests ---------------------------------------------------------------------------

    def draw_key(self, data):
        new = st.builds(
            Key,
            st.lists(st.sampled_from(IMAGES), max_size=3).map(tuple),
            st.lists(st.sampled_from([0, 1, 2, 2, 91]), min_size=1, max_size=9).map(tuple),
        )
        key = data.draw(st.one_of(new, st.sampled_from(self.past)))
        cut = data.draw(st.integers(1, len(key.text)))
        more = data.draw(st.lists(st.integers(0, 2), max_size=3).map(tuple))
        images = key.images[: data.draw(st.integers(0, len(key.images)))]
        last = data.draw(st.lists(st.sampled_from(IMAGES), max_size=1).map(tuple))
        return Key(data.draw(st.sampled_from([key.images, images + last])), key.text[:cut] + more)

    def match(self, key):
        expected = self.owners.hit(key)
        match = self.trees.match(None, key.tokens, key.image_ends)
        assert match.node.end == match.agreed == len(expected)
        for place in expected:
            self.memory.assert_holds(place[0], self.owners.cached[place], place)
        return match.node, expected

    @rule(data=st.data())
    def start_request(self, data):
        key = self.draw_key(data)
        node, hit = self.match(Key(key.images, key.text[:-1]))
        lock = self.trees.lock(node)
        self.owners.locks.append(set(hit))
        new = key.places()[len(hit) :]
        got = self.alloc(new)
        if got is None:
            self.unlock(lock, set(hit))
            return
        pages = {place: self.owners.cached[place] for place in hit} | got
        self.names += 1
        self.running.append(Request(self.names, key, pages, len(hit), lock, set(hit)))
        self.past.append(key)

    def alloc(self, places):
        """Small pages for these places, evicting if need be; None exactly if that cannot help."""
        need = [sum(group == place[0] for place in places) for group in (TEXT, IMAGE)]
        kept = [*self.used(), *self.small_pages(self.owners.locked())]
        cached = self.small_pages(set(self.owners.cached) - self.owners.locked())
        promised = self.allocator.fits_after_evicting(need)
        assert promised == self.pool.fits(need, kept)
        assert self.allocator.fits_now(need) == self.pool.fits(need, kept, cached)
        missing = self.allocator.larges_missing
        while promised and missing(need) and self.trees.evict_large(missing(need)):
            pass
        while promised and missing(need):
            wanted = self.allocator.smalls_to_spare_a_large(need)
            assert sum(self.trees.evict_small(*short) for short in enumerate(wanted))
        got = self.allocator.alloc(["anybody"], [[count] for count in need])
        assert (got is not None) == promised
        if got is None:
            return None
        ids = [iter(found.tolist()) for found in got]
        pages = {place: next(ids[place[0]]) for place in places}
        for place, page in pages.items():
            self.memory.write(place[0], page, place)
        return pages

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def decode(self, data):
        request = data.draw(st.sampled_from(self.running))
        key = Key(request.key.images, (*request.key.text, data.draw(st.integers(0, 2))))
        got = self.alloc(key.places()[-1:])
        if got is not None:
            request.key = key
            request.pages |= got

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def checkpoint(self, data):
        self.insert(data.draw(st.sampled_from(self.running)))

    def insert(self, request):
        key, own = request.key, request.own
        if not own:
            return
        border, places = key.border, key.places()
        end = min(len(places), max(self.owners.reach(key), request.protected))
        offers = [
            TokenPages(max(request.protected, border), _ids(own, TEXT)),
            TokenPages(min(request.protected, border), _ids(own, IMAGE)),
        ]
        expected = self.owners.insert(key, own)
        outcome = self.trees.insert(request.lock.node, None, key.tokens, offers, key.image_ends)
        declined = [
            (group_id, page)
            for group_id, parts in enumerate(outcome.declined)
            for ids in parts
            for page in ids.tolist()
        ]
        assert outcome.node.end == end
        assert sorted(declined) == sorted((place[0], page) for place, page in expected)
        for group_id, page in declined:
            self.allocator.free(group_id, np.array([page]))
        lock, places = self.trees.lock(outcome.node), set(places[:end])
        self.owners.locks.append(places)
        self.unlock(request.lock, request.places)
        request.lock, request.places, request.protected = lock, places, end
        shown = [self.trees.pages_to(outcome.node, group_id) for group_id in (TEXT, IMAGE)]
        assert not (shown[TEXT] * shown[IMAGE]).any(), "a token with pages of both groups"
        both = (shown[TEXT] + shown[IMAGE]).tolist()
        request.pages |= dict(zip(key.places(), both, strict=False))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), insert=st.booleans())
    def end_request(self, data, insert):
        request = data.draw(st.sampled_from(self.running))
        if insert:
            self.insert(request)
        self.release(request)

    def release(self, request):
        for group_id in (TEXT, IMAGE):
            self.allocator.free(group_id, _ids(request.own, group_id))
        self.unlock(request.lock, request.places)
        self.running.remove(request)

    def unlock(self, lock, places):
        self.trees.unlock(lock)
        at = next(at for at, kept in enumerate(self.owners.locks) if kept == places)
        del self.owners.locks[at]

    # ---- the cache --------------------------------------------------------------------------

    @rule(data=st.data())
    def only_look(self, data):
        key = self.draw_key(data)
        self.match(key)
        # Whoever does not know where images end finds no less.
        assert self.trees.match(None, key.tokens, None).node.end >= len(self.owners.hit(key))

    @precondition(lambda self: any(self.allocator.num_cached))
    @rule(count=st.integers(1, 6))
    def evict_large_pages(self, count):
        before = self.allocator.large.num_empty
        if self.trees.evict_large(count):
            assert self.allocator.large.num_empty >= before + count

    @precondition(lambda self: any(self.allocator.num_cached))
    @rule(group_id=st.sampled_from([TEXT, IMAGE]), count=st.integers(1, 6))
    def evict_small_pages(self, group_id, count):
        cached = self.allocator.num_cached[group_id]
        assert self.trees.evict_small(group_id, count) >= min(count, cached)

    def teardown(self):
        if hasattr(self, "running"):
            for request in list(self.running):
                self.release(request)
            self.trees.clear()
            assert not self.owners.cached and not self.owners.locks
            assert self.allocator.large.num_empty == self.allocator.plan.num_large - 1

    # ---- what must always hold --------------------------------------------------------------

    def small_pages(self, places):
        return [(place[0], self.owners.cached[place]) for place in places]

    def used(self):
        return [(place[0], page) for one in self.running for place, page in one.own.items()]

    @invariant()
    def bookkeeping_is_consistent(self):
        self.trees.check()
        self.allocator.check(self.trees.extents())
        self.owners.check()

    @invariant()
    def requests_read_what_they_wrote(self):
        for request in self.running:
            for place, page in request.pages.items():
                self.memory.assert_holds(place[0], page, place)

    @invariant()
    def images_are_whole_and_the_trees_have_what_the_owners_have(self):
        found = {}
        for node in self.trees.nodes():
            images, text, above = (), (), node
            while above.parent is not None:
                tokens = tuple(above.key.tolist())
                if above.base == IMAGE:
                    assert tokens in IMAGES
                    images = (tokens, *images)
                else:
                    assert not images, "an image behind text"
                    text = tokens + text
                above = above.parent
            ids = node.extents[node.base].ids.tolist()
            if node.base == IMAGE:
                found |= {(IMAGE, (images, at)): page for at, page in enumerate(ids)}
                continue
            first = len(text) - len(ids)
            for at, page in enumerate(ids, first + 1):
                found[TEXT, (images, text[:at])] = page
        assert found == self.owners.cached

    @invariant()
    def every_byte_has_one_owner(self):
        held = [*self.used(), *self.small_pages(self.owners.cached)]
        empty, free = self.pool.capacity(held)
        assert (self.allocator.large.num_empty, self.allocator.large.free) == (empty, free)


def _ids(pages, group_id):
    return np.array([page for place, page in pages.items() if place[0] == group_id], dtype=np.int64)

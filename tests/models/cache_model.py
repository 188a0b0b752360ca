"""What the trees should have cached, as a flat dictionary: the reference for the radix trees.

No tree, no node, no extent: a place is a namespace and the tokens of a whole prefix. A token group
has one small page for the last tokens of a place, a state group one for the place itself. The model
is told what requests offer and which small ids were evicted; what the trees take, what they hit and
what they may evict, it derives.
"""

from typing import NamedTuple

TOKEN_BYTES = 8
FULL = 0


class Place(NamedTuple):
    namespace: str | None
    tokens: bytes

    @property
    def length(self):
        return len(self.tokens) // TOKEN_BYTES


def place_of(namespace, key, length):
    """The place of a prefix; of a key that is shorter, its last small page is not full."""
    return Place(namespace, key[:length].tobytes())


class CacheModel:
    """``small_ids[g]`` maps a place to what group g has cached for it.

    Groups are one full, a window of each of ``reaches``, and with ``states`` a last one of states.
    What a window reads is kept from a multiple of its ``grains`` on.
    """

    def __init__(self, tokens_per_page, reaches, grains, states):
        self.tpp, self.reaches, self.grains = tokens_per_page, reaches, grains
        self.states_at = 1 + len(reaches) if states else None
        self.groups = range(1 + len(reaches) + states)
        self.token_groups = range(1 + len(reaches))
        self.small_ids = [{} for _ in self.groups]
        self.locks = []  # per lock and group the places that it keeps

    # ---- what a prefix needs --------------------------------------------------------------

    def first_read(self, group_id, length):
        """First position that the token at ``length`` reads of a token group."""
        return 0 if group_id == FULL else max(0, length - self.reaches[group_id - 1])

    def first_kept(self, group_id, length):
        """The same of what a lock keeps, if anything is read at all."""
        first = self.first_read(group_id, length)
        grain = 1 if group_id == FULL or first == length else self.grains[group_id - 1]
        return first - first % max(self.tpp, grain - grain % self.tpp)

    def pages_read(self, group_id, length, *, kept=False):
        first = (self.first_kept if kept else self.first_read)(group_id, length)
        return range(first // self.tpp, -(-length // self.tpp)) if first < length else range(0)

    def places_read(self, group_id, namespace, key, length):
        """What a request that goes on from ``key[:length]``, whole small pages, reads."""
        return self._places(group_id, namespace, key, length, kept=False)

    def places_kept(self, group_id, namespace, key, length):
        """And what it locks, refreshes or leaves for others."""
        return self._places(group_id, namespace, key, length, kept=True)

    def _places(self, group_id, namespace, key, length, *, kept):
        if group_id == self.states_at:
            return [place_of(namespace, key, length)] if length else []
        pages = self.pages_read(group_id, length, kept=kept)
        return [place_of(namespace, key, (page + 1) * self.tpp) for page in pages]

    def agreed(self, namespace, key):
        """Length up to which the trees know the key at all."""
        length = 0
        while length + self.tpp <= key.size:
            if place_of(namespace, key, length + self.tpp) not in self.small_ids[FULL]:
                break
            length += self.tpp
        return length

    def accepts(self, group_id, namespace, key, length):
        places = self.places_read(group_id, namespace, key, length)
        return all(place in self.small_ids[group_id] for place in places)

    def hit(self, namespace, key):
        """The longest prefix for which every group has what it needs."""
        length = self.agreed(namespace, key)
        while not all(self.accepts(group_id, namespace, key, length) for group_id in self.groups):
            length -= self.tpp
        return length

    # ---- changes --------------------------------------------------------------------------

    def insert(self, group_id, offered):
        """A request offers ``{place: small_id}``; returns the places that the trees take, and the
        ids that they must leave the request with, shortest first."""
        cached, taken, declined = self.small_ids[group_id], [], []
        for place, small_id in sorted(offered.items(), key=lambda item: item[0].length):
            if place in cached:
                declined.append(small_id)
            else:
                cached[place] = small_id
                taken.append(place)
        return taken, declined

    def evict(self, group_id, small_ids):
        """The trees give small pages up, which nobody may have locked; returns their places."""
        cached = self.small_ids[group_id]
        place_by_id = {small_id: place for place, small_id in cached.items()}
        places = [place_by_id[small_id] for small_id in small_ids]
        for place in places:
            assert not self.is_locked(group_id, place), f"group {group_id}: evicted under a lock"
            del cached[place]
        return places

    def is_locked(self, group_id, place):
        return self.locks_on(group_id, place) > 0

    def locks_on(self, group_id, place):
        return sum(place in lock[group_id] for lock in self.locks)

    def split_by_lock(self):
        """All that is cached as small pages ``(group, small_id)``: locked ones, and the others."""
        locked, others = set(), set()
        for group_id in self.groups:
            kept = set().union(*(lock[group_id] for lock in self.locks))
            for place, small_id in self.small_ids[group_id].items():
                (locked if place in kept else others).add((group_id, small_id))
        return locked, others

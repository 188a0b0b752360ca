"""When each place was last of use, and so what the trees should evict next (paper section 5).

Told of hits and inserts only. A time is ``(rank, clock)``: what was demoted, because a hit went
past it or a longer state made it dispensable, has rank 0 and goes before everything else; what is
shielded has rank 2 and goes after everything else.
"""

from tests.models.cache_model import FULL, TOKEN_BYTES, place_of

DEMOTED, OF_USE, SHIELDED = 0, 1, 2


class AgeModel:
    """``used[g]`` maps places to their time; a request that passes one of ``resume_point[g]``
    refreshes it.

    ``state_cost``: tokens that a state must save to keep its place before a longer one.
    ``grace_tokens``: tokens before those read at a key's end that are as young as the end.
    """

    def __init__(self, model, state_cost, grace_tokens, shield):
        self._model, self._state_cost, self._grace_tokens, self._shield = (
            model,
            state_cost,
            grace_tokens,
            shield,
        )
        self._clock = 0
        self.used = [{} for _ in model.groups]
        self.resume_point = [set() for _ in model.groups]
        self.forks = set()  # places where requests have parted

    # ---- what happens ---------------------------------------------------------------------

    def hit(self, namespace, key, length):
        if length:
            self._clock += 1
            self._touch(namespace, key, length, hit=True)

    def insert(self, namespace, key, adopted, known, forks):
        """``adopted[g]``: places, shortest first, that the trees took; they had ``known`` tokens
        of the key before, and the request is known to part from others after ``forks`` tokens."""
        self._clock += 1
        states = self._model.states_at
        for group_id, places in enumerate(adopted):
            self.used[group_id] |= dict.fromkeys(places, self._now)
        if states is not None:
            self.resume_point[states] |= {
                place
                for place in adopted[states]
                if place.length <= known and place.length in forks
            }
        parted = place_of(namespace, key, known)
        if 0 < known < key.size and self._parts(parted):
            self.forks.add(parted)
            if states is not None:
                self.resume_point[states].add(parted)
        self._touch(namespace, key, key.size, hit=False)
        self._settle(namespace, key)
        for place in adopted[states] if states is not None else ():
            self._thin(namespace, key, place.length)

    def evict(self, group_id, place):
        if group_id == FULL:  # nobody can come this way any more
            for used, resume_point in zip(self.used, self.resume_point, strict=True):
                used.pop(place, None)
                resume_point.discard(place)
            self.forks.discard(place)

    # ---- what follows ---------------------------------------------------------------------

    def time(self, group_id, place):
        """When a place was last of use to a group; a state where requests part, to any request."""
        if self.is_shielded(group_id, place):
            return SHIELDED, self.used[group_id][place][1]
        if group_id == self._model.states_at and self._parts(place):
            return max(self.used[group_id][place], self.used[FULL][place])
        return self.used[group_id][place]

    def is_shielded(self, group_id, place):
        """Whether the place is a few bytes of a window that decide about full pages in use, or a
        state that saves those who run on it more tokens than would fit in its bytes twice."""
        model = self._model
        users = model.locks_on(FULL, place)
        if group_id == model.states_at:
            enough = 0 < 2 * self._state_cost <= users * place.length
        else:
            enough = users > 0
        return (
            self._shield
            and group_id != FULL
            and place in model.small_ids[group_id]
            and place in self.resume_point[group_id]
            and enough
            and not model.is_locked(group_id, place)
        )

    def shielded(self):
        """All that is shielded, as small pages ``(group, small_id)``."""
        return {
            (group_id, small_id)
            for group_id, small_ids in enumerate(self._model.small_ids)
            for place, small_id in small_ids.items()
            if self.is_shielded(group_id, place)
        }

    def next_victims(self, group_id, count):
        """Of what is cached and not locked the oldest, of equally old ones the longest."""
        free = [
            place
            for place in self._model.small_ids[group_id]
            if not self._model.is_locked(group_id, place)
        ]
        free.sort(key=lambda place: (self.time(group_id, place), -place.length))
        return free[:count]

    @property
    def _now(self):
        return OF_USE, self._clock

    def _touch(self, namespace, key, length, *, hit):
        model = self._model
        read = [set(model.places_kept(g, namespace, key, length)) for g in model.groups]
        for end in range(model.tpp, length + 1, model.tpp):
            place = place_of(namespace, key, end)
            for group_id, used in enumerate(self.used):
                if place in read[group_id] or place in self.resume_point[group_id]:
                    used[place] = self._now
                elif hit and group_id != model.states_at and used.get(place, (0, 0))[0]:
                    used[place] = DEMOTED, self._clock

    def _settle(self, namespace, key):
        """What is read at the key's end and where others part stays, and so does what comes shortly
        before its end; the rest goes first."""
        model = self._model
        path = {
            end: place_of(namespace, key, end) for end in range(model.tpp, key.size + 1, model.tpp)
        }
        ends = [end for end, place in path.items() if end == key.size or self._parts(place)]
        for group_id in model.token_groups[1:]:
            kept = {
                place for end in ends for place in model.places_kept(group_id, namespace, key, end)
            }
            last = model.places_kept(group_id, namespace, key, key.size)
            before = key.size - len(last) * model.tpp
            further = before - self._grace_tokens if last else before
            grace_tokens = {place for end, place in path.items() if further < end <= before}
            self.resume_point[group_id] -= set(path.values()) - kept
            self.resume_point[group_id] |= kept
            for place in path.values():
                if place in kept or (place in grace_tokens and place in self.used[group_id]):
                    self.used[group_id][place] = self._now
                elif self.used[group_id].get(place, (0, 0))[0]:
                    self.used[group_id][place] = DEMOTED, self._clock

    def _parts(self, place):
        """Whether more than one way goes on from a place, or did once."""
        if place in self.forks:
            return True
        longer = len(place.tokens) + self._model.tpp * TOKEN_BYTES
        known = self._model.small_ids[FULL]
        following = [
            other
            for other in known
            if len(other.tokens) == longer
            and other.namespace == place.namespace
            and other.tokens.startswith(place.tokens)
        ]
        return len(following) > 1

    def _thin(self, namespace, key, length):
        """A state of this length is new. The one before it goes first if nobody parts from the path
        between, and it saves fewer tokens than it is worth over the last one of use before."""
        group_id = self._model.states_at
        places = [place_of(namespace, key, end) for end in range(0, length, self._model.tpp)]
        cached = [place for place in places if place in self._model.small_ids[group_id]]
        if not cached:
            return
        last = cached.pop()
        between = places[places.index(last) :]
        if any(self._parts(place) or place in self.resume_point[group_id] for place in between):
            return
        of_use = [place.length for place in cached if self.used[group_id][place][0] == OF_USE]
        if last.length - max(of_use, default=0) < self._state_cost:
            self.used[group_id][last] = DEMOTED, self._clock

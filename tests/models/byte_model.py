"""Who owns each byte of a pool, by brute force: what allocator and trees are checked against.

Knows the sizes of small and large pages and nothing else. A small page is ``(group, small_id)``;
whoever asks says which of them are held, and everything (empty large pages, free small pages, what
would fit) is derived from the bytes under those.
"""

from itertools import chain

from tests.conftest import plan_of

NULL = "null"


class PoolBytes:
    """The bytes of ``plan_of(packings, num_large)``; those of the null pages are nobody's."""

    def __init__(self, packings, num_large):
        self.packings = packings
        self.size = plan_of(packings, num_large).pool_bytes
        self.large_bytes = self.size // num_large
        self.small_bytes = [self.large_bytes // k for k in packings]
        # Null pages of all groups start at byte 0 and lie in a large page of the finest group.
        self.null_group = packings.index(max(packings))
        finest = self.small_bytes[self.null_group]
        self.null_bytes = -(-max(self.small_bytes) // finest) * finest

    def span(self, small_page):
        group_id, small_id = small_page
        begin = small_id * self.small_bytes[group_id]
        assert small_id >= 0 and begin + self.small_bytes[group_id] <= self.size, small_page
        return slice(begin, begin + self.small_bytes[group_id])

    def owners(self, held):
        """Per byte None, NULL, or the small page that lies there; no byte may belong to two."""
        owner = [None] * self.size
        owner[: self.null_bytes] = [NULL] * self.null_bytes
        for small_page in held:
            span = self.span(small_page)
            taken = {before for before in owner[span] if before is not None}
            assert not taken, f"bytes of {small_page} already belong to {taken}"
            owner[span] = [small_page] * (span.stop - span.start)
        return owner

    def capacity(self, *held):
        """(empty large pages, free small pages per group) while these small pages are held."""
        owner = self.owners(chain(*held))
        empty, free = 0, [0] * len(self.packings)
        for begin in range(0, self.size, self.large_bytes):
            found = owner[begin : begin + self.large_bytes]
            groups = {self.null_group if item is NULL else item[0] for item in found if item}
            assert len(groups) <= 1, f"large page of several groups: {groups}"
            if not groups:
                empty += 1
                continue
            group_id = groups.pop()
            free[group_id] += found.count(None) // self.small_bytes[group_id]
        return empty, free

    def fits(self, need, *held):
        """Whether ``need[g]`` more small pages of each group could be handed out beside these."""
        empty, free = self.capacity(*held)
        for wanted, have, k in zip(need, free, self.packings, strict=True):
            while wanted > have:
                empty, have = empty - 1, have + k
        return empty >= 0


class Memory:
    """The pool's bytes: each holds the content of the small page it was last written as."""

    def __init__(self, pool):
        self._pool = pool
        self._bytes = [None] * pool.size

    def write(self, group_id, small_id, content):
        span = self._pool.span((group_id, small_id))
        self._bytes[span] = [(group_id, content)] * (span.stop - span.start)

    def assert_holds(self, group_id, small_id, content):
        assert small_id > 0, "a hole where a small page is needed"
        found = self._bytes[self._pool.span((group_id, small_id))]
        assert found == [(group_id, content)] * len(found), f"group {group_id}, {small_id}"

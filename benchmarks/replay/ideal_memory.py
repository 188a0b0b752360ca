"""Ideal memory: a pool of bytes without pages, and what of all prefixes is in it.

Every byte is either needed by a running request or kept for later ones. Charged are

* each token of a node once in full layers, however many share it;
* of window layers the last ``window - 1`` tokens before each place that is resumed at and before
  each running request's next token: the union of them;
* a state per place that is resumed at and per running request.

Where requests may resume is known beforehand (`ideal_tree.py`): windows and states are kept at ends
of nodes that a request to come can go on from, and nowhere else. Ends are *wanted* that are the
deepest of a request to come, or that the last visitor has gone on from or would have, had they been
there; all others are a fallback that goes first of all.

What is kept goes by age (least recent first, at the visits of requests) or, if `ranks` says in what
order requests will be admitted, by next use (furthest first). Wanted ends of nodes that running
requests are on go when nothing else is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.replay.ideal_tree import Tree
from benchmarks.replay.ideal_windows import Windows
from sglang_jenga.plan.spec import LayerGroup

NEVER = 1 << 40
Key = tuple[bool, int, int, int, int]


class Costs(NamedTuple):
    """Bytes of a token in full layers, of one in window layers, of a state; a window's tokens
    before the current one, 0 without windows."""

    full: int
    window: int
    state: int
    reach: int

    @property
    def stride(self) -> int:
        """A decoding request's window moves on by so many tokens at a time, ahead of it."""
        return max(1, min(64, self.reach // 8))

    @property
    def have_ends(self) -> bool:
        """Whether a hit takes more than a prefix's full tokens."""
        return self.window > 0 or self.state > 0


def costs(groups: Sequence[LayerGroup]) -> Costs:
    """Raises ValueError for layer types that this memory has no rule for."""
    found: dict[str, LayerGroup] = {group.kind.name: group for group in groups}
    if set(found) - {"full", "window", "state"} or len(found) < len(groups) or "full" not in found:
        labels = ", ".join(group.label for group in groups)
        raise ValueError(f"bounds are for full layers and one kind of windows or states: {labels}")
    window, state = found.get("window"), found.get("state")
    return Costs(
        found["full"].entry_bytes,
        window.entry_bytes if window else 0,
        state.entry_bytes if state else 0,
        (window.window or 1) - 1 if window else 0,
    )


class Policy(NamedTuple):
    """`shields`: wanted ends of nodes that running requests are on are not free to whoever is
    admitted. `keeps`: share of the pool that is not either, while others run. `ranks`: per request,
    when it will be admitted; None for eviction by age."""

    shields: bool = False
    keeps: float = 0.0
    ranks: Sequence[int] | None = None


class Memory:
    """What is kept and what is promised, in bytes. Requests and nodes go by their numbers."""

    def __init__(self, tree: Tree, cost: Costs, pool_bytes: float, policy: Policy) -> None:
        self._tree, self._cost, self._pool_bytes, self._policy = tree, cost, pool_bytes, policy
        count = len(tree)
        self._length = [end - begin for begin, end in zip(tree.begin, tree.end, strict=True)]
        self._have = [0] * count  # leading tokens that are there
        self._locks = [0] * count  # running requests on it
        self._last = [0] * count  # the visit that was the latest
        self._visit = 0
        self._ends: set[int] = set()  # nodes with a window or a state at their end
        self._shielded: set[int] = set()  # those of them that are promised
        self._passing = [0] * count  # requests to come that can resume at its end
        self._aiming = [0] * count  # those of them that can at no deeper one
        self._used = [False] * count  # the last visitor went on from its end, or missed it
        self._waiting = [True] * len(tree.paths)
        self._by_rank: list[int] = []
        self._uses: list[list[int]] = [[] for _ in range(count)]  # ranks of who passes, next last
        self._aims: list[list[int]] = [[] for _ in range(count)]  # and of who aims
        self._foresee()
        # Entries of the heap with another stamp are void: of ends, and of tokens.
        self._stamps = [[0] * count, [0] * count]
        self._heap: list[tuple[Key, int]] = []
        self._windows = Windows(tree, self._have)
        self._low: dict[int, int] = {}  # of running requests, where their charged window begins
        self._kept = 0
        self._promised_windows = Windows(tree, self._length)
        self._promised = 0

    def _foresee(self) -> None:
        tree, ranks = self._tree, self._policy.ranks
        for request, path in enumerate(tree.paths):
            for node in path[: tree.resumable[request]]:
                self._passing[node] += 1
            if tree.targets[request] >= 0:
                self._aiming[tree.targets[request]] += 1
        if ranks is None:
            return
        self._by_rank = sorted(range(len(ranks)), key=lambda request: ranks[request])
        for request in reversed(self._by_rank):
            for node in tree.paths[request][: tree.resumable[request]]:
                self._uses[node].append(ranks[request])
            if tree.targets[request] >= 0:
                self._aims[tree.targets[request]].append(ranks[request])

    @property
    def kept(self) -> int:
        return self._kept + self._windows.tokens * self._cost.window

    @property
    def promised(self) -> int:
        return self._promised + self._promised_windows.tokens * self._cost.window

    # ---- requests come and go -------------------------------------------------------------------

    def hit(self, request: int) -> int:
        """Tokens of its prompt that need not be computed."""
        tree, found = self._tree, 0
        most = tree.prompts[request] - 1
        for node in tree.paths[request]:
            reached = min(most, tree.begin[node] + self._have[node])
            if not self._cost.have_ends:
                found = reached
            elif node in self._ends and tree.end[node] <= most:
                found = tree.end[node]
            if reached < tree.end[node]:
                break
        return found

    def admit(self, request: int) -> int | None:
        """Promise it all that it will come to need. Returns its hit, None if that does not fit."""
        tree, cost, path = self._tree, self._cost, self._tree.paths[request]
        need = cost.state + sum(self._length[node] for node in path if not self._locks[node]) * (
            cost.full
        )
        low = tree.end[path[-1]] - cost.reach
        if cost.window:
            need += self._promised_windows.more(reversed(path), low) * cost.window
        room = self._pool_bytes
        if self.promised:
            room *= 1 - self._policy.keeps
        if self.promised + need > room:
            return None
        hit = self.hit(request)
        self._visit += 1
        self._waiting[request] = False
        self._promised += cost.state
        if cost.window:
            self._promised_windows.need(-1 - request, reversed(path), low)
        for node in path:
            if not self._locks[node]:
                self._promised += self._length[node] * cost.full
            self._locks[node] += 1
        for node in path[: tree.resumable[request]]:
            self._used[node] = tree.end[node] >= hit and self._last[node] > 0
            self._passing[node] -= 1
            if not self._passing[node]:
                self._drop_end(node)
        if tree.targets[request] >= 0:
            self._aiming[tree.targets[request]] -= 1
        for node in path:
            self._visited(node)
        return hit

    def computed(self, request: int, start: int, stop: int) -> None:
        """Tokens ``[start, stop)`` of its prompt are there."""
        self._store(request, start, stop)
        if stop == self._tree.prompts[request] and self._cost.window:
            self._low[request] = stop - self._cost.reach
            self.slide(request, stop)

    def slide(self, request: int, length: int) -> None:
        """It has `length` tokens and decodes on: of its prompt, the window before is needed."""
        if request not in self._low:
            return
        low = length + self._cost.stride - self._cost.reach
        self._windows.forget(-1 - request, self._of_prompt(request), self._low[request])
        if low < self._tree.prompts[request]:
            self._windows.need(-1 - request, self._of_prompt(request), low)
            self._low[request] = low
        else:
            del self._low[request]

    def _of_prompt(self, request: int) -> Iterator[int]:
        """Nodes with tokens of its prompt, the last one first."""
        tree = self._tree
        prompt = tree.prompts[request]
        return (node for node in reversed(tree.paths[request]) if tree.begin[node] < prompt)

    def finish(self, request: int) -> None:
        """It has ended: all its tokens stay until they are evicted."""
        tree, cost, path = self._tree, self._cost, self._tree.paths[request]
        if request in self._low:
            self._windows.forget(-1 - request, self._of_prompt(request), self._low.pop(request))
        self._store(request, tree.prompts[request], tree.end[path[-1]])
        self._promised -= cost.state
        low = tree.end[path[-1]] - cost.reach
        self._promised_windows.forget(-1 - request, reversed(path), low)
        self._visit += 1
        for node in path:
            self._locks[node] -= 1
            if not self._locks[node]:
                self._promised -= self._length[node] * cost.full
            self._visited(node)

    def _store(self, request: int, start: int, stop: int) -> None:
        tree = self._tree
        for node in tree.paths[request]:
            if tree.end[node] <= start:
                continue
            if tree.begin[node] >= stop:
                break
            have = min(stop, tree.end[node]) - tree.begin[node]
            if have > self._have[node]:
                self._set_have(node, have)
            if tree.end[node] <= stop:
                self._keep_end(node)
                self._push(node, end=True)

    # ---- what is kept ---------------------------------------------------------------------------

    def _set_have(self, node: int, have: int) -> None:
        self._kept += (have - self._have[node]) * self._cost.full
        self._have[node] = have
        self._windows.recount(node)

    def _upwards(self, node: int) -> Iterator[int]:
        while node >= 0:
            yield node
            node = self._tree.parent[node]

    def _keep_end(self, node: int) -> None:
        if not self._cost.have_ends or not self._passing[node] or node in self._ends:
            return
        self._ends.add(node)
        self._kept += self._cost.state
        if self._cost.window:
            low = self._tree.end[node] - self._cost.reach
            self._windows.need(node, self._upwards(node), low)
        self._shield(node)

    def _drop_end(self, node: int) -> None:
        if node not in self._ends:
            return
        self._ends.remove(node)
        self._kept -= self._cost.state
        low = self._tree.end[node] - self._cost.reach
        self._windows.forget(node, self._upwards(node), low)
        self._shield(node)

    def _is_wanted(self, node: int) -> bool:
        return self._aiming[node] > 0 or self._used[node]

    def _shield(self, node: int) -> None:
        """Promise its end, or no longer."""
        wanted = node in self._ends and self._locks[node] > 0 and self._is_wanted(node)
        if not self._policy.shields or wanted == (node in self._shielded):
            return
        low = self._tree.end[node] - self._cost.reach
        if wanted:
            self._shielded.add(node)
            self._promised += self._cost.state
            if self._cost.window:
                self._promised_windows.need(node, self._upwards(node), low)
        else:
            self._shielded.remove(node)
            self._promised -= self._cost.state
            self._promised_windows.forget(node, self._upwards(node), low)

    def _visited(self, node: int) -> None:
        """Who is on it, or who will come to it, has changed: its turn is another one."""
        self._last[node] = self._visit
        self._shield(node)
        self._push(node, end=False)
        self._push(node, end=True)

    # ---- who goes -------------------------------------------------------------------------------

    def evict(self, running_bytes: float) -> None:
        """Make room beside what running requests hold besides their prompts."""
        limit = self._pool_bytes - running_bytes
        spared = []
        while self.kept > limit and self._heap:
            (*_, is_full, node), stamp = heapq.heappop(self._heap)
            if stamp != self._stamps[is_full][node]:
                continue
            if is_full:
                self._trim(node, limit)
            elif not self._worth_dropping(node):
                spared.append(node)
        for node in spared:
            self._push(node, end=True)
        if self.kept > limit:
            for *_, node in sorted(self._key(node, end=True) for node in self._ends):
                if self.kept <= limit:
                    break
                self._worth_dropping(node)

    def _worth_dropping(self, node: int) -> bool:
        """Drop its end, unless others need every byte of it anyway."""
        before = self.kept
        self._drop_end(node)
        if self.kept < before:
            return True
        self._keep_end(node)
        return False

    def _trim(self, node: int, limit: float) -> None:
        """Take as many of its last tokens as must go; what follows it has gone before, and no hit
        ends at it any more."""
        self._drop_end(node)
        over = self.kept - limit
        if over > 0:
            tokens = min(self._have[node], -int(-over // self._cost.full))
            self._set_have(node, self._have[node] - tokens)
        self._push(node, end=False)

    def _push(self, node: int, *, end: bool) -> None:
        stamps = self._stamps[0 if end else 1]
        stamps[node] += 1
        evictable = node in self._ends if end else self._have[node] > 0
        if not evictable:
            return
        key = self._key(node, end=end)
        is_fallback = end and not key[0]
        if is_fallback or not self._locks[node]:
            heapq.heappush(self._heap, (key, stamps[node]))

    def _key(self, node: int, *, end: bool) -> Key:
        """The smallest goes first; of equals the deeper node, and its end before its tokens."""
        if self._policy.ranks is None:
            wanted = not end or self._is_wanted(node)
            age = self._last[node]
        else:
            aims = end and not self._used[node]
            following = self._next(self._aims[node] if aims else self._uses[node])
            wanted = following < NEVER
            age = -(following if wanted else self._next(self._uses[node]))
        return wanted, age, -self._tree.end[node], 0 if end else 1, node

    def _next(self, ranks: list[int]) -> int:
        while ranks and not self._waiting[self._by_rank[ranks[-1]]]:
            ranks.pop()
        return ranks[-1] if ranks else NEVER

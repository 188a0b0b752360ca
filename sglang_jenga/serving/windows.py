"""What sliding layers leave behind: unlocked, given back, and counted before it is.

A request holds pages of a sliding group of two kinds: those of its prefix, which the trees own and
it has locked, and its own. As it decodes, its window leaves both behind.

    of the prefix   unlocked, and evictable then
    its own         given back

Neither before memory is short (`slide`), nor of a request that has little to give; and what is
locked also where admission counts it (`growth`). Until then it costs nothing to leave them, and
when the request ends the trees get its own, so that a later branch may hit behind the window.

What is dead says the group's kind; SGLang's record of the request keeps how far it has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from sglang.srt.environ import envs

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.layers.window import CUTS
from sglang_jenga.plan.request_need import MOST_BEHIND_WINDOW
from sglang_jenga.radix.node import PathLock
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.groups import Cursor
from sglang_jenga.serving.pressure import Need, Pressure, Release

FEW_DUE = 64


_Span = tuple[int, int, int]
"""A row, and of its positions the first and the end."""


class _Group(NamedTuple):
    """A sliding group; ``cursor``: under which name SGLang keeps how far it has been given up.
    ``lock_interval``: tokens of a lock that are given up at once. ``sinks``: tokens, in whole small
    pages, that are never given up."""

    group_id: int
    kind: LayerKind
    cursor: Cursor
    lock_interval: int
    sinks: int


def _next_position(req: Any) -> int:
    """Of the token to be computed next, or a later one of a chunk about to be. A prompt in flight
    is as long as its chunks so far, while SGLang calls it as long as it will be."""
    return min(req.seqlen - 1, req.kv.kv_allocated_len)


def _reads_from(req: Any) -> int:
    """Position of the first token that a forward to come may compute. Where requests decode in a
    chunk their slots are taken last: the chunk has its memory by then, and has not run."""
    if req.decode_batch_idx < 1:
        return min(_next_position(req), req.prefix_len)
    return _next_position(req)


def _locked_from(req: Any, group: _Group) -> int | None:
    """First position of what a request has locked last of its prefix in a group, and will leave
    behind; None for nothing."""
    ranges = req.lock.ranges[group.group_id] if req.lock is not None else ()
    if not ranges:
        return None
    begin, end = ranges[-1]
    if begin < group.sinks:
        begin = group.sinks
    return begin if begin < end else None


class Windows:
    """The sliding groups of all running requests of one server.

    ``keep``: own pages behind a window stay until memory is short; else they go at once.
    ``shared``: the trees get what requests leave, so what a hit at a request's last whole page
    reads stays as well.
    """

    def __init__(self, allocator: Any, trees: RadixTrees, *, keep: bool, shared: bool) -> None:
        self._trees, self._allocator = trees, allocator
        self._page_size = allocator.page_size
        self._keep, self._shared = keep, shared
        interval = envs.SGLANG_SWA_EVICTION_INTERVAL.get()
        self._interval = max(1, min(MOST_BEHIND_WINDOW, interval))
        groups = self._served = allocator.groups
        self._groups = [
            _Group(
                group_id,
                groups.kinds[group_id],
                groups.cursor(group_id),
                # Cutting what is locked costs more, and leaves nodes behind: a sixteenth of a long
                # window, which is no less than its grain. Less than a page cannot be cut.
                max(self._interval, groups.kinds[group_id].width // CUTS, self._page_size),
                groups.sinks[group_id],
            )
            for group_id in groups.mapped
        ]
        # Requests by the decode step from which on their lock can be cut, with the lock that is
        # meant; one entry per lock and group, at most twice as many as are still held, and a few.
        self._due: list[tuple[int, int, Any, PathLock, _Group]] = []
        self._most_due = FEW_DUE
        self._decode_steps = self._num_watched = 0
        self._slid = False  # in this round

    @property
    def num_due(self) -> int:
        """Locks that are remembered, some of them of requests that have left."""
        return len(self._due)

    def begin_round(self) -> None:
        """The scheduler is about to plan its next step: requests may have got further."""
        self._slid = False

    # ---- of the prefix ----------------------------------------------------------------------

    def leave(self, req: Any, pre_len: int, interval: int) -> None:
        """The token at ``pre_len`` and later ones cannot see all of a request's pages."""
        for group in self._groups:
            if not self._keep:
                self._allocator.free_behind(
                    group.group_id, self._leave_behind(req, group, pre_len, interval)
                )
            self._advance_lock(req, group, pre_len)

    def step(self) -> bool:
        """A decode step goes by; False if SGLang has to ask for each request that gets further.

        With pages kept there is nothing to do before memory is short.
        """
        self.begin_round()  # where no prompts are admitted, on a decode server, nobody else says so
        self._decode_steps += self._keep
        return self._keep

    def _unlock_due(self) -> None:
        """Unlock what windows have left behind of prefixes, where that is worth a call."""
        while self._due and self._due[0][0] <= self._decode_steps:
            _, _, req, lock, group = heappop(self._due)
            if req.lock is lock:  # else the request has left, or gone on with another lock
                self._advance_lock(req, group, _reads_from(req))
                if req.lock is lock:
                    self._watch(req, group)

    def watch(self, req: Any) -> None:
        """Note in which decode step a window will have left so much of the lock behind that it is
        worth a call. A request decodes one token a step, or waits, and is then looked at too early.
        """
        if self._keep:
            for group in self._groups:
                self._watch(req, group)

    def _watch(self, req: Any, group: _Group) -> None:
        begin = _locked_from(req, group)
        if begin is None:
            return
        if len(self._due) >= self._most_due:  # prompts that never decode leave theirs behind
            self._due = [entry for entry in self._due if entry[2].lock is entry[3]]
            heapify(self._due)
            self._most_due = 2 * len(self._due) + FEW_DUE
        behind = _dead_end(group.kind, _next_position(req)) - begin
        due = self._decode_steps + max(1, group.lock_interval - behind)
        self._num_watched += 1
        heappush(self._due, (due, self._num_watched, req, req.lock, group))

    def _advance_lock(
        self, req: Any, group: _Group, pre_len: int, *, exactly: bool = False
    ) -> None:
        """Unlock what of the prefix the window has left behind: the group's interval at a time, or
        ``exactly``."""
        begin = _locked_from(req, group)
        interval = 1 if exactly else group.lock_interval
        if begin is None or _dead_end(group.kind, pre_len) - begin < interval:
            return
        lock = self._trees.advance(req.lock, group.group_id, pre_len, exactly=exactly)
        if lock is not req.lock:  # else it is watched already
            req.lock = lock
            self.watch(req)

    # ---- of requests ------------------------------------------------------------------------

    def slide(self, reqs: Iterable[Any], *, exactly: bool) -> None:
        """Give back what the windows of decoding requests have left behind: to the last page, or
        (cheaper, and usually enough) where at least the interval has gathered. That is once a
        round: admission asks, then the decode step, and nobody gets further in between."""
        if not exactly:
            if self._slid:
                return
            self._slid = True
            self._unlock_due()
        interval = 1 if exactly else self._interval
        unlock = exactly or not self._keep  # else those that are watched have been
        groups = [(group, group.kind.dead, group.cursor) for group in self._groups]
        behind: dict[int, list[_Span]] = {group.group_id: [] for group in self._groups}
        for req in reqs:
            # As in SGLang: a request's last prefill may still be running at its first decode.
            kv = req.kv
            if not kv.holds_kv or req.decode_batch_idx < 1:
                continue
            pre_len = req.seqlen - 1
            for group, dead_of, cursor in groups:
                # Most have nothing to give; asked of all of them, that must cost nothing.
                dead = dead_of(pre_len)
                if dead is not None and dead[1] - interval >= kv.get_evicted_seqlen(cursor):
                    behind[group.group_id] += self._leave_behind(req, group, pre_len, interval)
                if unlock:
                    self._advance_lock(req, group, pre_len, exactly=exactly)
        for group_id, spans in behind.items():
            self._allocator.free_behind(group_id, spans)

    def slide_prompt(self, req: Any, *, exactly: bool) -> None:
        """Give back what the window has left behind of a prompt that comes in chunks, where the
        trees never get its pages; ``exactly``: also where they do not have them yet, since the
        prompt has reached no state that could be cached. The next forward overwrites them after the
        one in flight."""
        if not req.kv.holds_kv:
            return
        for group in self._groups:
            if exactly or not self._shared or req.skip_radix_cache_insert:
                self._allocator.free_behind(
                    group.group_id, self._leave_behind(req, group, req.prefix_len, 1)
                )
            if exactly:
                self._advance_lock(req, group, req.prefix_len, exactly=True)

    def _leave_behind(self, req: Any, group: _Group, pre_len: int, interval: int) -> list[_Span]:
        """A request leaves its own pages that are dead at ``pre_len``, if at least ``interval``
        tokens are. Its sinks stay, its own or the trees'. Returns what has to be freed now."""
        kv, size = req.kv, self._page_size
        if not kv.holds_kv:
            return []
        dead = group.kind.dead(pre_len)
        if dead is None or dead[1] < kv.get_evicted_seqlen(group.cursor) + interval:
            return []
        if self._shared:
            dead = group.kind.kept_behind(pre_len, size)
        begin = self._served.given_up(kv, group.group_id)[1]
        end = begin if dead is None else dead[1] - dead[1] % size
        self._served.give_up(kv, group.group_id, max(begin, end))
        return [(kv.req_pool_idx, begin, end)] if end > begin else []

    # ---- still to come ----------------------------------------------------------------------

    def growth(self, reqs: Iterable[Any], tokens_left: Callable[[Any], float]) -> list[float]:
        """Per sliding group the tokens, at most, that running requests come to hold beyond those of
        now.

        A request whose window is full gives one token back for each that it decodes, unless others
        hold that one as well: then the last of them does. Both sums are bounds, so is the lesser.
        """
        self._unlock_due()  # what is still locked counts
        left = [(req, tokens_left(req)) for req in reqs]
        return [self._growth(group, left) for group in self._groups]

    def _growth(self, group: _Group, left: Iterable[tuple[Any, float]]) -> float:
        alone = among = 0.0
        for req, tokens in left:
            unfilled = group.kind.growth(req.kv.kv_allocated_len, tokens)
            locked = 0
            for begin, end in () if req.lock is None else req.lock.ranges[group.group_id]:
                locked += end - begin
            alone += min(tokens, unfilled + locked)
            among += unfilled
        return min(alone, among + self._trees.num_shared[group.group_id])


def _dead_end(kind: LayerKind, length: int) -> int:
    dead = kind.dead(length)
    return 0 if dead is None else dead[1]


class BehindWindows(Release):
    """What running requests' windows have left behind."""

    def __init__(self, windows: Windows, pressure: Pressure, *, exactly: bool) -> None:
        self._windows, self._pressure, self._exactly = windows, pressure, exactly

    def free(self, until: Need) -> bool:
        self._windows.slide(self._pressure.decoding, exactly=self._exactly)
        if self._pressure.prompt_in_flight is not None:
            self._windows.slide_prompt(self._pressure.prompt_in_flight, exactly=self._exactly)
        return until.met

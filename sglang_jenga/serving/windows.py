"""What sliding windows leave behind: unlocked, given back, and counted before it is.

A request holds window pages of two kinds: those of its prefix, which the trees own and it has
locked, and its own. As it decodes, its window leaves both behind.

    of the prefix   unlocked every so many tokens, and evictable then
    its own         stay until memory is short (`slide`), or the request ends and the trees get
                    them: a later branch may hit behind the window
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.common import free_swa_out_of_window_slots
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_jenga.plan.request_need import MOST_BEHIND_WINDOW
from sglang_jenga.radix.node import PathLock
from sglang_jenga.radix.policy import Prefix
from sglang_jenga.serving.allocator import WINDOW

FEW_DUE = 64


def _next_position(req: Any) -> int:
    """Of the token to be computed next. A prompt in flight is as long as its chunks so far, while
    SGLang calls it as long as it will be."""
    return min(req.seqlen - 1, req.kv.kv_allocated_len)


def _locked_from(req: Any) -> int | None:
    """First position of what a request has locked of its prefix's windows, if there is any."""
    ranges = req.lock.ranges[WINDOW] if req.lock is not None else ()
    return ranges[-1][0] if ranges and ranges[-1][0] < ranges[-1][1] else None


class Windows:
    """The windows of all running requests of one `JengaRadixCache`.

    ``keep``: own pages behind a window stay until memory is short; else they go at once.
    """

    def __init__(self, cache: Any, *, keep: bool) -> None:
        self._cache = cache
        self._trees, self._allocator = cache.trees, cache.allocator
        self._size = cache.sliding_window_size  # tokens that a token sees before itself
        self._keep = keep
        interval = envs.SGLANG_SWA_EVICTION_INTERVAL.get()
        self._interval = max(1, min(MOST_BEHIND_WINDOW, interval))
        # Cutting what is locked costs more, and leaves nodes behind: a sixteenth of a long window.
        # Less than a page cannot be cut.
        self._lock_interval = max(self._interval, self._size // 16, cache.page_size)
        # Requests by the decode step in which their lock can be cut, with the lock that is meant;
        # one entry per lock, and at most twice as many as there are locks still held, and a few.
        self._due: list[tuple[int, int, Any, PathLock]] = []
        self._most_due = FEW_DUE
        self._decode_steps = self._num_watched = 0

    @property
    def num_due(self) -> int:
        """Locks that are remembered, some of them of requests that have left."""
        return len(self._due)

    # ---- of the prefix ----------------------------------------------------------------------

    def leave(self, req: Any, pre_len: int, interval: int) -> None:
        """The token at ``pre_len`` and later ones cannot see all of a request's pages."""
        if not self._keep:
            self._free_behind(req, pre_len, interval)
        self._advance_lock(req, pre_len, self._lock_interval)

    def step(self) -> bool:
        """`leave` of a whole decode step; False if SGLang has to ask for each request.

        With pages kept there is only what requests have locked of their prefixes, and most steps
        find nothing there: SGLang would ask for every request whose window has moved at all.
        """
        if not self._keep:
            return False
        self._decode_steps += 1
        while self._due and self._due[0][0] <= self._decode_steps:
            _, _, req, lock = heappop(self._due)
            if req.lock is lock:  # else the request has left, or gone on with another lock
                self._advance_lock(req, _next_position(req), self._lock_interval)
                if req.lock is lock:
                    self.watch(req)
        return True

    def watch(self, req: Any) -> None:
        """Note in which decode step the window will have left so much of the lock behind that it is
        worth a call. A request decodes one token a step, or waits, and is then looked at too early.
        """
        begin = _locked_from(req) if self._keep else None
        if begin is None:
            return
        if len(self._due) >= self._most_due:  # prompts that never decode leave theirs behind
            self._due = [entry for entry in self._due if entry[2].lock is entry[3]]
            heapify(self._due)
            self._most_due = 2 * len(self._due) + FEW_DUE
        behind = _next_position(req) - self._size - begin
        due = self._decode_steps + max(1, self._lock_interval - behind)
        self._num_watched += 1
        heappush(self._due, (due, self._num_watched, req, req.lock))

    def _advance_lock(self, req: Any, pre_len: int, interval: int) -> None:
        """Unlock what of the prefix the window has left behind, ``interval`` tokens at a time."""
        begin = _locked_from(req)
        if begin is None or pre_len - self._size - begin < interval:
            return
        lock = self._trees.advance(req.lock, WINDOW, pre_len)
        if lock is not req.lock:  # else it is watched already
            req.lock = lock
            self.watch(req)

    # ---- of requests ------------------------------------------------------------------------

    def slide(self, reqs: Iterable[Any], *, exactly: bool) -> None:
        """Give back what the windows of decoding requests have left behind: to the last page, or
        (cheaper, and usually enough) where at least the interval has gathered."""
        interval = 1 if exactly else self._interval
        reach = self._cache.swa_retain_window + interval
        for req in reqs:
            # As in SGLang: a request's last prefill may still be running at its first decode.
            if req.kv.holds_kv and req.decode_batch_idx >= 1:
                pre_len = req.seqlen - 1
                # Most have nothing to give; asked of all of them, that must cost nothing.
                if pre_len - reach >= req.kv.get_evicted_seqlen(ComponentType.SWA):
                    self._free_behind(req, pre_len, interval)
                self._advance_lock(req, pre_len, 1 if exactly else self._lock_interval)

    def slide_prompt(self, req: Any, *, exactly: bool) -> None:
        """Give back what the window has left behind of a prompt that comes in chunks, where the
        trees never get its pages; ``exactly``: also where they do not have them yet, since the
        prompt has reached no state that could be cached. The next forward overwrites them after the
        one in flight."""
        if not req.kv.holds_kv:
            return
        if exactly or self._cache.disable or req.skip_radix_cache_insert:
            self._free_behind(req, req.prefix_len, 1)
        if exactly:
            self._advance_lock(req, req.prefix_len, 1)

    def _free_behind(self, req: Any, pre_len: int, interval: int) -> None:
        row, page_size = req.kv.req_pool_idx, self._cache.page_size
        own_from = req.kv.swa_dead_lo(page_size)
        read = self._trees.policies[WINDOW].update_last_access(Prefix(pre_len))

        def free_segment(slots: torch.Tensor, *, start_pos: int) -> None:
            # The device's copy of the slots serves only to say how many.
            self._allocator.free_behind_window(row, start_pos, start_pos + slots.numel())

        free_swa_out_of_window_slots(
            req,
            pre_len,
            sliding_window_size=self._cache.swa_retain_window,
            page_size=page_size,
            req_to_token_pool=self._cache.req_to_token_pool,
            token_to_kv_pool_allocator=self._allocator,
            supports_prefix_sharing=self._cache.supports_prefix_sharing(),
            retain_floor=min((begin for begin, end in read if end > own_from), default=pre_len),
            free_segment=free_segment,
            eviction_interval=interval,
        )

    # ---- still to come ----------------------------------------------------------------------

    def growth(self, reqs: Iterable[Any], tokens_left: Callable[[Any], float]) -> float:
        """Window tokens, at most, that running requests come to hold beyond those of now.

        A request whose window is full gives one token back for each that it decodes, unless others
        hold that one as well: then the last of them does. Both sums are bounds, so is the lesser.
        """
        alone = among = 0.0
        for req in reqs:
            tokens, unfilled = tokens_left(req), max(0, self._size + 1 - req.kv.kv_allocated_len)
            locked = 0
            for begin, end in () if req.lock is None else req.lock.ranges[WINDOW]:
                locked += end - begin
            alone += min(tokens, unfilled + locked)
            among += min(tokens, unfilled)
        return min(alone, among + self._trees.num_shared[WINDOW])

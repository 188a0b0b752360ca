"""Which of a request's states the trees get, and when: SGLang's two strategies, for our cache.

    no_buffer     a request has one state, that of its last token. It is copied where a prompt's
                  chunk ends, and handed over when the request leaves. No step may run ahead.
    extra_buffer  forwards copy the state into a *tracking* slot where a chunk of a prompt ends and
                  every --mamba-track-interval tokens after; SGLang says which slot holds that of
                  which length. A tracking slot is handed over, and the request gets another one:
                  at once, or (``extra_buffer_lazy``) when it comes to an interval's end.

Knows requests and slots; what is done with a state is the trees' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sglang.srt.runtime_context import mamba_checkpoint_grid, mamba_track_grid

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix.node import Match, PrefixPages
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.serving.eviction import Eviction
from sglang_jenga.serving.pressure import Need, Pressure, Release

LEAST_BRANCH = 64
"""Tokens that a state at a branch point must save whoever hits it to be worth its bytes."""


class EndStates:
    """``no_buffer``. A prompt is cut where it parts from cached ones, to leave a state there;
    ``tokens_to_branch`` says how far behind the last match's hit that is, 0 for nowhere."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.tokens_to_branch = 0

    def cacheable(self, req: Any, length: int, *, finished: bool) -> int:
        """Length up to which the request's KV is worth caching: all of it."""
        return length

    def take(self, req: Any, length: int, *, finished: bool) -> PrefixPages:
        """The request's state after ``length`` tokens: its own if it leaves, else a copy.

        Nothing if the state has gone further, or if there is no room for the copy.
        """
        kv = req.kv
        if length != kv.kv_committed_len:
            return {}
        if finished:
            slot, kv.mamba_pool_idx = int(kv.mamba_pool_idx), None
            return {length: slot}
        slots = self._rows.mamba_allocator.alloc_to_cache()
        if slots is None:
            return {}
        self._rows.mamba_pool.copy_from(kv.mamba_pool_idx.view(1), slots)
        return {length: int(slots)}

    def num_releasable(self, reqs: Iterable[Any]) -> int:
        """None of these requests has a state that it can go on without."""
        return 0

    def release_tracking(self, reqs: Iterable[Any]) -> Iterator[None]:
        yield from ()

    def before_decode(self, reqs: Iterable[Any]) -> None:
        """A step is about to run; no state is tracked in it."""

    def before_extend(self, reqs: Iterable[Any]) -> None:
        """The same of a step with prompts in it: prompts are cut where they part."""

    def forks(self, req: Any, length: int) -> tuple[int, ...]:
        """Whether the state after ``length`` tokens is where the request parts from others: if
        others have gone on from there, for prompts are cut where they part."""
        return (length,)

    def branch(self, match: Match) -> int | None:
        """Note where the request matched last parts from what is cached; SGLang tracks nothing."""
        parted = match.agreed - match.node.end
        self.tokens_to_branch = parted if parted >= LEAST_BRANCH else 0
        return None


class TrackedStates:
    """``extra_buffer`` and ``extra_buffer_lazy``."""

    tokens_to_branch = 0  # SGLang tracks the state at a branch point in the middle of a forward

    def __init__(self, rows: Any, page_size: int) -> None:
        self._rows = rows
        self._page_size = page_size
        self._grid = mamba_checkpoint_grid(page_size)
        self._interval = mamba_track_grid(page_size)
        self._lazy = rows.enable_mamba_extra_buffer_lazy

    def cacheable(self, req: Any, length: int, *, finished: bool) -> int:
        """Length of the last tracked state: what lies behind it could not be hit. Of one that
        leaves without any, all: others learn from its tokens where they part."""
        tracked = self._tracked(req, length, finished)[0]
        learns = finished and not tracked and self._rows.tracking.least > 0
        return length if learns else tracked

    def take(self, req: Any, length: int, *, finished: bool) -> PrefixPages:
        """The tracking slot that holds the state after ``length`` tokens.

        A request that goes on gets another one; if there is no room, it keeps the one it has. In
        lazy mode one whose prompt has ended gets it when it comes to a track boundary.
        """
        kv = req.kv
        tracked, index = self._tracked(req, length, finished)
        if tracked != length:
            return {}
        slot = int(kv.mamba_ping_pong_track_buffer[index])
        if finished:
            kv.mamba_ping_pong_empty[index] = True
        elif self._lazy and req.extend_end >= len(req.full_untruncated_fill_ids):
            self._rows.track_nowhere(req, index)
        else:
            fresh = self._rows.mamba_allocator.alloc_to_cache()
            if fresh is None:
                return {}
            self._rows.set_mamba_ping_pong_slot(req, index, fresh[0])
            # As in SGLang: the state is the trees' now, a later request's to name.
            kv.mamba_last_track_seqlen = kv.mamba_prev_track_seqlen = None
        return {length: slot}

    def _tracked(self, req: Any, length: int, finished: bool) -> tuple[int, int]:
        """Length of the longest tracked state of at most ``length`` tokens, 0 if there is none, and
        its place in the request's buffer. Steps that ran ahead of a finished request may have
        tracked one behind its end; then the one before, which SGLang names too, is still there."""
        kv = req.kv
        if kv.mamba_ping_pong_track_buffer is None:
            return 0, 0
        last, index = kv.mamba_last_track_seqlen or 0, kv.mamba_last_track_idx
        if kv.mamba_ping_pong_empty[index] or last % self._page_size:
            # A chunk that decode steps had left less than a page to ends anywhere, and SGLang
            # counts from there: that state has no place in a tree of whole pages.
            return 0, 0
        if last <= length:
            return last, index
        before = kv.mamba_prev_track_seqlen
        if finished and before is not None and before <= length:
            return before, self._rows.get_mamba_ping_pong_other_idx(index)
        return 0, 0

    def before_decode(self, reqs: Iterable[Any]) -> None:
        """See to it that the coming step does not track over the latest tracked state.

        SGLang turns to a request's other place when a decode step's result comes in and the next
        step is at a track boundary. It does not where that result was a prompt's, or that of a step
        with prompts in it. If the request ends with the step at the next boundary in flight, the
        trees would get a state that is overwritten.
        """
        if self._lazy or self._rows.mamba_ping_pong_track_buffer_size < 2:
            return
        for req in reqs:
            kv = req.kv
            if (kv.kv_committed_len + 1) % self._interval:
                continue
            if kv.mamba_next_track_idx == kv.mamba_last_track_idx and kv.mamba_last_track_seqlen:
                other = self._rows.get_mamba_ping_pong_other_idx(kv.mamba_last_track_idx)
                kv.mamba_next_track_idx = other

    def before_extend(self, reqs: Iterable[Any]) -> None:
        """Move a branch point to the last place before it that SGLang tracks in the coming step: a
        whole number of the kernel's chunks behind the step's first token. A prompt that is computed
        in steps with others may begin one anywhere."""
        for req in reqs:
            branch, start = req.mamba_branching_seqlen, req.prefix_len
            if branch is not None and start < branch <= req.extend_end:
                req.mamba_branching_seqlen = branch - (branch - start) % self._grid

    def forks(self, req: Any, length: int) -> tuple[int, ...]:
        """The length at which the request parts from others, and is tracked for them."""
        branch: int | None = req.mamba_branching_seqlen
        return () if branch is None else (branch,)

    def num_releasable(self, reqs: Iterable[Any]) -> int:
        """States that `release_tracking` would give up."""
        return sum(1 for _ in self._places(reqs))

    def release_tracking(self, reqs: Iterable[Any]) -> Iterator[None]:
        """Give up states that decoding requests are tracked in, one per iteration, those first that
        would save the fewest tokens. They are tracked again at their next boundary."""
        for _, req, place in sorted(self._places(reqs), key=lambda item: item[0]):
            slot = req.kv.mamba_ping_pong_track_buffer[place : place + 1].clone()
            self._rows.track_nowhere(req, place)
            self._rows.mamba_allocator.free(slot)
            yield

    def _places(self, reqs: Iterable[Any]) -> Iterator[tuple[int, Any, int]]:
        """Requests that have one tracking slot in lazy mode, its place, and what it saves.

        As with windows, a request's last prefill may still be running at its first decode. A second
        slot is there for a step only, and the first one goes then.
        """
        for req in reqs if self._lazy else ():
            kv = req.kv
            if not kv.holds_kv or req.decode_batch_idx < 1 or req.finished():
                continue
            if kv.mamba_ping_pong_empty is not None and sum(kv.mamba_ping_pong_empty) == 1:
                saved = (kv.mamba_last_track_seqlen or 0) - kv.cache_protected_len
                yield saved, req, kv.mamba_ping_pong_empty.index(False)

    def branch(self, match: Match) -> int | None:
        """Length up to which SGLang shall track a state because requests part there, if that
        is behind the hit's."""
        length = match.agreed - match.agreed % self._page_size
        return length if length - match.node.end >= self._grid else None


class UnreachableTokens(Release):
    """Tokens that no state behind them can make a hit."""

    def __init__(self, trees: RadixTrees, core: Allocator) -> None:
        self._trees, self._core = trees, core

    def free(self, until: Need) -> bool:
        self._trees.evict_unreachable(self._core.smalls_missing(until.smalls))
        return until.met


class TrackingSlots(Release):
    """States that decoding requests are tracked in, one after the other, each with the
    cached states that share its large page."""

    def __init__(
        self, states: EndStates | TrackedStates, eviction: Eviction, pressure: Pressure
    ) -> None:
        self._states, self._eviction, self._pressure = states, eviction, pressure

    def free(self, until: Need) -> bool:
        if until.to_run:
            for _ in self._states.release_tracking(self._pressure.decoding):
                self._eviction.to_fit(until.smalls)
                if until.met:
                    return True
        return until.met

    def num_releasable(self) -> int:
        return self._states.num_releasable(self._pressure.decoding)

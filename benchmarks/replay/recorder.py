"""What is measured while a replay runs: who runs and waits in every step, and where the bytes are.

Counting bytes costs milliseconds, so it is done in every n-th step; n doubles whenever more than
`MOST_STEPS` steps have been kept, and half of them are then forgotten. Sums over tokens, requests
and steps are exact. Means over the kept steps weigh each by the modelled time since the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.replay.memory import JengaMemory, StockMemory, UnifiedMemory
from benchmarks.replay.result import Steps
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.serving.encoders import encoder_length

MOST_STEPS = 2000


class Kept(NamedTuple):
    time: float
    running: int
    waiting: int
    held: list[int]
    cached: list[int]
    empty: int
    wasted: int
    padded: int


class Span(NamedTuple):
    """Tokens ``[begin, end)`` that a step computes for a request, known by its row, of which the
    first `encoder` are an image's."""

    row: int
    begin: int
    end: int
    encoder: int


class Recorder:
    def __init__(self, groups: Sequence[LayerGroup], pool_bytes: int) -> None:
        self._groups = groups
        self._pool_bytes = pool_bytes
        self._memory: Any = None
        self._kept: list[Kept] = []
        self._stride = 1
        self._in_flight: list[Span] = []
        self._seen = np.zeros(0, dtype=bool)
        self.steps = self.decode_steps = 0
        self._decoded = 0
        self._peak = 0
        self._loaded_seconds = self._loaded_running = 0.0
        self.prefilled_tokens = 0
        self.evicted_tokens = 0

    def attach(self, scheduler: Any) -> None:
        """Learn whose pools these are."""
        allocator = scheduler.token_to_kv_pool_allocator
        if hasattr(allocator, "core"):
            self._memory = JengaMemory(scheduler, self._pool_bytes)
        elif hasattr(allocator, "unified_buffer"):
            self._memory = UnifiedMemory(scheduler, self._groups, self._pool_bytes)
        else:
            self._memory = StockMemory(scheduler, self._groups, self._pool_bytes)

    @property
    def pool_described(self) -> str:
        return self._memory.described

    def step(
        self,
        scheduler: Any,
        batch: Any,
        starts: np.ndarray,
        counts: np.ndarray,
        span: float,
        now: float,
    ) -> None:
        """A step of `span` modelled seconds that ends at `now`, its memory allocated already."""
        decoding = batch.forward_mode.is_decode()
        reqs = list(batch.reqs)
        if not decoding:
            self.prefilled_tokens += int(counts.sum())
            known = set(map(id, reqs))
            reqs += [req for req in scheduler.running_batch.reqs if id(req) not in known]
        else:
            self.decode_steps += 1
            self._decoded += len(reqs)
            self._peak = max(self._peak, len(reqs))
        waiting = len(scheduler.waiting_queue)
        if waiting:
            self._loaded_seconds += span
            self._loaded_running += span * len(reqs)
        spans = _spans(reqs, starts)
        if self.steps % self._stride == 0:
            # Overlap: nobody has been told yet that the step before has ended.
            before = self._in_flight if getattr(scheduler, "result_queue", None) else []
            self._keep(scheduler, reqs, [*spans, *before], now, waiting)
        self._in_flight = spans[: starts.size]
        self.steps += 1

    def _keep(
        self, scheduler: Any, reqs: Sequence[Any], spans: Sequence[Span], now: float, waiting: int
    ) -> None:
        seen = self._memory.occupancy(reqs)
        needed = self._needed(scheduler, spans)
        total = max(1, sum(needed))
        stranded = seen.stranded([part / total for part in needed])
        self._kept.append(
            Kept(
                now,
                len(reqs),
                waiting,
                seen.held,
                seen.cached,
                self._pool_bytes - sum(seen.held) - sum(seen.cached),
                max(0, sum(seen.held) - sum(needed)) + stranded,
                seen.padded,
            )
        )
        if len(self._kept) > MOST_STEPS:
            self._kept = self._kept[::2]
            self._stride *= 2

    def _needed(self, scheduler: Any, spans: Sequence[Span]) -> list[int]:
        """Bytes per group that attention reads for these tokens, a shared one once.

        A token is known by its slot in the request's row, under every baseline.
        """
        table = scheduler.req_to_token_pool.req_to_token.numpy()
        needed = []
        for group in self._groups:
            if group.kind.name == "state":
                needed.append(len({span.row for span in spans}) * group.entry_bytes)
                continue
            if group.kind.name == "cross":
                parts = [table[span.row, : span.encoder] for span in spans]
            else:
                reach = group.window
                parts = [
                    table[row, encoder if reach is None else max(encoder, begin + 1 - reach) : end]
                    for row, begin, end, encoder in spans
                ]
            needed.append(self._distinct(parts) * group.entry_bytes)
        return needed

    def _distinct(self, parts: Sequence[np.ndarray]) -> int:
        slots = np.concatenate(parts)
        if not slots.size:
            return 0
        top = int(slots.max()) + 1
        if self._seen.size < top:
            self._seen = np.zeros(top + top // 2, dtype=bool)
        self._seen[slots] = True
        count = int(np.count_nonzero(self._seen))
        self._seen[slots] = False
        return count

    # ---- at the end -------------------------------------------------------------------------

    def thinned(self) -> Steps:
        rows = self._kept
        names = [group.label for group in self._groups]
        return Steps(
            [row.time for row in rows],
            [row.running for row in rows],
            [row.waiting for row in rows],
            {name: [row.held[i] for row in rows] for i, name in enumerate(names)},
            {name: [row.cached[i] for row in rows] for i, name in enumerate(names)},
            [row.empty for row in rows],
            [row.wasted for row in rows],
        )

    def totals(self) -> dict[str, float]:
        spans = np.diff([0.0] + [row.time for row in self._kept])
        loaded = np.array([row.waiting > 0 for row in self._kept])
        weights = spans * loaded if (spans * loaded).sum() > 0 else spans
        shares = weights / (weights.sum() * self._pool_bytes) if weights.sum() > 0 else weights
        per_step = self._decoded / self.decode_steps if self.decode_steps else 0.0
        return {
            "mean_running": self._loaded_running / self._loaded_seconds
            if self._loaded_seconds
            else per_step,
            "mean_running_per_decode_step": per_step,
            "peak_running": float(self._peak),
            "loaded_seconds": self._loaded_seconds,
            "prefilled_tokens": float(self.prefilled_tokens),
            "evicted_tokens": float(self.evicted_tokens),
            "wasted_share": float(shares @ np.array([row.wasted for row in self._kept])),
            "padded_share": float(shares @ np.array([row.padded for row in self._kept])),
            "steps": float(self.steps),
            "decode_steps": float(self.decode_steps),
        }


def _spans(reqs: Sequence[Any], starts: np.ndarray) -> list[Span]:
    """The first requests compute from `starts` on, the others their last token."""
    ends = [req.kv.kv_allocated_len for req in reqs]
    begins = starts.tolist() + [end - 1 for end in ends[starts.size :]]
    return [
        Span(req.kv.req_pool_idx, begin, end, encoder_length(req))
        for req, begin, end in zip(reqs, begins, ends, strict=True)
    ]

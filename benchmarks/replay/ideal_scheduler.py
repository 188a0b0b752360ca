"""SGLang's scheduler in few lines, over ideal memory: first come, first served, on the same clock.

A step takes prompts while any can be taken, in chunks; else all running requests decode. With mixed
chunks running requests decode in every step, each one of the chunk's tokens. A request is admitted
if all that it will come to hold fits beside all that was promised, as SGLang's admission does where
answers' lengths are known. Computed tokens can be hit from the next step on.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.replay.clock import Clock, Weights
from benchmarks.replay.ideal_memory import Costs, Memory, Policy, costs
from benchmarks.replay.ideal_tree import Tree
from benchmarks.replay.requests import Request
from sglang_jenga.plan.spec import LayerGroup


class Rule(NamedTuple):
    """How steps are made: tokens of a chunk, whether requests decode beside prompts, most that run
    at once."""

    chunk: int
    mixed: bool
    max_running: int = 256


class Server(NamedTuple):
    """A model on its GPUs. `groups` have the real model's bytes; the pool's may be infinite."""

    weights: Weights
    groups: tuple[LayerGroup, ...]
    clock: Clock
    pool_bytes: float


class Found(NamedTuple):
    """`running`: mean over steps of decode rows alone. `order`: requests as admitted."""

    tokens_per_s: float
    seconds: float
    hit_tokens: int
    running: float
    order: list[int]


def serve(
    server: Server,
    requests: Sequence[Request],
    tree: Tree,
    rule: Rule,
    policy: Policy,
) -> Found:
    """Play the requests; `tree` is theirs.

    Raises ValueError if a request does not fit into an empty pool, or layers have no rule.
    """
    cost = costs(server.groups)
    memory = Memory(tree, cost, server.pool_bytes, policy)
    return _Play(server, requests, memory, cost, rule).run()


def ranks(order: Sequence[int]) -> list[int]:
    """Per request, its place in `order`."""
    places = [0] * len(order)
    for place, request in enumerate(order):
        places[request] = place
    return places


class _Play:
    def __init__(
        self,
        server: Server,
        requests: Sequence[Request],
        memory: Memory,
        cost: Costs,
        rule: Rule,
    ) -> None:
        self._server, self._requests, self._rule = server, requests, rule
        self._memory, self._cost = memory, cost
        self._now = 0.0
        self._due: list[tuple[float, int]] = []
        self._followers: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            if request.after is None:
                self._due.append((request.at, number))
            else:
                self._followers[request.after].append(number)
        heapq.heapify(self._due)
        self._first = self._due[0][0]
        self._queue: deque[int] = deque()
        self._is_full = False  # until somebody ends, whoever comes first does not fit
        self._cut: tuple[int, int, int] | None = None  # a prompt in flight: hit and computed tokens
        empty = np.zeros(0, dtype=np.int64)
        # Running requests: their number, tokens of theirs in memory, decoded of these, still to do.
        self._running, self._lengths, self._decoded, self._left = empty, empty, empty, empty
        self._order: list[int] = []
        self._hits = self._decode_steps = self._decode_rows = 0

    def run(self) -> Found:
        while self._due or self._queue or self._running.size or self._cut:
            while self._due and self._due[0][0] <= self._now:
                self._queue.append(heapq.heappop(self._due)[1])
            chunks = self._prompts()
            if chunks or self._running.size:
                self._step(chunks)
            elif self._queue:
                raise ValueError(f"{self._requests[self._queue[0]].rid} does not fit the pool")
            else:
                self._now = self._due[0][0]
        seconds = self._now - self._first
        tokens = sum(request.output.size for request in self._requests)
        return Found(
            tokens / seconds,
            seconds,
            self._hits,
            self._decode_rows / max(1, self._decode_steps),
            self._order,
        )

    def _prompts(self) -> list[tuple[int, int, int, int]]:
        """The next chunks: request, its hit, first token, and the one after the last."""
        rule, chunks = self._rule, []
        room = rule.chunk - (self._running.size if rule.mixed else 0)
        if self._cut is not None:
            chunks.append(self._chunk(*self._cut, room))
            room -= chunks[0][3] - chunks[0][2]
        while self._queue and room > 0 and not self._is_full:
            if self._running.size + len(chunks) >= rule.max_running:
                break
            hit = self._memory.admit(self._queue[0])
            if hit is None:
                self._is_full = True
                break
            request = self._queue.popleft()
            self._order.append(request)
            self._hits += hit
            chunks.append(self._chunk(request, hit, hit, room))
            room -= chunks[-1][3] - chunks[-1][2]
        return chunks

    def _chunk(self, request: int, hit: int, start: int, room: int) -> tuple[int, int, int, int]:
        stop = min(start + room, self._requests[request].prompt.size)
        self._cut = (request, hit, stop) if stop < self._requests[request].prompt.size else None
        return request, hit, start, stop

    def _step(self, chunks: list[tuple[int, int, int, int]]) -> None:
        decodes = self._running.size > 0 and (self._rule.mixed or not chunks)
        starts = np.array([start for _, _, start, _ in chunks], dtype=np.int64)
        counts = np.array([stop - start for _, _, start, stop in chunks], dtype=np.int64)
        if decodes:
            starts = np.concatenate([starts, self._lengths])
            counts = np.concatenate([counts, np.ones_like(self._lengths)])
        server = self._server
        self._now += server.clock.step_seconds(server.weights, server.groups, starts, counts)
        if decodes:
            self._decode()
        if not chunks:
            self._decode_steps += 1
            self._decode_rows += self._running.size
        for request, _, start, stop in chunks:
            self._memory.computed(request, start, stop)
            if stop == self._requests[request].prompt.size:
                self._start_decoding(request, stop)
        self._memory.evict(self._held())  # those that end now have needed their memory as well
        self._end()

    def _decode(self) -> None:
        self._lengths, self._decoded = self._lengths + 1, self._decoded + 1
        self._left = self._left - 1
        if self._cost.window:
            for row in np.flatnonzero(self._decoded % self._cost.stride == 0).tolist():
                self._memory.slide(int(self._running[row]), int(self._lengths[row]))

    def _start_decoding(self, request: int, length: int) -> None:
        left = self._requests[request].output.size - 1
        self._running = np.append(self._running, request)
        self._lengths = np.append(self._lengths, length)
        self._decoded = np.append(self._decoded, 0)
        self._left = np.append(self._left, left)

    def _end(self) -> None:
        """Let go whoever has its whole answer."""
        if self._left.size == 0 or self._left.min() > 0:
            return
        for request in self._running[self._left == 0].tolist():
            self._memory.finish(request)
            for number in self._followers.pop(self._requests[request].rid, ()):
                heapq.heappush(self._due, (self._now + self._requests[number].at, number))
        self._is_full = False
        stay = self._left > 0
        self._running, self._lengths = self._running[stay], self._lengths[stay]
        self._decoded, self._left = self._decoded[stay], self._left[stay]

    def _held(self) -> int:
        """Bytes of what was decoded, of the window of the prompt in flight, and of states."""
        cost = self._cost
        held = int(self._decoded.sum()) * cost.full + self._running.size * cost.state
        if cost.window:
            held += int(np.minimum(self._decoded, cost.reach).sum()) * cost.window
        if self._cut is not None:
            _, hit, done = self._cut
            held += min(cost.reach, done - hit) * cost.window + cost.state
        return held

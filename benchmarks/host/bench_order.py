"""Which order should the allocator hand small pages out in? A simulation without SGLang.

Requests of a trace arrive as fast as the pool takes them, are prefilled in chunks, decode, slide
their windows and end. Compared are its three orders:

    packed    whole large pages to the request alone, the remainder into the fullest large page
    paper     section 5.4: the request's own large page, an empty one, somebody else's
    fullest   everything into the fullest partly filled large page

``running``: a finished request gives its pages back. ``cached``: it leaves them to a cache, which
gives up the oldest prefix first (window and state pages, then the tail), a quantum at a time.
``phases``: runs of short requests (a tenth) alternate with runs of long ones.

Columns: requests at once and retractions; waste, the bytes of empty small pages in bound large
pages, in % of the pool; held by the cache, in % of the pool; host time of one alloc call. All but
the last are deterministic.

    python benchmarks/host/bench_order.py --trace conversation_trace.jsonl
    python benchmarks/host/bench_order.py --synthetic --requests 100 --models falcon-h1-7b
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.extent import Extent
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import PoolPlan

CONFIGS = Path(__file__).parents[2] / "tests" / "configs"
MODELS = ["gemma-3-27b", "gemma-2-9b", "gpt-oss-20b", "qwen3-next-80b-a3b", "falcon-h1-7b"]
CHUNK_TOKENS = 4096
STRIDE_TOKENS = 64
"""Tokens every running request decodes between two looks at the pool."""
PHASE_REQUESTS = 60


ORDERS = ("packed", "paper", "fullest")


@dataclass
class Request:
    """``pages[g]`` are the small ids from page ``first[g]`` on: a window slid past the others."""

    request_id: int
    prompt: int
    total: int
    length: int = 0
    pages: list[np.ndarray] = field(default_factory=list)
    first: list[int] = field(default_factory=list)


class Outcome(NamedTuple):
    concurrent: float
    retractions: int
    waste: float
    cached: float
    alloc_us: float


class Simulation:
    def __init__(self, plan: PoolPlan, allocator: Allocator, states: int, keep: bool) -> None:
        self.plan, self.allocator, self.states, self.keep = plan, allocator, states, keep
        self.groups = range(len(plan.groups))
        self.quantum = [max(group.smalls_per_large, 64) for group in plan.groups]
        self.running: list[Request] = []
        self.finished: OrderedDict[int, dict[int, Extent]] = OrderedDict()
        self.retractions = self.num_allocs = self.alloc_ns = 0
        self.samples: list[tuple[int, float, float]] = []

    def run(self, lengths: Sequence[tuple[int, int]]) -> Outcome:
        queue = deque(Request(i, n, n + m) for i, (n, m) in enumerate(lengths))
        self.ended = 0
        while queue or self.running:
            while queue and self._admit(queue[0]):
                self.running.append(queue.popleft())
            assert self.running, "a request longer than the pool"
            self._decode(queue)
            for request in [item for item in self.running if item.length == item.total]:
                self._finish(request)
            # Neither the filling nor the draining of the pool tells the orders apart.
            if queue and self.ended > len(lengths) // 10:
                self._sample()
        concurrent, waste, cached = np.mean(self.samples, axis=0).tolist()
        us = self.alloc_ns / 1e3 / self.num_allocs
        return Outcome(concurrent, self.retractions, 100 * waste, 100 * cached, us)

    def _need(self, request: Request, length: int) -> list[int]:
        """Small pages it lacks for ``length`` tokens."""
        need = []
        for group_id in self.groups:
            group = self.plan.groups[group_id].group
            if group.kind.name == "state":
                need.append(0 if request.pages else self.states)
            else:
                have = (
                    request.first[group_id] + request.pages[group_id].size if request.pages else 0
                )
                need.append(max(0, -(-length // group.tokens_per_page) - have))
        return need

    def _peak(self, request: Request) -> list[int]:
        """Small pages it holds at most during prefill, and room for a first round of decoding."""
        need = self._need(request, request.prompt + STRIDE_TOKENS)
        for group_id in self.groups:
            group = self.plan.groups[group_id].group
            if group.window is not None:
                most = group.window + CHUNK_TOKENS + STRIDE_TOKENS
                need[group_id] = min(need[group_id], -(-most // group.tokens_per_page) + 1)
        return need

    def _admit(self, request: Request) -> bool:
        if not self.allocator.fits_after_evicting(self._peak(request)):
            return False
        while request.length < request.prompt:
            if not self._grow([request], min(request.prompt, request.length + CHUNK_TOKENS)):
                # Large pages that its window slid out of only in part: try again later.
                self._release(request)
                request.length, request.pages, request.first = 0, [], []
                return False
        return True

    def _grow(self, requests: list[Request], length: int | None = None) -> bool:
        """Make every request longer, to ``length`` or by a stride; False if the pool is short."""
        targets = [length or min(item.total, item.length + STRIDE_TOKENS) for item in requests]
        rows = [self._need(item, end) for item, end in zip(requests, targets, strict=True)]
        need = [[row[group_id] for row in rows] for group_id in self.groups]
        totals = [sum(counts) for counts in need]
        if not self.allocator.fits_after_evicting(totals):
            return False
        while not self.allocator.fits_now(totals):
            self._evict_some()
        started = time.perf_counter_ns()
        got = self.allocator.alloc([item.request_id for item in requests], need)
        self.alloc_ns += time.perf_counter_ns() - started
        self.num_allocs += 1
        assert got is not None
        parts = [
            np.split(ids, np.cumsum(counts)[:-1]) for ids, counts in zip(got, need, strict=True)
        ]
        for i, request in enumerate(requests):
            if not request.pages:
                request.pages = [part[i] for part in parts]
                request.first = [0 for _ in parts]
            else:
                request.pages = [
                    np.concatenate([old, part[i]])
                    for old, part in zip(request.pages, parts, strict=True)
                ]
            request.length = targets[i]
            self._slide(request)
        return True

    def _slide(self, request: Request) -> None:
        for group_id in self.groups:
            group = self.plan.groups[group_id].group
            if group.window is None:
                continue
            seen_from = max(0, request.length - group.window + 1) // group.tokens_per_page
            dead = seen_from - request.first[group_id]
            if dead > 0:
                self.allocator.free(group_id, request.pages[group_id][:dead])
                request.pages[group_id] = request.pages[group_id][dead:]
                request.first[group_id] = seen_from

    def _decode(self, queue: deque[Request]) -> None:
        while not self._grow(self.running):
            youngest = self.running.pop()
            self._release(youngest)
            queue.appendleft(Request(youngest.request_id, youngest.prompt, youngest.total))
            self.retractions += 1

    def _release(self, request: Request) -> None:
        for group_id, ids in enumerate(request.pages):
            self.allocator.free(group_id, ids)
        self.allocator.forget(request.request_id)

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        self.ended += 1
        if not self.keep:
            self._release(request)
            return
        extents: dict[int, Extent] = {}
        for group_id, ids in enumerate(request.pages):
            # Of a request's states the cache keeps the last.
            if self.plan.groups[group_id].group.kind.name == "state":
                self.allocator.free(group_id, ids[1:])
                request.pages[group_id] = ids = ids[:1]
            if ids.size:
                extents[group_id] = self.allocator.adopt(group_id, ids)
        self.finished[request.request_id] = extents
        self.allocator.forget(request.request_id)

    def _evict_some(self) -> None:
        """The oldest prefix loses what only its end needs, then its tail."""
        request_id, extents = next(iter(self.finished.items()))
        group_id = next(group for group in (*self.groups[1:], 0) if group in extents)
        extent = extents.pop(group_id)
        if extent.size > self.quantum[group_id]:
            index = extent.size - self.quantum[group_id]
            extents[group_id], extent = self.allocator.split(extent, index)
        self.allocator.evict(extent)
        if not extents:
            del self.finished[request_id]

    def _sample(self) -> None:
        plan, allocator = self.plan, self.allocator
        sizes = [group.small_page_bytes for group in plan.groups]
        empty = sum(n * size for n, size in zip(allocator.large.free, sizes, strict=True))
        cached = sum(n * size for n, size in zip(allocator.num_cached, sizes, strict=True))
        self.samples.append((len(self.running), empty / plan.pool_bytes, cached / plan.pool_bytes))


def read_lengths(options: argparse.Namespace) -> list[tuple[int, int]]:
    if options.synthetic:
        rng = np.random.default_rng(0)
        prompts = rng.lognormal(8.5, 1.1, options.requests).astype(int).clip(64, 100_000)
        outputs = rng.lognormal(5.5, 0.8, options.requests).astype(int).clip(1, 2000)
        return list(zip(prompts.tolist(), outputs.tolist(), strict=True))
    with options.trace.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(options.requests), strict=False)]
    return [(row["input_length"], max(1, row["output_length"])) for row in rows]


def in_phases(lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    short = [(max(1, prompt // 10), output) for prompt, output in lengths]
    return [(short if i // PHASE_REQUESTS % 2 else lengths)[i] for i in range(len(lengths))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="Mooncake trace, one JSON object a line")
    source.add_argument("--synthetic", action="store_true", help="seeded log-normal lengths")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--pool-gib", type=float, default=40)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[1, 16, 64])
    options = parser.parse_args()

    lengths = read_lengths(options)
    workloads = {"steady": lengths, "phases": in_phases(lengths)}
    print(
        f"{'model':20}{'page':>5}{'packing':>10}  {'load':8}{'mode':9}{'order':9}"
        f"{'at once':>8}{'retract':>8}{'waste %':>8}{'cache %':>8}{'us/alloc':>9}"
    )
    for model in options.models:
        for page_size in options.page_sizes:
            config = json.loads((CONFIGS / f"{model}.json").read_text())
            geometry = read_geometry(config, page_size=page_size)
            plan = plan_pool(geometry.groups, int(options.pool_gib * 2**30))
            packing = "x".join(str(group.smalls_per_large) for group in plan.groups)
            # With one small page per large page there is nothing to choose.
            orders = (
                ORDERS if any(group.smalls_per_large > 1 for group in plan.groups) else ["packed"]
            )
            for load, requests in workloads.items():
                for mode in ("running", "cached"):
                    for order in orders:
                        allocator = Allocator(plan, order=order)
                        simulation = Simulation(
                            plan, allocator, max(1, geometry.states), mode == "cached"
                        )
                        result = simulation.run(requests)
                        name = order if len(orders) > 1 else "(any)"
                        print(
                            f"{model:20}{page_size:5}{packing:>10}  {load:8}{mode:9}{name:9}"
                            f"{result.concurrent:8.1f}{result.retractions:8}{result.waste:8.2f}"
                            f"{result.cached:8.1f}{result.alloc_us:9.0f}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()

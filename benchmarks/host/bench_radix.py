"""Time of the prefix cache's operations: jenga's trees against SGLang's unified tree.

    python -m benchmarks.host.bench_radix             # all cells, some minutes
    python -m benchmarks.host.bench_radix --quick     # page 1, short prompts, small trees
    python -m benchmarks.host.bench_radix --recorded  # a stream recorded from a real server only

Both caches stand in one process on CPU tensors with SGLang's own `Req`, row table and allocators,
and get the same requests in turn, call by call. Unified is SGLang's default: its Rust core. No byte
of KV is read or written, so the pools have none. Times are medians in microseconds.

    match    match_prefix and the indices of the hit, as a request's admission asks for them
    insert   checkpoint of a prompt after its prefill, and once more when its answer is there
    lock     lock of the hit and its unlock
    evict    what the allocator asks for when a prompt's pages are not free
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.host.cache_sides import Shape, build, request
from sglang_jenga.testing.context import configured
from sglang_jenga.testing.engines import run_engine

WINDOW = 1024
ANSWER = 64
OPERATIONS = ("match", "insert", "lock", "evict")
SIDES = ("unified", "jenga")


class Cell(NamedTuple):
    """``nodes``: size of the tree that the timed requests meet."""

    window: bool
    page_size: int
    prompt: int
    nodes: int

    @property
    def label(self) -> str:
        kind = "full+window" if self.window else "full"
        return f"{kind} | {self.page_size} | {self.prompt:,} | {self.nodes:,}"


class Side:
    """One prefix cache with what it stands on, and the times of its operations."""

    def __init__(self, name: str, cell: Cell, num_tokens: int, longest: int) -> None:
        window = WINDOW if cell.window else None
        self.cache = build(name, Shape(num_tokens, cell.page_size, window, 64, longest))
        self.page_size = cell.page_size
        self.rows = self.cache.req_to_token_pool
        self.allocator = self.cache.token_to_kv_pool_allocator
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def take(self, req: Any, start: int, end: int) -> None:
        """Pages for tokens ``[start, end)`` and the request's row written; ``start`` is aligned."""
        raise NotImplementedError

    def timed(self, operation: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[operation].append(time.perf_counter() - begin)
        return result

    # ---- a request's life, as SGLang's scheduler leads it ------------------------------------

    def look_up(self, req: Any) -> None:
        from sglang.srt.mem_cache.common import match_kv_cache

        req.refresh_fill_ids()
        length = len(req.full_untruncated_fill_ids)
        match_kv_cache(req, self.cache, req.full_untruncated_fill_ids, max_prefix_len=length - 1)
        req.indices = self.cache.prefix_device_indices(req)

    def admit(self, req: Any) -> int:
        """Match, lock, make room and prefill; the hit in tokens."""
        self.timed("match", self.look_up, req)
        begin = time.perf_counter()
        req.lock = self.cache.lock(req.last_node)
        locked = time.perf_counter() - begin
        req.kv.cache_protected_len = hit = req.prefix_len
        self.rows.alloc([req])
        self.rows.write((req.kv.req_pool_idx, slice(0, hit)), req.indices.to(torch_int32()))
        self.extend(req, hit, len(req.full_untruncated_fill_ids))
        self.timed("insert", self.cache.checkpoint, req, up_to=req.kv.kv_allocated_len)
        # The lock of the hit is gone by now; its unlock is timed on a second one.
        again = self.cache.lock(req.last_node)
        begin = time.perf_counter()
        self.cache.unlock(again)
        self.seconds["lock"].append(locked + time.perf_counter() - begin)
        return hit

    def extend(self, req: Any, start: int, end: int) -> None:
        aligned = -(-end // self.page_size) * self.page_size - start
        if self.short_of(aligned):
            self.timed("evict", self.allocator.evict_to_free_tokens, self.cache, aligned)
        self.take(req, start, end)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end

    def short_of(self, num_tokens: int) -> bool:
        return self.allocator.available_size() < num_tokens

    def finish(self, req: Any, answer: Sequence[int]) -> None:
        """The answer is there: cache it, and give back the rest."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH

        end = len(req.full_untruncated_fill_ids)
        req.output_ids.extend(answer)
        req.refresh_fill_ids()
        whole = -(-end // self.page_size) * self.page_size
        total = len(req.full_untruncated_fill_ids)
        if total > whole:
            self.extend(req, whole, total)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = total
        req.finished_reason = FINISH_LENGTH(len(answer))
        self.timed("insert", self.cache.checkpoint, req, up_to=total)
        self.cache.free_kv_row(req.kv, [(req.kv.cache_protected_len, total)])
        self.cache.unlock(req.lock)
        req.lock = None
        self.cache.on_release(req, checkpointed=True)
        self.rows.free(req)
        req.kv.mark_kv_released()


class Unified(Side):
    def short_of(self, num_tokens: int) -> bool:
        if not hasattr(self.allocator, "swa_attn_allocator"):
            return super().short_of(num_tokens)
        parts = (self.allocator.full_attn_allocator, self.allocator.swa_attn_allocator)
        return any(part.available_size() < num_tokens for part in parts)

    def take(self, req: Any, start: int, end: int) -> None:
        count = -(-(end - start) // self.page_size) * self.page_size
        if hasattr(self.allocator, "swa_attn_allocator"):
            slots = self.allocator.full_attn_allocator.alloc(count)
            others = self.allocator.swa_attn_allocator.alloc(count)
            self.allocator.set_full_to_swa_mapping(slots, others)
        else:
            slots = self.allocator.alloc(count)
        self.rows.write((req.kv.req_pool_idx, slice(start, end)), slots[: end - start].int())


class Jenga(Side):
    def short_of(self, num_tokens: int) -> bool:
        core = self.allocator.core
        return not core.fits_now(self.allocator.groups.need(num_tokens))

    def take(self, req: Any, start: int, end: int) -> None:
        from sglang_jenga.pages.tables import StepDemand

        fresh = [0] if req.kv.kv_allocated_len == 0 else []
        step = StepDemand(
            [req],
            np.array([start]),
            np.array([end]),
            self.page_size,
            fresh=fresh,
            prefix_pages=self.cache.prefix_pages,
        )
        with self.allocator.allocating(step):
            slots = self.allocator.alloc_extend(None, None, None, None, None, end - start)
        self.rows.write((req.kv.req_pool_idx, slice(start, end)), slots.int())


SIDE = {"unified": Unified, "jenga": Jenga}


def torch_int32() -> Any:
    import torch

    return torch.int32


# ---- streams --------------------------------------------------------------------------------


def grow(sides: Sequence[Side], nodes: int, page_size: int, rng: random.Random) -> None:
    """Trees of ``nodes`` nodes: short branches off shared heads, 16 to each."""
    length = node_tokens(page_size)
    heads = [[rng.randrange(1 << 20) for _ in range(length)] for _ in range(max(1, nodes // 16))]
    for at in range(nodes):
        tokens = heads[at % len(heads)] + [rng.randrange(1 << 20) for _ in range(length)]
        for side in sides:
            req = request("grow", tokens)
            side.admit(req)
            side.finish(req, [])
    for side in sides:
        side.seconds.clear()


def node_tokens(page_size: int) -> int:
    return max(16, page_size)


def conversations(cell: Cell, count: int, rng: random.Random) -> Iterator[list[int]]:
    """Prompts of about ``cell.prompt`` tokens: new, continued after half, branched at a quarter."""
    for _ in range(count):
        first = [rng.randrange(1 << 20) for _ in range(cell.prompt)]
        yield first[: cell.prompt // 2]
        yield first
        yield first[: cell.prompt // 4] + [rng.randrange(1 << 20) for _ in range(cell.prompt // 2)]


def run_cell(cell: Cell, count: int) -> dict[str, dict[str, list[float]]]:
    """Times in seconds per side and operation; the pool holds the tree and about four prompts."""
    tree = cell.nodes * 2 * node_tokens(cell.page_size)
    num_tokens = tree + 4 * (cell.prompt + ANSWER + cell.page_size)
    sides = [SIDE[name](name, cell, num_tokens, 2 * cell.prompt + 4096) for name in SIDES]
    rng = random.Random(0)
    grow(sides, cell.nodes, cell.page_size, rng)
    gc.collect()
    gc.disable()
    for turn, tokens in enumerate(conversations(cell, count, rng)):
        answer = [rng.randrange(1 << 20) for _ in range(ANSWER)]
        # In turns, so that neither side always finds the processor's caches warmed by the other.
        for side in sides if turn % 2 else sides[::-1]:
            req = request(f"{turn}", tokens)
            side.admit(req)
            side.finish(req, answer)
    gc.enable()
    return {name: dict(side.seconds) for name, side in zip(SIDES, sides, strict=True)}


# ---- a recorded stream ----------------------------------------------------------------------


def record() -> list[list[Any]]:
    """What a real server asks of its cache while it answers multi-turn chats that share prefixes.

    Entries: ["admit", request, tokens], ["checkpoint", request, up_to] and
    ["finish", request, tokens], in the scheduler's order.
    """
    import tempfile

    from sglang_jenga.testing.tiny_models import write_tiny_model

    rng = random.Random(1)
    system = [rng.randrange(5, 500) for _ in range(200)]
    chats = [system + [rng.randrange(5, 500) for _ in range(40)] for _ in range(12)]
    waves = []
    for _ in range(6):
        waves.append([list(chat) for chat in chats])
        chats = [chat + [rng.randrange(5, 500) for _ in range(60)] for chat in chats]
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model("llama", folder)
        run = run_engine(
            model,
            waves,
            max_new_tokens=24,
            prepare=_print_calls,
            chunked_prefill_size=128,
            max_total_tokens=4000,
        )
    return [json.loads(line[5:]) for line in run.log.splitlines() if line.startswith("CALL ")]


def _print_calls() -> None:
    """In the scheduler: print what is asked of the unified tree."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    def printing(name: str, fields: Callable[..., list]) -> None:
        original = getattr(UnifiedRadixCache, name)

        def method(self, *args, **kwargs):
            print("CALL", json.dumps(fields(*args, **kwargs)), flush=True)
            return original(self, *args, **kwargs)

        setattr(UnifiedRadixCache, name, method)

    def ids(req):
        return list(req.full_untruncated_fill_ids)

    printing("match_prefix", lambda params: ["match", params.req.rid, ids(params.req)])
    printing(
        "checkpoint",
        lambda req, *, up_to, **_: [
            "finish" if req.finished() else "checkpoint",
            req.rid,
            ids(req) if req.finished() else up_to,
        ],
    )


def run_recorded(page_size: int, window: bool) -> dict[str, dict[str, list[float]]]:
    calls = record()
    # A request is admitted by the last look-up before its first checkpoint.
    admitted: dict[str, int] = {}
    for at, (kind, name, _) in enumerate(calls):
        if kind == "match" and admitted.get(name, -1) >= 0:
            admitted[name] = at
        elif kind == "match":
            admitted.setdefault(name, at)
    cell = Cell(window, page_size, 1000, 0)
    sides = [SIDE[name](name, cell, 4000, 4096) for name in SIDES]
    running: dict[str, list[Any]] = {}
    gc.collect()
    gc.disable()
    for at, (kind, name, value) in enumerate(calls):
        if kind == "match" and admitted[name] == at and name not in running:
            running[name] = [request(name, value) for _ in sides]
            for side, req in zip(sides, running[name], strict=True):
                side.admit(req)
        elif kind == "match":
            for side in sides:
                side.timed("match", side.look_up, request(name, value))
        elif kind == "finish" and name in running:
            for side, req in zip(sides, running.pop(name), strict=True):
                answer = value[len(req.origin_input_ids) :]
                side.finish(req, answer)
    gc.enable()
    return {name: dict(side.seconds) for name, side in zip(SIDES, sides, strict=True)}


# ---- report ---------------------------------------------------------------------------------


def row(label: str, seconds: dict[str, dict[str, list[float]]]) -> str:
    parts = []
    for operation in OPERATIONS:
        medians = [1e6 * statistics.median(seconds[s].get(operation) or [0.0]) for s in SIDES]
        parts.append(f"{medians[0]:.0f} / {medians[1]:.0f}{_ratio(*medians)}")
    totals = [1e3 * sum(map(sum, seconds[side].values())) for side in SIDES]
    parts.append(f"{totals[0]:.0f} / {totals[1]:.0f}{_ratio(*totals)}")
    return f"| {label} | {' | '.join(parts)} |"


def _ratio(theirs: float, ours: float) -> str:
    return f" **{ours / theirs:.2f}**" if theirs else ""


def cells(quick: bool) -> list[Cell]:
    if quick:
        return [Cell(window, 1, 1_000, 1_000) for window in (False, True)]
    pages = (1, 16, 64)
    shapes = [(1_000, 1_000), (10_000, 1_000), (100_000, 1_000), (10_000, 10_000)]
    shapes.append((10_000, 100_000))
    return [Cell(w, page, *shape) for w in (False, True) for page in pages for shape in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--recorded", action="store_true", help="only the recorded stream")
    parser.add_argument("--prompts", type=int, default=12, help="conversations per cell")
    parser.add_argument("--most-nodes", type=int, default=100_000, help="skip larger trees")
    parser.add_argument("--json", help="write all times, in seconds, to this file")
    options = parser.parse_args()
    with configured():
        _report(options)


def _report(options: argparse.Namespace) -> None:
    found = {}
    kinds = " | ".join(f"{operation}, us" for operation in OPERATIONS)
    print(f"unified / jenga **ratio**\n\n| groups | page | prompt | nodes | {kinds} | total, ms |")
    print("|---|---|---|---|" + "---|" * (len(OPERATIONS) + 1))
    if not options.recorded:
        for cell in cells(options.quick):
            if cell.nodes <= options.most_nodes:
                found[cell.label] = run_cell(cell, options.prompts)
                print(row(cell.label, found[cell.label]), flush=True)
    for window in (False, True):
        label = f"{'full+window' if window else 'full'} | 1 | recorded | -"
        found[label] = run_recorded(1, window)
        print(row(label, found[label]), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()

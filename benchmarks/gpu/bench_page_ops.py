"""What moving ids and bytes costs on a GPU: our kernels beside plain torch and SGLang's own.

    python -m benchmarks.gpu.bench_page_ops
    python -m benchmarks.gpu.bench_page_ops --minutes 2 --markdown table.md --json rows.json

expand    rows of req_to_token and of the window from small-page ids; the host's part counts too:
          torch sends slots and writes them by index, the kernel gets page ids
zero      large pages that change element format
copy      a request's recurrent state on its first write
store     K and V of a step into one layer of our token-major view; beside it SGLang's store kernel

Sizes are of real models' pools (tests/configs), tensors random. Medians; GB/s of bytes read and
written by the kernel; the ratio is the other's time over ours, above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.timing import Column, Deadline, Report, machine, median_seconds, require_cuda
from sglang_jenga.kernels.copy_entries import copy_entries
from sglang_jenga.kernels.expand import expand
from sglang_jenga.kernels.scatter_kv import scatter_kv
from sglang_jenga.kernels.zero_pages import zero_pages
from sglang_jenga.pages.tables import expand as expand_on_host
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.testing.attention_layouts import GROUPS, buffer_elements, layer_pages

CONFIGS = Path(__file__).parents[2] / "tests" / "configs"
POOL_BYTES = 16 << 30
MODELS = ("qwen3-next-80b-a3b", "gemma-3-27b", "falcon-h1-7b")
COLUMNS = (
    Column("operation", "operation"),
    Column("what", "what", width=38),
    Column("ours", "ours, us", "{:.1f}"),
    Column("gbps", "GB/s", "{:.0f}"),
    Column("torch", "torch, us", "{:.1f}"),
    Column("torch ratio", "torch / ours", "**{:.2f}**"),
    Column("sglang", "SGLang, us", "{:.1f}"),
    Column("sglang ratio", "SGLang / ours", "**{:.2f}**"),
)
Row = dict[str, Any]


def plan(model: str) -> PoolPlan:
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    return plan_pool(read_geometry(config, page_size=1).groups, POOL_BYTES)


def row(operation: str, what: str, seconds: dict[str, float], moved: float | None = None) -> Row:
    ours = seconds["ours"]
    return {
        "operation": operation,
        "what": what,
        "gbps": None if moved is None else moved / ours / 1e9,
        **{name: 1e6 * time for name, time in seconds.items()},
        **{f"{name} ratio": time / ours for name, time in seconds.items() if name != "ours"},
    }


def in_turns(runs: dict[str, Callable[[], Any]], timer: Callable[..., list[float]]) -> Any:
    return dict(zip(runs, timer(list(runs.values())), strict=True))


def median_wall_seconds(
    alternatives: list[Callable[[], Any]], *, runs: int = 30, warm: int = 5
) -> list[float]:
    """Median time of host and device together, in seconds, measured in turns."""
    spent: list[list[float]] = [[] for _ in alternatives]
    for index in range(warm + runs):
        for alternative, times in zip(alternatives, spent, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            alternative()
            torch.cuda.synchronize()
            if index >= warm:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in spent]


# ---- expand ---------------------------------------------------------------------------------


def expand_rows() -> Iterator[Row]:
    for page_size in (1, 16, 64):
        for num_requests, num_tokens in ((1, 8192), (16, 2048), (256, 1)):
            yield _expand_row(page_size, num_requests, num_tokens)


def sent(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).pin_memory().to("cuda", non_blocking=True)


def _expand_row(page_size: int, num_requests: int, num_tokens: int) -> Row:
    """Two layer groups, as a model with window layers has."""
    rng = np.random.default_rng(0)
    count = -(-num_tokens // page_size)
    pages = rng.permutation(2 * num_requests * count).astype(np.int64) + 1
    both = pages.reshape(2, num_requests, count)
    rows = np.arange(num_requests, dtype=np.int64)
    tables = torch.zeros(2, num_requests, count * page_size, dtype=torch.int32, device="cuda")
    ends = np.full(num_requests, num_tokens, dtype=np.int64)

    def ours() -> None:
        indptr = np.arange(num_requests + 1, dtype=np.int64) * count
        packed = sent(np.concatenate([indptr, rows, ends, both.ravel()]))
        cuts = [indptr.size, num_requests, num_requests, both[0].size, both[0].size]
        indptr_, rows_, ends_, full, window = packed.split(cuts)
        expand(
            full,
            indptr_,
            rows_,
            torch.zeros_like(ends_),
            ends_,
            tables[0],
            page_size=page_size,
            max_tokens=num_tokens,
            window_ids=window,
            window_table=tables[1],
        )

    def plain() -> None:
        slots = np.stack(
            [
                np.concatenate([expand_on_host(ids, page_size)[:num_tokens] for ids in group])
                for group in both
            ]
        )
        slots_ = sent(slots).to(torch.int32).view(2, num_requests, num_tokens)
        rows_ = sent(rows)
        tables[0][rows_, :num_tokens] = slots_[0]
        tables[1][rows_, :num_tokens] = slots_[1]

    ours()
    got = tables[:, :, :num_tokens].clone()
    plain()
    assert torch.equal(got, tables[:, :, :num_tokens])
    seconds = in_turns({"ours": ours, "torch": plain}, median_wall_seconds)
    return row("expand", f"page {page_size}, {num_requests} x {num_tokens} tokens", seconds)


# ---- zero and copy --------------------------------------------------------------------------


def zero_rows() -> Iterator[Row]:
    for model in MODELS:
        pool_plan = plan(model)
        size = pool_plan.large_page_bytes
        pool = torch.randint(0, 256, (pool_plan.pool_bytes,), dtype=torch.uint8, device="cuda")
        larges = pool.view(-1, size)
        for count in (1, 16):
            ids = torch.randperm(len(larges), device="cuda")[:count]
            runs = {
                "ours": partial(zero_pages, pool, ids, size),
                "torch": partial(larges.index_fill_, 0, ids, 0),
            }
            runs["ours"]()
            assert not larges[ids].any()
            seconds = in_turns(runs, median_seconds)
            yield row("zero", f"{model}, {count} x {size / 2**20:.1f} MiB", seconds, count * size)


def copy_rows() -> Iterator[Row]:
    for model in MODELS:
        pool_plan = plan(model)
        state = next((g for g in pool_plan.groups if g.group.kind.name == "state"), None)
        if state is None:
            continue
        entry, stride = state.group.entry_bytes, state.padded_entry_bytes
        pool = torch.randint(0, 256, (pool_plan.pool_bytes,), dtype=torch.uint8, device="cuda")
        entries = pool.as_strided((pool.numel() // stride, entry), (stride, 1))
        for count in (1, 8):
            src, dst = torch.randperm(len(entries), device="cuda")[: 2 * count].view(2, -1)
            runs = {
                "ours": partial(copy_entries, pool, src, dst, entry, stride),
                "torch": partial(_copy_by_index, entries, src, dst),
            }
            runs["ours"]()
            assert torch.equal(entries[dst], entries[src])
            seconds = in_turns(runs, median_seconds)
            what = f"{model}, {count} x {entry / 2**20:.1f} MiB"
            yield row("copy", what, seconds, 2 * count * entry)


def _copy_by_index(entries: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    entries[dst] = entries[src]


# ---- store ----------------------------------------------------------------------------------


def sglang_store() -> Callable[..., None] | None:
    """SGLang's store kernel, None where SGLang or a compiler for it is missing."""
    try:
        from sglang.kernels.ops.kvcache.kvcache import can_use_store_cache, store_cache
    except ImportError:
        return None
    return store_cache if can_use_store_cache(GROUPS[0].row * 2) else None


def store_rows() -> Iterator[Row]:
    store = sglang_store()
    num_slots = 16384
    for group in GROUPS:
        size = buffer_elements("token-major", group, num_slots, 1)
        buffer = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
        kv = layer_pages("token-major", buffer, group, group.num_layers // 2, num_slots, 1).rows()
        for num_tokens in (1, 64, 8192):
            shape = (2, num_tokens, group.num_kv_heads, group.dim)
            k, v = torch.randn(shape, device="cuda").to(torch.bfloat16)
            loc = torch.randperm(num_slots - 1, device="cuda")[:num_tokens] + 1
            runs = {
                "ours": partial(scatter_kv, k, v, loc, *kv),
                "torch": partial(_store_by_index, k, v, loc, *kv),
            }
            if store is not None:
                flat = [part.view(-1, group.row) for part in (k, v, *kv)]
                runs["sglang"] = partial(store, *flat, loc)
            for run in runs.values():
                for part in kv:
                    part[loc] = float("nan")
                run()
                assert torch.equal(kv.k[loc], k) and torch.equal(kv.v[loc], v)
            seconds = in_turns(runs, median_seconds)
            moved = 4 * num_tokens * group.row * 2
            yield row("store", f"{group.label}, {num_tokens} tokens", seconds, moved)


def _store_by_index(
    k: torch.Tensor, v: torch.Tensor, loc: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor
) -> None:
    k_pool[loc] = k
    v_pool[loc] = v


OPERATIONS = {"expand": expand_rows, "zero": zero_rows, "copy": copy_rows, "store": store_rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="start no row after that")
    parser.add_argument("--only", choices=OPERATIONS, action="append", help="may be repeated")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    options = parser.parse_args(argv)
    require_cuda()
    command = " ".join(["python -m benchmarks.gpu.bench_page_ops", *(argv or sys.argv[1:])])
    report = Report(
        "page operations",
        COLUMNS,
        command,
        machine(),
        json_path=options.json,
        markdown_path=options.markdown,
    )
    deadline = Deadline(options.minutes)
    for name in options.only or OPERATIONS:
        for measured in OPERATIONS[name]():
            report.add(**measured)
            if deadline.passed():
                report.note(f"time was up in {name}")
                break
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

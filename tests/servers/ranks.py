"""What engines of several ranks are asked, what is planted in one rank, and what they tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sglang_jenga.testing.engines import Run, run_engine
from sglang_jenga.testing.families import EXACT
from tests.servers.parity import first_wave

COMPARED = EXACT | {"SGLANG_JENGA_COMPARE_RANKS": "1"}
FIRST = first_wave()[:16]
NEW_TOKENS = 24
_UNTRACKED = {
    "max_total_tokens": 480,
    "max_mamba_cache_size": 12,
    "mamba_radix_cache_strategy": "no_buffer",
    "disable_overlap_schedule": True,
}
PRESSED: dict[str, dict[str, Any]] = {
    "llama": {"max_total_tokens": 640},
    "qwen3": {"max_total_tokens": 640},
    "gemma3_text": {"max_total_tokens": 300},
    "gemma4": {"max_total_tokens": 300},
    "qwen3_next": {
        "max_total_tokens": 400,
        "max_mamba_cache_size": 14,
        "mamba_radix_cache_strategy": "extra_buffer",
    },
    "qwen3_5": _UNTRACKED,
    "nemotron_h": _UNTRACKED,
    "mllama": {"max_total_tokens": 260, "skip_tokenizer_init": False},
}
"""By family a pool in which requests are retracted."""


def go_on(answers: list[list[list[int]]]) -> list[list[int]]:
    """The conversations go on from what was answered."""
    return [[*prompt, *answer, 7, 8, 9] for prompt, answer in zip(FIRST, answers[0], strict=True)]


def serve(model: Path, **arguments: Any) -> Run:
    given = {
        "waves": [FIRST, go_on],
        "max_new_tokens": NEW_TOKENS,
        "chunked_prefill_size": 64,  # where a prompt is cut decides how sums are rounded
        "env": EXACT,
    }
    return run_engine(model, **(given | arguments))


def this_rank() -> int:
    """Of --tp, or of --pp-size where there is one rank to a stage."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return parallel.tp_rank if parallel.tp_size > 1 else parallel.pp_rank


def one_large_page_fewer() -> None:
    """Rank 1 plans a pool that is a large page smaller."""
    from sglang_jenga.boot import construction

    plan_for = construction.plan_for

    def planned(geometry: Any, pool_bytes: int) -> Any:
        plan = plan_for(geometry, pool_bytes)
        fewer = this_rank() == 1
        return plan_for(geometry, pool_bytes - plan.large_page_bytes) if fewer else plan

    construction.plan_for = planned


def hits_refresh_nothing() -> None:
    """On rank 1 a hit leaves all pages as old as they were: others go first."""
    from sglang_jenga.radix.ageing import Ageing

    touch = Ageing.touch

    def touched(self: Any, node: Any, *, hit: bool) -> None:
        if not (hit and this_rank() == 1):
            touch(self, node, hit=hit)

    Ageing.touch = touched


def traces(log: str, rank: int, *, named: str = "TP") -> list[str]:
    """What a rank, or a stage (``named`` PP), with SGLANG_JENGA_COMPARE_RANKS says in this log at
    idle, one line each time. "PP1 TP" names the ranks of a stage."""
    prefix = rf"^\[\S+ \S+ {named}{rank}\]" if f" {named}0]" in log else r"^\[\S+ \S+\]"
    return re.findall(rf"{prefix} jenga rank trace: (.*)$", log, re.M)


def same(*told: list[str]) -> bool:
    """Whether ranks have told the same of what they handed out and evicted, and it was some. The
    last line of each may be lost as the engine ends."""
    common = [line[: min(map(len, told))] for line in told]
    some = bool(common[0]) and not re.search("(allocations|evictions) 0 ", common[0][-1])
    return some and all(line == common[0] for line in common)


def begin_alike(log: str) -> bool:
    """Whether two ranks of this log have told the same so far as both have, and it was some."""
    first, second = (traces(log, rank) for rank in (0, 1))
    common = min(len(first), len(second))
    return common >= 1 and first[:common] == second[:common]


_PATTERN = 0x3F  # 0.7475 as float32: nothing that is computed becomes NaN by it
UNTAKEN = re.compile(r"test: rank (\d) took (\d+) large pages and wrote (\d+) others of (\d+)")


def tell_of_untaken_pages() -> None:
    """At idle each rank prints how many large pages it has written that no request ever took; null
    pages do not count."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_jenga.pages.allocator import Allocator
    from sglang_jenga.serving.allocator import _JengaAllocator

    set_up, alloc, on_idle = _JengaAllocator._setup, Allocator.alloc, Scheduler.on_idle
    taken: set[int] = set()
    said = None

    def filled(self: Any, *args: Any, buffer: Any, **kwargs: Any) -> None:
        set_up(self, *args, buffer=buffer, **kwargs)
        buffer.bytes.fill_(_PATTERN)

    def allocated(self: Any, *args: Any) -> Any:
        found = alloc(self, *args)
        for group_id, ids in enumerate(found or ()):
            taken.update((ids // self.plan.groups[group_id].smalls_per_large).tolist())
        return found

    def idle(self: Any) -> Any:
        nonlocal said
        buffer = self.token_to_kv_pool_allocator.buffer
        plan, written = buffer.plan, set()
        for view in buffer.larges:
            unwritten = int.from_bytes(bytes([_PATTERN]) * view.element_size(), "little")
            written.update((view != unwritten).any(dim=2).any(dim=1).nonzero().flatten().tolist())
        others = [large for large in written if large >= plan.null_larges and large not in taken]
        line = (
            f"test: rank {this_rank()} took {len(taken)} large pages and wrote {len(others)} others"
            f" of {plan.num_large}"
        )
        if line != said:
            print(line, flush=True)
            said = line
        return on_idle(self)

    _JengaAllocator._setup, Allocator.alloc, Scheduler.on_idle = filled, allocated, idle


def padding_lies_in_a_page() -> None:
    """The slot of rows of padding is one that belongs to nobody."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    pad = ForwardBatch._pad_inputs_to_size

    def padded(self: Any, model_runner: Any, num_tokens: int, bs: int) -> None:
        rows = len(self.out_cache_loc)
        pad(self, model_runner, num_tokens, bs)
        self.out_cache_loc[rows:] = 1000

    ForwardBatch._pad_inputs_to_size = padded

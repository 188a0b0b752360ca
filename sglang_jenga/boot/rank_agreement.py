"""Before a pool is built its ranks see that they would run it alike, or all stop with one line.

A rank that has other packages, other variables, another command line (on another machine) or less
memory would make another plan, hand out other pages and hit other prefixes: the ranks' steps would
no longer be of the same tokens. Nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from sglang.srt.runtime_context import get_memory, get_schedule
from sglang.version import __version__ as sglang_version

from sglang_jenga import __version__
from sglang_jenga.boot import refusal
from sglang_jenga.plan.spec import PoolPlan
from sglang_jenga.serving import ablation, rank_trace
from sglang_jenga.serving.ranks import differences, peers_of_rank


def require(plan: PoolPlan, max_requests: int) -> None:
    """End this scheduler, and its peers, if one of them would run its pool otherwise."""
    peers = peers_of_rank()
    if peers is None:
        return
    difference = differences(peers.everybody(digest(plan, max_requests)))
    if difference:
        refusal.leave(
            f"--memory-backend jenga: ranks with the same requests must be alike, and differ in "
            f"{difference}: start them with the same packages, variables, arguments and memory"
        )


def digest(plan: PoolPlan, max_requests: int) -> dict[str, Hashable]:
    """What decides which pages a rank hands out and which prefixes it hits, but for the requests
    themselves and SGLang's own finer settings; a rank's own share of heads is in the bytes of
    entries."""
    schedule = get_schedule()
    return {
        "version of sglang-jenga": __version__,
        "version of SGLang": sglang_version,
        "page size": plan.tokens_per_page,
        "large page bytes": plan.large_page_bytes,
        "number of large pages": plan.num_large,
        "entry bytes": _listed(item.padded_entry_bytes for item in plan.groups),
        "layer types": _listed(_kind(item.group.kind) for item in plan.groups),
        "layers": _listed(item.group.num_layers for item in plan.groups),
        "running requests": max_requests,
        "tokens of a chunk": schedule.chunked_prefill_size,
        "tokens of a step of prompts": schedule.max_prefill_tokens,
        "mixed chunks": "on" if schedule.enable_mixed_chunk else "off",
        "schedule policy": schedule.schedule_policy,
        "schedule conservativeness": schedule.schedule_conservativeness,
        "rounds between comparisons": rank_trace.rounds_from_environment(),
        "radix cache": "off" if get_memory().disable_radix_cache else "on",
        "parts switched off": _listed(_off(ablation.from_environment())) or "none",
    }


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _kind(kind: Any) -> str:
    """A layer type with its class and that of its policy: a package may bring either."""
    policy = type(kind.policy)
    return f"{kind.label} by {type(kind).__module__} and {policy.__module__}.{policy.__qualname__}"


def _off(options: ablation.CacheOptions) -> list[str]:
    return [name for name, on in options._asdict().items() if not on]

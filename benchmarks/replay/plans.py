"""Plans of the pool that only a benchmark asks for, in place of the planner's own.

lcm    the planner's, its bound on large pages scaled like the bytes
max    one page size for all groups, the largest: smaller entries are padded up to it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_jenga.boot.hooks import Hook
from sglang_jenga.plan.planner import plan_pool, raw_small_bytes
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan


def hook(plan: str, largest_page_bytes: int) -> Hook:
    """What makes the plugin cut its pool by `plan`; `largest_page_bytes` bounds ``lcm``."""

    def scaled(geometry: Any, pool_bytes: int) -> PoolPlan:
        return plan_pool(geometry.groups, pool_bytes, max_large_page_bytes=largest_page_bytes)

    def largest(geometry: Any, pool_bytes: int) -> PoolPlan:
        return max_page_plan(geometry.groups, pool_bytes)

    function = {"lcm": scaled, "max": largest}[plan]
    target = "sglang_jenga.boot.construction.plan_for"
    return Hook(target, "replace", "(geometry, pool_bytes)", function)


def max_page_plan(groups: Sequence[LayerGroup], pool_bytes: int) -> PoolPlan:
    """Every small page is a large page. Raises ValueError if entries do not divide it."""
    size = max(raw_small_bytes(group) for group in groups)
    for group in groups:
        if size % group.tokens_per_page:
            raise ValueError(f"a page of {size} bytes cannot hold {group.tokens_per_page} entries")
    items = tuple(GroupPlan(group, size // group.tokens_per_page, 1) for group in groups)
    return PoolPlan(items, size, pool_bytes // size)

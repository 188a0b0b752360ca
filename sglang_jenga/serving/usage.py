"""How full the pool is, for logs, metrics and whoever balances load by them.

SGLang reports the usage of each of its pools, and of several pools the greatest. Here all groups
share the bytes. Where windows have a quarter of them and full attention another, each can still get
the other half: a third is used by either count, and half of the pool. So what is told is

    pool usage = 1 - (empty + reclaimable large pages) / large pages that can be handed out

where evicting cached prefixes alone would empty a reclaimable one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats

from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.serving.allocator import is_ours


@dataclass
class JengaPoolStats(PoolStats):
    """SGLang's record, whose token usage is the pool's. ``full``, ``swa`` and ``mamba`` usage stay
    what a group holds out of that and what it alone could still get."""

    pool_usage: float = 0.0
    gauge: Any = None  # `LargePageGauge`, where metrics are on

    def get_kv_token_stats(self) -> tuple[int, float]:
        num_used, _ = super().get_kv_token_stats()
        return num_used, self.pool_usage

    def get_max_pool_usage(self) -> float:
        return self.pool_usage

    def get_prefill_usage_msg_parts(self) -> list[str]:
        return [*super().get_prefill_usage_msg_parts(), f"pool usage: {self.pool_usage:.2f}"]

    def get_decode_usage_msg_parts(self) -> list[str]:
        return [*super().get_decode_usage_msg_parts(), f"pool usage: {self.pool_usage:.2f}"]

    def update_scheduler_stats(self, stats: Any) -> None:
        super().update_scheduler_stats(stats)
        if self.gauge is not None:
            self.gauge.tell()


class LargePageGauge:
    """The metric ``sglang:jenga_large_pages{state="empty|cached|used"}``."""

    def __init__(self, core: Allocator, metric_labels: dict[str, str]) -> None:
        from prometheus_client import Gauge  # after SGLang set its directory

        self._core, self._labels = core, metric_labels
        self._metric = Gauge(
            "sglang:jenga_large_pages",
            "Large pages of the pool: empty, emptied by evicting cached prefixes, or in use.",
            labelnames=[*metric_labels, "state"],
            multiprocess_mode="mostrecent",
        )

    def tell(self) -> None:
        for state, count in large_pages(self._core).items():
            self._metric.labels(**self._labels, state=state).set(count)


def large_pages(core: Allocator) -> dict[str, int]:
    """Large pages that can be handed out, by what would have to happen first."""
    empty, cached = core.large.num_empty, core.large.num_reclaimable
    total = core.plan.num_large - core.plan.null_larges
    return {"empty": empty, "cached": cached, "used": max(0, total - empty - cached)}


def pool_usage(core: Allocator) -> float:
    """Share of the pool that is in use, in [0, 1]."""
    pages = large_pages(core)
    return pages["used"] / max(1, sum(pages.values()))


def all_stats(original: Callable[[Any], Any], self: Any) -> Any:
    """SGLang's record of all its pools, which are one here. A lone group is as in stock."""
    stats = original(self)
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator) or len(allocator.core.plan.groups) == 1:
        return stats
    usage = pool_usage(allocator.core)
    return JengaPoolStats(**vars(stats), pool_usage=usage, gauge=self.tree_cache.large_pages)


def token_stats(original: Callable[[Any], Any], self: Any) -> Any:
    """With an encoder's tokens beside those of text the tokens that fit are no fixed number."""
    stats = original(self)
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator) or allocator.groups.encoder is None:
        return stats
    capacity = allocator.size
    used = capacity - stats.full_available_size - stats.full_evictable_size
    return replace(
        stats, full_num_used=used, full_token_usage=used / capacity, full_capacity=capacity
    )


def check_full_pool(
    original: Callable[..., tuple[bool, str]], self: Any, ps: Any, uncached: int = 0
) -> tuple[bool, str]:
    """SGLang's search for leaks, against the capacity of now (`token_stats`)."""
    allocator = self.token_to_kv_pool_allocator
    if not is_ours(allocator) or allocator.groups.encoder is None:
        return original(self, ps, uncached=uncached)
    held: tuple[bool, str] = self._check_pool_invariant(
        "full",
        ps.full_available_size,
        ps.full_evictable_size,
        self.tree_cache.protected_size(),
        self.pool_stats_observer.session_held_tokens(),
        ps.full_capacity,
        uncached,
    )
    return held

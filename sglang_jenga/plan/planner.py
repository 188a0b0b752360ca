"""Cut pool bytes into large pages, and count what a plan holds.

Pure arithmetic on ints: the same arguments give the same plan on every tensor-parallel rank. It
knows neither SGLang nor a device.

The exact least common multiple of all small pages is taken while it stays under both bounds
(`max_large_page_bytes`, and 1/256 of the pool). Above them, as with a Mamba state beside 64-token
KV pages (8.3 GiB for Falcon-H1-7B), entries are padded so that a far smaller common multiple
appears; see `_padded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import gcd, lcm

from sglang_jenga.layers.base import Load
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan, format_bytes

MAX_LARGE_PAGE_BYTES = 64 << 20
MIN_LARGE_PAGES = 256
MAX_PADDING = 1 / 8
"""Share of any entry that padding may take, unless the pool is too small for a better cut."""
REFERENCE_TOKENS = 8192
"""Length of the request whose bytes weigh the groups against each other."""
ENTRY_ALIGNMENT = 32
"""Padded entries keep the raw entry's alignment up to this: typed views need their rows aligned."""


class PoolTooSmallError(ValueError):
    """The pool cannot hold one request; the message carries the numbers."""


def plan_pool(
    groups: Sequence[LayerGroup],
    pool_bytes: int,
    *,
    largest: Load | None = None,
    max_large_page_bytes: int = MAX_LARGE_PAGE_BYTES,
) -> PoolPlan:
    """Choose the large page and every group's entry size for a pool of `pool_bytes`.

    Args:
        largest: a plan that cannot hold one such running request is refused; None for a token.
        max_large_page_bytes: no larger large page, unless one small page alone needs it or padding
            would pass `MAX_PADDING`.

    Raises:
        PoolTooSmallError: fewer large pages than one such request (or one token) needs.
        ValueError: no groups, or a number that is not positive.
    """
    if not groups:
        raise ValueError("groups must not be empty")
    if pool_bytes <= 0 or max_large_page_bytes <= 0:
        raise ValueError(
            "pool_bytes and max_large_page_bytes must be positive, got "
            f"{pool_bytes} and {max_large_page_bytes}"
        )
    if largest is not None and largest.tokens <= 0:
        raise ValueError(f"a request must have tokens, got {largest}")

    small_bytes = [raw_small_bytes(group) for group in groups]
    limit = max(*small_bytes, min(max_large_page_bytes, pool_bytes // MIN_LARGE_PAGES))
    large_bytes = lcm(*small_bytes)
    counts = tuple(large_bytes // small for small in small_bytes)
    if large_bytes > limit:
        large_bytes, counts = _padded(groups, pool_bytes, limit)

    group_plans = tuple(
        GroupPlan(group, large_bytes // (count * group.tokens_per_page), count)
        for group, count in zip(groups, counts, strict=True)
    )
    plan = PoolPlan(group_plans, large_bytes, pool_bytes // large_bytes)
    _refuse_too_small(plan, pool_bytes, largest or Load(1))
    return plan


def raw_small_bytes(group: LayerGroup) -> int:
    """Bytes of a small page without padding."""
    return group.entry_bytes * group.tokens_per_page


def _padded(
    groups: Sequence[LayerGroup], pool_bytes: int, limit: int
) -> tuple[int, tuple[int, ...]]:
    """Return the cheapest ``(large_page_bytes, smalls_per_large)`` not far over `limit`.

    A large page may exceed `limit` by an eighth, so that the largest small page can itself be
    padded. If every cut pads some group by more than `MAX_PADDING`, the limit doubles and the
    search begins again: several of the largest small pages in one large page leave less to pad.
    """
    inner = _inner_cut(groups, pool_bytes) if len(groups) > 2 else None
    cap = limit + limit // 8
    while True:
        cuts = list(_cuts(groups, cap))
        if inner is not None:
            cuts.extend(_nested_cuts(groups, cap, *inner))
        bounded = [cut for cut in cuts if _worst_padding(groups, *cut) <= MAX_PADDING]
        if bounded or (cuts and 2 * cap > pool_bytes // 16):
            return min(bounded or cuts, key=lambda cut: (_cost(groups, pool_bytes, *cut), cut))
        cap *= 2


def _largest(groups: Sequence[LayerGroup]) -> int:
    """Return the id of the group with the largest small page."""
    return max(range(len(groups)), key=lambda group_id: raw_small_bytes(groups[group_id]))


def _inner_cut(groups: Sequence[LayerGroup], pool_bytes: int) -> tuple[int, tuple[int, ...]]:
    """Cut all groups but the largest, so that `_nested_cuts` can pad that one to a multiple."""
    largest = _largest(groups)
    rest = [group for group_id, group in enumerate(groups) if group_id != largest]
    small_bytes = [raw_small_bytes(group) for group in rest]
    unit = lcm(*small_bytes)
    limit = max(*small_bytes, raw_small_bytes(groups[largest]) // 16)
    if unit <= limit:
        return unit, tuple(unit // small for small in small_bytes)
    return _padded(rest, pool_bytes, limit)


def _nested_cuts(
    groups: Sequence[LayerGroup], cap: int, unit: int, unit_counts: Sequence[int]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield cuts whose large page is a multiple of `unit`, the large page of all other groups."""
    largest = _largest(groups)
    small = raw_small_bytes(groups[largest])
    for multiple in range(1, 17):
        step = lcm(unit, multiple * _grain(groups[largest]))
        large_bytes = -(-multiple * small // step) * step
        if large_bytes <= cap:
            counts = [large_bytes // unit * count for count in unit_counts]
            yield large_bytes, (*counts[:largest], multiple, *counts[largest:])


def _grain(group: LayerGroup) -> int:
    """Bytes that a padded small page is a multiple of: its entries keep their alignment."""
    return group.tokens_per_page * gcd(group.entry_bytes, ENTRY_ALIGNMENT)


def _cuts(groups: Sequence[LayerGroup], cap: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield ``(large_page_bytes, smalls_per_large)`` worth weighing, large pages up to `cap`.

    Every cut starts from a multiple of one group's raw small page: the other groups' counts are
    the largest that fit (or slightly fewer), and the large page is rounded up until all counts
    divide it and the entries stay aligned.
    """
    small_bytes = [raw_small_bytes(group) for group in groups]
    grains = [_grain(group) for group in groups]
    fewer = 3 if len(groups) <= 3 else 1
    for base_group, small in enumerate(small_bytes):
        first = -(-max(small_bytes) // small)
        for multiple in range(first, min(cap // small, first + 63) + 1):
            fits = [multiple * small // other for other in small_bytes]
            choices = [range(max(1, fit - fewer), fit + 1) for fit in fits]
            choices[base_group] = range(multiple, multiple + 1)
            for counts in product(*choices):
                step = lcm(*(n * grain for n, grain in zip(counts, grains, strict=True)))
                large_bytes = -(-multiple * small // step) * step
                if large_bytes <= cap:
                    yield large_bytes, counts


def _cost(
    groups: Sequence[LayerGroup], pool_bytes: int, large_bytes: int, counts: Sequence[int]
) -> float:
    """Share of the pool a cut is expected to waste: padding + rounding + half-filled large pages.

    A request ends in a half-filled large page of each group that has more than one small page in
    it; packing such tails of several requests together wins half of that back.
    """
    raw = padded = 0.0
    for group, count in zip(groups, counts, strict=True):
        smalls = group.held(Load(REFERENCE_TOKENS))
        raw += smalls * raw_small_bytes(group)
        padded += smalls * large_bytes / count
    half_filled = sum(large_bytes / 4 for count in counts if count > 1)
    return (padded + half_filled) / raw - 1 + pool_bytes % large_bytes / pool_bytes


def _worst_padding(groups: Sequence[LayerGroup], large_bytes: int, counts: Sequence[int]) -> float:
    return max(
        1 - raw_small_bytes(group) * count / large_bytes
        for group, count in zip(groups, counts, strict=True)
    )


def _refuse_too_small(plan: PoolPlan, pool_bytes: int, load: Load) -> None:
    needed = larges_for_requests(plan, 1, load)
    if sum(needed) <= plan.num_large:
        return
    parts = ", ".join(
        f"{item.group.label} {count}" for item, count in zip(plan.groups, needed, strict=True)
    )
    raise PoolTooSmallError(
        f"pool of {format_bytes(pool_bytes)} holds {plan.num_large} large pages of "
        f"{format_bytes(plan.large_page_bytes)}, one request of {load.tokens} tokens needs "
        f"{sum(needed)} ({parts})"
    )


def larges_for_requests(plan: PoolPlan, num_requests: int, load: Load) -> tuple[int, ...]:
    """Count the large pages each group binds for equal running requests, tails packed together.

    The first large pages belong to `plan.null_group` for life and only its null small pages are
    lost, so that group counts as if it held them too.
    """
    smalls = [num_requests * item.group.held(load) for item in plan.groups]
    smalls[plan.null_group] += plan.null_smalls
    return tuple(
        -(-count // item.smalls_per_large) for count, item in zip(smalls, plan.groups, strict=True)
    )


def requests_held(plan: PoolPlan, load: Load) -> int:
    """Count the concurrent running requests of this size that the plan holds. O(log requests)."""
    if load.tokens <= 0:
        raise ValueError(f"a request must have tokens, got {load}")
    most = plan.num_large * max(item.smalls_per_large for item in plan.groups)
    return most_that_fits(
        most, lambda count: sum(larges_for_requests(plan, count, load)) <= plan.num_large
    )


def most_that_fits(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, 0 if none does; what is less fits as well."""
    if fits(most):
        return most  # the usual answer: a server asks this of every request that comes in
    low, high = 0, most - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def tokens_held(plan: PoolPlan, load: Load) -> int:
    """Count the tokens in context when the plan is full of such requests."""
    return load.tokens * requests_held(plan, load)


def byte_bound(plan: PoolPlan, load: Load) -> float:
    """Divide the pool by the unpadded bytes of one such request: no allocator holds more."""
    request_bytes = sum(raw_small_bytes(item.group) * item.group.held(load) for item in plan.groups)
    return plan.pool_bytes / request_bytes

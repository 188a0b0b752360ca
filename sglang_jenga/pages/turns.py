"""When eviction could empty which large page, and whose small pages lie in it. Changes no count.

A large page is reclaimable when all small pages in it are cached or empty, and not all are empty.
It has its turn when the newest of the extents in it has (paper section 5.4).
"""

from __future__ import annotations

import numpy as np

from sglang_jenga.pages.compiled import BOOKS, IDS, TIMES, compiled
from sglang_jenga.pages.layout import (
    GROUP,
    MARK,
    NEVER,
    OCCUPIED,
    OWNER,
    USED,
    K,
)


@compiled()
def _newest(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    large_id: int,
    times: np.ndarray,
) -> int:
    """Number of the extent in a large page whose time is the newest, 0 if no extent is in it."""
    k = book[base + K]
    found = 0
    for small_id in range(large_id * k, (large_id + 1) * k):
        number = holder[small_id]
        if number > 0 and (found == 0 or times[number] > times[found]):
            found = number
    return found


@compiled(f"{IDS}({BOOKS}, {IDS}, {TIMES})")
def newest_in(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    large_ids: np.ndarray,
    times: np.ndarray,
) -> np.ndarray:
    """Number of the newest extent in each of these large pages that is this group's and
    reclaimable."""
    found = np.empty(large_ids.size, dtype=np.int64)
    size = 0
    for large_id in large_ids:
        page = pages[large_id]
        if page[OWNER] == book[base + GROUP] and page[USED] == 0 < page[OCCUPIED]:
            found[size] = _newest(pages, book, holder, base, large_id, times)
            size += 1
    return found[:size].copy()


@compiled(f"int64({BOOKS}, {IDS}, {TIMES})")
def turn(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    times: np.ndarray,
) -> int:
    """When the first of the large pages that these small pages lie in has its turn; NEVER if none
    of them is reclaimable."""
    k = book[base + K]
    first, last = NEVER, -1
    for small_id in ids:
        large_id = small_id // k
        if large_id != last and pages[large_id, USED] == 0:
            found = _newest(pages, book, holder, base, large_id, times)
            first = min(first, times[found])
        last = large_id
    return first


@compiled(f"{IDS}({BOOKS}, {IDS}, {TIMES}, int64)")
def due(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    times: np.ndarray,
    time: int,
) -> np.ndarray:
    """The reclaimable large pages of these small pages whose turn comes by ``time``, in the order
    of the small pages."""
    k = book[base + K]
    seen = np.empty(ids.size, dtype=np.int64)
    found = np.empty(ids.size, dtype=np.int64)
    num_seen = size = 0
    for small_id in ids:
        large_id = small_id // k
        if pages[large_id, USED] or pages[large_id, MARK]:
            continue
        # Once for each large page: thousands of these small pages may lie in it.
        pages[large_id, MARK] = 1
        seen[num_seen] = large_id
        num_seen += 1
        if times[_newest(pages, book, holder, base, large_id, times)] <= time:
            found[size] = large_id
            size += 1
    for large_id in seen[:num_seen]:
        pages[large_id, MARK] = 0
    return found[:size].copy()


@compiled(f"int64({BOOKS}, {IDS}, {IDS})")
def first_in(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    large_ids: np.ndarray,
) -> int:
    """Index of the first of these small pages that lies in one of the large pages, or their number
    if none does."""
    k = book[base + K]
    for large_id in large_ids:
        pages[large_id, MARK] = 1
    found = ids.size
    for i in range(ids.size):
        if pages[ids[i] // k, MARK]:
            found = i
            break
    for large_id in large_ids:
        pages[large_id, MARK] = 0
    return found


@compiled(f"{IDS}({BOOKS}, {IDS})")
def extents_in(
    pages: np.ndarray, book: np.ndarray, holder: np.ndarray, base: int, large_ids: np.ndarray
) -> np.ndarray:
    """Numbers of the extents in these large pages, once for each stretch of neighbours."""
    k = book[base + K]
    found = np.empty(large_ids.size * k, dtype=np.int64)
    size = 0
    for large_id in large_ids:
        for small_id in range(large_id * k, (large_id + 1) * k):
            number = holder[small_id]
            if number > 0 and (size == 0 or found[size - 1] != number):
                found[size] = number
                size += 1
    return found[:size].copy()

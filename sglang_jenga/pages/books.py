"""The books of the pool: counts of large pages, lists of the partly filled, holders of small pages.

Whatever happens to a run of small pages (allocated, freed, cached, pinned, evicted) costs one call,
however many they are; inside, a loop over plain arrays (`layout`). `LargePages` and `Allocator` own
the arrays and say what they mean; nothing else calls this module.
"""

from __future__ import annotations

import numpy as np

from sglang_jenga.pages.compiled import BOOKS, IDS, compiled
from sglang_jenga.pages.layout import (
    AFTER,
    BEFORE,
    EMPTY,
    FIRST,
    FORMAT,
    FREE,
    GROUP,
    GROUP_FORMAT,
    HEADS,
    IS_WOKEN,
    KEPT,
    LEVEL,
    NUM_EMPTY,
    NUM_STALE,
    NUM_WOKEN,
    OCCUPIED,
    OWNER,
    RECLAIMABLE,
    SLACK,
    SPARE_RECLAIMABLE,
    SPARE_SLACK,
    STACK,
    STALE,
    TOP,
    UNBOUND,
    USED,
    USED_BY_REQUEST,
    WOKEN,
    K,
)


@compiled()
def level_of(k: int, kept: int, occupied: int) -> int:
    """Which list a partly filled large page is in, 0 for none. The highest list is filled first.

    Large pages with a kept small page come before those that eviction could still empty. Within
    each class the fullest comes first, so that emptier ones drain. One with less than an eighth
    free comes last of the kept: filling such pages would spread one request's tail over many large
    pages, and the cached small pages in them could not be given back. With rows of k + 1 levels:

        level == occupied + (k + 1) * row    row 0: nothing kept; 1: little room; 2: the others
    """
    if occupied == 0 or occupied == k:
        return 0
    if kept == 0:
        return occupied
    return occupied + (k + 1) * (2 if k - occupied >= k // 8 else 1)


@compiled()
def _relist(pages: np.ndarray, book: np.ndarray, base: int, large_id: int, level: int) -> None:
    """Move a large page to the front of another list. O(1)."""
    old, after, before = pages[large_id, LEVEL], pages[large_id, AFTER], pages[large_id, BEFORE]
    if old:
        if after >= 0:
            pages[after, BEFORE] = before
        if before >= 0:
            pages[before, AFTER] = after
        else:
            book[base + HEADS + old] = after
    pages[large_id, LEVEL] = level
    if level:
        head = book[base + HEADS + level]
        pages[large_id, AFTER], pages[large_id, BEFORE] = head, -1
        if head >= 0:
            pages[head, BEFORE] = large_id
        book[base + HEADS + level] = large_id
        book[base + TOP] = max(book[base + TOP], level)


@compiled()
def _unbind(pages: np.ndarray, book: np.ndarray, large_id: int) -> None:
    pages[large_id, OWNER] = UNBOUND
    pages[book[NUM_EMPTY], STACK] = large_id
    book[NUM_EMPTY] += 1


@compiled()
def _shift_whole(
    book: np.ndarray, base: int, count: int, used: int, kept: int, occupied: int
) -> None:
    """As `_shift` of ``count`` large pages with one small page in each. O(1): it is used, kept and
    occupied or not, so that occupied - used of them are reclaimable, and none has a slack."""
    book[base + RECLAIMABLE] += (occupied - used) * count
    book[base + SPARE_RECLAIMABLE] += (occupied - kept) * count


@compiled()
def _shift(
    pages: np.ndarray,
    book: np.ndarray,
    base: int,
    large_id: int,
    used: int,
    kept: int,
    occupied: int,
) -> None:
    """Add to the counts of one large page, and to all that follows from them. O(1)."""
    k = book[base + K]
    used_before, used_now = pages[large_id, USED], pages[large_id, USED] + used
    kept_before, kept_now = pages[large_id, KEPT], pages[large_id, KEPT] + kept
    before, now = pages[large_id, OCCUPIED], pages[large_id, OCCUPIED] + occupied
    pages[large_id, USED] = used_now
    pages[large_id, KEPT] = kept_now
    pages[large_id, OCCUPIED] = now

    book[base + SLACK] += (k - used_now) * (used_now > 0) - (k - used_before) * (used_before > 0)
    book[base + RECLAIMABLE] += int(used_now == 0 < now) - int(used_before == 0 < before)
    book[base + SPARE_SLACK] += (k - kept_now) * (kept_now > 0) - (k - kept_before) * (
        kept_before > 0
    )
    book[base + SPARE_RECLAIMABLE] += int(kept_now == 0 < now) - int(kept_before == 0 < before)
    book[base + FREE] += (k - now) * (now > 0) - (k - before) * (before > 0)
    level = level_of(k, kept_now, now)
    if level != pages[large_id, LEVEL]:
        _relist(pages, book, base, large_id, level)
    if now == 0:
        _unbind(pages, book, large_id)
        return
    woken = used_now == 0 and (used_before > 0 or now < before)
    if woken and not pages[large_id, IS_WOKEN]:
        pages[large_id, IS_WOKEN] = 1
        pages[book[NUM_WOKEN], WOKEN] = large_id
        book[NUM_WOKEN] += 1


@compiled()
def _bind(pages: np.ndarray, book: np.ndarray, base: int) -> int:
    """Take an empty large page for a group, and note it as stale if its bytes have another number
    format."""
    book[NUM_EMPTY] -= 1
    large_id: int = pages[book[NUM_EMPTY], STACK]
    pages[large_id, OWNER] = book[base + GROUP]
    pages[large_id, FIRST] = 0
    written, new = pages[large_id, FORMAT], book[base + GROUP_FORMAT]
    if written != new:
        if written != UNBOUND:
            pages[book[NUM_STALE], STALE] = large_id
            book[NUM_STALE] += 1
        pages[large_id, FORMAT] = new
    return large_id


@compiled(f"int64({BOOKS}, int64, int64, {IDS}, int64)")
def take_from(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    large_id: int,
    count: int,
    ids: np.ndarray,
    at: int,
) -> int:
    """Take up to ``count`` empty small pages of one large page, lowest ids first, into ``ids`` from
    ``at`` on. Returns how many."""
    k = book[base + K]
    taken = 0
    small_id, end = large_id * k + pages[large_id, FIRST], (large_id + 1) * k
    while taken < count and small_id < end:
        if holder[small_id] == EMPTY:
            holder[small_id] = USED_BY_REQUEST
            ids[at + taken] = small_id
            taken += 1
        small_id += 1
    pages[large_id, FIRST] = small_id - large_id * k
    if taken and k > 1:  # else nothing that is counted changes
        _shift(pages, book, base, large_id, taken, taken, taken)
    return taken


@compiled(f"int64({BOOKS}, {IDS}, int64)")
def take_new(
    pages: np.ndarray, book: np.ndarray, holder: np.ndarray, base: int, ids: np.ndarray, at: int
) -> int:
    """Bind an empty large page and take all of it, or as much as ``ids`` has room for."""
    count = min(book[base + K], ids.size - at)
    return take_from(pages, book, holder, base, _bind(pages, book, base), count, ids, at)


@compiled(f"int64({BOOKS}, int64, {IDS}, int64)")
def take_loose(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    count: int,
    ids: np.ndarray,
    at: int,
) -> int:
    """Take ``count`` small pages from partly filled large pages, the highest list first, and from
    new large pages when there are none. Returns how many were bound."""
    bound = 0
    while count:
        level = book[base + TOP]
        while level and book[base + HEADS + level] < 0:
            level -= 1
        book[base + TOP] = level
        if level:
            large_id = book[base + HEADS + level]
        else:
            large_id = _bind(pages, book, base)
            bound += 1
        taken = take_from(pages, book, holder, base, large_id, count, ids, at)
        count -= taken
        at += taken
    return bound


@compiled(f"void({BOOKS}, {IDS}, {IDS}, {IDS}, int64, {IDS})")
def take_packed(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    counts: np.ndarray,
    last: np.ndarray,
    coming: np.ndarray,
    room: int,
    ids: np.ndarray,
) -> None:
    """Take ``counts[i]`` small pages for each request of a batch, one request after another in
    ``ids``. Each request goes on in the large page of its ``last[i]``, if that is not negative;
    then it gets large pages to itself, all together at most ``room`` of them, as long as it fills
    them with what it takes now and the ``coming[i]`` that it takes later. The remainders go into
    partly filled ones. Where nothing is known of anybody, ``last`` and ``coming`` are empty."""
    k = book[base + K]
    if k == 1:  # any large page is as good as another
        take_loose(pages, book, holder, base, ids.size, ids, 0)
        return
    taken = np.zeros(counts.size, dtype=np.int64)
    at = 0
    for i in range(counts.size):
        end = at + counts[i]
        fills = counts[i]
        if last.size:
            if counts[i] and last[i] >= 0:
                taken[i] = take_from(pages, book, holder, base, last[i] // k, counts[i], ids, at)
            fills += coming[i] - taken[i]
        fills = min(fills // k, room)
        while fills and taken[i] < counts[i]:
            taken[i] += take_new(pages, book, holder, base, ids[:end], at + taken[i])
            fills -= 1
            room -= 1
        at = end
    at = 0
    for i in range(counts.size):
        take_loose(pages, book, holder, base, counts[i] - taken[i], ids, at + taken[i])
        at += counts[i]


@compiled(f"boolean({BOOKS}, {IDS}, int32, int32, int64, int64, int64)")
def move(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    before: int,
    after: int,
    used: int,
    kept: int,
    occupied: int,
) -> bool:
    """Change the holder of small pages from ``before`` to ``after``.

    Each adds ``used``, ``kept`` and ``occupied`` to the counts of its large page. False, and
    nothing has changed, if one of them has another holder than ``before`` or is listed twice.
    """
    k = book[base + K]
    for i in range(ids.size):
        if holder[ids[i]] != before:
            for j in range(i):
                holder[ids[j]] = before
            return False
        holder[ids[i]] = after
    if k == 1:
        _shift_whole(book, base, ids.size, used, kept, occupied)
        if after == EMPTY:
            for large_id in ids:
                _unbind(pages, book, large_id)
        return True
    i = 0
    while i < ids.size:
        large_id, start, first = ids[i] // k, i, k
        while i < ids.size and ids[i] // k == large_id:
            first = min(first, ids[i] - large_id * k)
            i += 1
        count = i - start
        if after == EMPTY and first < pages[large_id, FIRST]:
            pages[large_id, FIRST] = first
        _shift(pages, book, base, large_id, used * count, kept * count, occupied * count)
    return True


@compiled(f"void({BOOKS}, {IDS}, int64, int64)")
def count(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    used: int,
    kept: int,
) -> None:
    """Add ``used`` and ``kept`` to the counts of a large page, once for each of these small pages
    in it."""
    k = book[base + K]
    if k == 1:
        _shift_whole(book, base, ids.size, used, kept, 0)
        return
    i = 0
    while i < ids.size:
        large_id, start = ids[i] // k, i
        while i < ids.size and ids[i] // k == large_id:
            i += 1
        _shift(pages, book, base, large_id, used * (i - start), kept * (i - start), 0)

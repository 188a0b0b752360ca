"""The books of the pool, kept by compiled loops: counts of large pages, holders of small ones.

Whatever happens to a run of small pages (allocated, freed, cached, pinned, evicted) costs one call,
however many they are; inside, a loop over plain arrays. `LargePages` and `Allocator` own the arrays
and say what they mean; nothing else calls this module.

    pages   int32 [num_large, columns]   one row per large page, columns below
    book    int64 [...]                  pool-wide numbers, then a block per group: `block_size`
    holder  int32 [num_small] per group  EMPTY, USED_BY_REQUEST, NULL, or an extent's number

``base`` is where a group's block begins in ``book``. All compiled functions and their constants
stay in this one file: numba keeps machine code on disk and renews it when this file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

EMPTY, USED_BY_REQUEST, NULL = 0, -1, -2
UNBOUND = -1

# Columns of ``pages``. The last five are lists and marks, which share only the storage of rows.
OWNER, USED, KEPT, OCCUPIED = 0, 1, 2, 3
LEVEL, AFTER, BEFORE = 4, 5, 6  # doubly linked lists of partly filled large pages
FORMAT = 7  # group whose number format the bytes have, UNBOUND: zero, which reads as any
STACK, WOKEN, IS_WOKEN, STALE, MARK = 8, 9, 10, 11, 12
COLUMNS = 13

# Places in ``book`` for the whole pool, and in the block of a group.
NUM_EMPTY, NUM_WOKEN, NUM_STALE, POOL = 0, 1, 2, 3
GROUP, K, GROUP_FORMAT, FREE, SLACK, IDLE, SPARE_SLACK, SPARE_IDLE, TOP, HEADS = range(10)

NEVER = np.iinfo(np.int64).max

_Function = TypeVar("_Function", bound=Callable[..., Any])


def block_size(k: int) -> int:
    """Places that a group with ``k`` small pages per large page needs in ``book``: its counters and
    the heads of its lists, `PartlyFilled levels <_level>` in number."""
    return HEADS + 3 * (k + 1)


def _compiled(signature: str | None = None) -> Callable[[_Function], _Function]:
    """Compile; with a signature at once, so that no request waits for it. The machine code is kept
    on disk where numba finds a place for it."""

    def compile_now(function: _Function) -> _Function:
        arguments = () if signature is None else (signature,)
        compiled: _Function
        try:
            compiled = njit(*arguments, cache=True)(function)
        except RuntimeError:  # no folder that can be written to
            compiled = njit(*arguments)(function)
        return compiled

    return compile_now


_BOOKS = "int32[:,::1], int64[::1], int32[::1], int64"  # pages, book, holder, base
_IDS = "int64[::1]"


@_compiled()
def _level(k: int, kept: int, occupied: int) -> int:
    """List of a large page among the partly filled ones, 0 for none; the highest is filled first.

    Those with a page that stays come before those that eviction could still empty. Among each the
    fuller come before the emptier, for those to drain; but where less than an eighth is free, last:
    a request's tail would be spread over many large pages, and keep the cached small pages in them
    from being given back. With rows of k + 1 levels:

        level == occupied + (k + 1) * row    row 0: only evictable; 1: little room; 2: the others
    """
    if occupied == 0 or occupied == k:
        return 0
    if kept == 0:
        return occupied
    return occupied + (k + 1) * (2 if k - occupied >= k // 8 else 1)


@_compiled()
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


@_compiled()
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
    book[base + IDLE] += int(used_now == 0 < now) - int(used_before == 0 < before)
    book[base + SPARE_SLACK] += (k - kept_now) * (kept_now > 0) - (k - kept_before) * (
        kept_before > 0
    )
    book[base + SPARE_IDLE] += int(kept_now == 0 < now) - int(kept_before == 0 < before)
    book[base + FREE] += (k - now) * (now > 0) - (k - before) * (before > 0)
    level = _level(k, kept_now, now)
    if level != pages[large_id, LEVEL]:
        _relist(pages, book, base, large_id, level)
    if now == 0:
        pages[large_id, OWNER] = UNBOUND
        pages[book[NUM_EMPTY], STACK] = large_id
        book[NUM_EMPTY] += 1
        return
    # Where a large page is one small page, its turn is that of its extent.
    woken = k > 1 and used_now == 0 and (used_before > 0 or now < before)
    if woken and not pages[large_id, IS_WOKEN]:
        pages[large_id, IS_WOKEN] = 1
        pages[book[NUM_WOKEN], WOKEN] = large_id
        book[NUM_WOKEN] += 1


@_compiled()
def _bind(pages: np.ndarray, book: np.ndarray, base: int) -> int:
    """Take an empty large page for a group; its bytes are stale if they are of another format."""
    book[NUM_EMPTY] -= 1
    large_id: int = pages[book[NUM_EMPTY], STACK]
    pages[large_id, OWNER] = book[base + GROUP]
    written, new = pages[large_id, FORMAT], book[base + GROUP_FORMAT]
    if written != new:
        if written != UNBOUND:
            pages[book[NUM_STALE], STALE] = large_id
            book[NUM_STALE] += 1
        pages[large_id, FORMAT] = new
    return large_id


@_compiled(f"int64({_BOOKS}, int64, int64, {_IDS}, int64)")
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
    for small_id in range(large_id * k, (large_id + 1) * k):
        if taken == count:
            break
        if holder[small_id] == EMPTY:
            holder[small_id] = USED_BY_REQUEST
            ids[at + taken] = small_id
            taken += 1
    if taken:
        _shift(pages, book, base, large_id, taken, taken, taken)
    return taken


@_compiled(f"int64({_BOOKS}, {_IDS}, int64)")
def take_new(
    pages: np.ndarray, book: np.ndarray, holder: np.ndarray, base: int, ids: np.ndarray, at: int
) -> int:
    """Bind an empty large page and take all of it, or as much as ``ids`` has room for."""
    count = min(book[base + K], ids.size - at)
    return take_from(pages, book, holder, base, _bind(pages, book, base), count, ids, at)


@_compiled(f"int64({_BOOKS}, int64, {_IDS}, int64)")
def take_loose(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    count: int,
    ids: np.ndarray,
    at: int,
) -> int:
    """Fill partly filled large pages, the best first, and bind new ones for the rest. Returns how
    many were bound."""
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


@_compiled(f"void({_BOOKS}, {_IDS}, int64, {_IDS})")
def take_packed(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    counts: np.ndarray,
    room: int,
    ids: np.ndarray,
) -> None:
    """``counts[i]`` small pages for each request of a batch, one after another in ``ids``: whole
    large pages for each alone, at most ``room`` in all, and the remainders into the fullest."""
    k = book[base + K]
    wholes = np.empty(counts.size, dtype=np.int64)
    at = 0
    for i in range(counts.size):
        wholes[i] = min(counts[i] // k, room)
        room -= wholes[i]
        for place in range(at, at + wholes[i] * k, k):
            take_new(pages, book, holder, base, ids, place)
        at += counts[i]
    at = 0
    for i in range(counts.size):
        whole = wholes[i] * k
        take_loose(pages, book, holder, base, counts[i] - whole, ids, at + whole)
        at += counts[i]


@_compiled(f"boolean({_BOOKS}, {_IDS}, int32, int32, int64, int64, int64)")
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
    """Small pages go from one holder to another; each adds so much to the counts of its large page.

    False, and nothing has changed, if one of them is not with ``before`` or is listed twice.
    """
    k = book[base + K]
    for i in range(ids.size):
        if holder[ids[i]] != before:
            for j in range(i):
                holder[ids[j]] = before
            return False
        holder[ids[i]] = after
    i = 0
    while i < ids.size:
        large_id, start = ids[i] // k, i
        while i < ids.size and ids[i] // k == large_id:
            i += 1
        count = i - start
        _shift(pages, book, base, large_id, used * count, kept * count, occupied * count)
    return True


@_compiled(f"void({_BOOKS}, {_IDS}, int64, int64)")
def count(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    used: int,
    kept: int,
) -> None:
    """Add so much to the counts of the large pages of these small pages, for each of them."""
    k = book[base + K]
    i = 0
    while i < ids.size:
        large_id, start = ids[i] // k, i
        while i < ids.size and ids[i] // k == large_id:
            i += 1
        _shift(pages, book, base, large_id, used * (i - start), kept * (i - start), 0)


@_compiled()
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


@_compiled(f"{_IDS}({_BOOKS}, {_IDS}, int64[::1])")
def newest_in(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    large_ids: np.ndarray,
    times: np.ndarray,
) -> np.ndarray:
    """Numbers of the newest extent in each of these large pages that is idle and of this group."""
    found = np.empty(large_ids.size, dtype=np.int64)
    size = 0
    for large_id in large_ids:
        page = pages[large_id]
        if page[OWNER] == book[base + GROUP] and page[USED] == 0 < page[OCCUPIED]:
            found[size] = _newest(pages, book, holder, base, large_id, times)
            size += 1
    return found[:size].copy()


@_compiled(f"int64({_BOOKS}, {_IDS}, int64[::1])")
def turn(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    times: np.ndarray,
) -> int:
    """When the first of the large pages that these small pages lie in has its turn to be emptied:
    the least of their newest times. NEVER if none of them is idle."""
    k = book[base + K]
    first, last = NEVER, -1
    for small_id in ids:
        large_id = small_id // k
        if large_id != last and pages[large_id, USED] == 0:
            found = _newest(pages, book, holder, base, large_id, times)
            first = min(first, times[found])
        last = large_id
    return first


@_compiled(f"{_IDS}({_BOOKS}, {_IDS}, int64[::1], int64)")
def due(
    pages: np.ndarray,
    book: np.ndarray,
    holder: np.ndarray,
    base: int,
    ids: np.ndarray,
    times: np.ndarray,
    time: int,
) -> np.ndarray:
    """Idle large pages of these small pages, in their order, whose turn comes by ``time``."""
    k = book[base + K]
    found = np.empty(ids.size, dtype=np.int64)
    size = 0
    for small_id in ids:
        large_id = small_id // k
        if pages[large_id, USED] or pages[large_id, MARK]:
            continue
        if times[_newest(pages, book, holder, base, large_id, times)] <= time:
            pages[large_id, MARK] = 1
            found[size] = large_id
            size += 1
    for large_id in found[:size]:
        pages[large_id, MARK] = 0
    return found[:size].copy()


@_compiled(f"int64({_BOOKS}, {_IDS}, {_IDS})")
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


@_compiled(f"{_IDS}({_BOOKS}, {_IDS})")
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

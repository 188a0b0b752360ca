"""How the books of the pool lie in plain arrays, for compiled loops to read and write.

`LargePages` makes and owns them; its equations say what the numbers mean.

    pages   int32 [num_large, COLUMNS]   one row per large page, columns below
    book    int64 [...]                  numbers of the whole pool, then a block per group
    holder  int32 [num_small] per group  EMPTY, USED_BY_REQUEST, NULL, or an extent's number
    base    int                          where a group's block begins in ``book``
"""

from __future__ import annotations

EMPTY, USED_BY_REQUEST, NULL = 0, -1, -2
UNBOUND = -1
FOREIGN = -2  # number format of bytes that are no group's entries

# Columns of ``pages``. The last five are lists and marks, which share only the storage of rows.
OWNER, USED, KEPT, OCCUPIED = 0, 1, 2, 3
LEVEL, AFTER, BEFORE = 4, 5, 6  # doubly linked lists of partly filled large pages
FORMAT = 7  # group whose number format the bytes have, FOREIGN; UNBOUND: zero, reads as any
FIRST = 8  # of a bound large page: so many small pages at its beginning are not empty, at least
STACK, WOKEN, IS_WOKEN, STALE, MARK = 9, 10, 11, 12, 13
COLUMNS = 14

# Places in ``book`` for the whole pool, and in the block of a group.
NUM_EMPTY, NUM_WOKEN, NUM_STALE, POOL = 0, 1, 2, 3
GROUP, K, GROUP_FORMAT = 0, 1, 2
FREE, SLACK, RECLAIMABLE, SPARE_SLACK, SPARE_RECLAIMABLE = 3, 4, 5, 6, 7
TOP, HEADS = 8, 9  # the highest list with anything in it, at most; the heads of the lists

NEVER = (1 << 63) - 1
"""Later than every time."""


def block_size(k: int) -> int:
    """Places that a group with ``k`` small pages per large page needs in ``book``: its counters and
    the heads of its lists, one per `books.level_of`."""
    return HEADS + 3 * (k + 1)

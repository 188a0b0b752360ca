"""Rows of running requests: which of their pages are their own, and which are the trees'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.common import coalesce_ranges

from sglang_jenga.pages.tables import expand
from sglang_jenga.radix.node import Node, TokenPages
from sglang_jenga.radix.tree import RadixTrees


class Rows:
    """The pages of a row's positions, per token group:

    [0, protected)        the trees'; locked
    [protected, slid)     of mapped groups given back already: the window has left them
    [protected or slid, allocated)    the request's own
    """

    def __init__(self, allocator: Any, req_to_token_pool: Any) -> None:
        self._allocator, self._pool = allocator, req_to_token_pool
        self._groups, self._tables = allocator.groups, allocator.tables
        self._page_size = allocator.page_size

    def own_pages(self, kv: Any, end: int) -> list[TokenPages]:
        """What the request may offer to the trees: per token group its own pages up to ``end``."""
        return [
            TokenPages(
                begin,
                self._tables.pages(group_id, kv.req_pool_idx, begin, end).astype(np.int64),
            )
            for group_id, begin in self._own_from(kv)
        ]

    def _own_from(self, kv: Any) -> Iterator[tuple[int, int]]:
        """Per token group the position from which on the request's row holds pages of its own."""
        for group_id in self._groups.of_tokens:
            slid = 0
            if group_id in self._groups.mapped:
                slid = kv.get_evicted_seqlen(self._groups.cursor(group_id))
            yield group_id, max(kv.cache_protected_len, slid)

    def repoint(self, row: int, trees: RadixTrees, node: Node, start: int) -> None:
        """The row's positions from ``start`` on now lie in the tree's pages, not in the request's
        own copies."""
        first = start // self._page_size
        pages = {
            group_id: trees.pages_to(node, group_id)[first:] for group_id in self._groups.of_tokens
        }
        for group_id, ids in pages.items():
            self._tables.rows[group_id][row, first : first + ids.size] = ids
        for slot_map in self._allocator.slot_maps.values():
            slot_map.upload()  # before a step could read the row with the old map
        slots = self._allocator.to_device(expand(pages[self._groups.row], self._page_size))
        self._pool.write((row, slice(start, node.end)), slots.to(torch.int32))

    def free(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Give back what of these positions is the request's own."""
        row, free = kv.req_pool_idx, self._allocator.free_row_pages
        dead_begin = kv.swa_dead_lo(self._page_size)
        for start, end in coalesce_ranges(ranges):
            start = max(start, kv.cache_protected_len)
            free(self._groups.row, row, start, end)
            for group_id in self._groups.mapped:
                slid = kv.get_evicted_seqlen(self._groups.cursor(group_id))
                free(group_id, row, start, min(end, dead_begin))
                free(group_id, row, max(start, dead_begin, slid), end)

    def changed(self, node: Node, group_id: int) -> None:
        """The trees have got or lost pages of tokens that they have the full pages of."""
        slot_map = self._allocator.slot_maps.get(group_id)
        if slot_map is None:
            return
        own, full = node.extents[group_id], node.extents[self._groups.row].ids
        if own is None:
            slot_map.part(full)
        else:
            slot_map.pair(full, own.ids)

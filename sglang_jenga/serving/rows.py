"""Rows of running requests: which of their pages are their own, and which are the trees'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.common import coalesce_ranges

from sglang_jenga.pages.tables import expand
from sglang_jenga.radix.node import NO_TOKENS, Node, TokenPages
from sglang_jenga.radix.tree import RadixTrees


class Rows:
    """The pages of a row's positions, per token group:

    [0, protected)          the trees'; locked
    [protected, allocated)  the request's own, but for
    given_up                of mapped groups, which a window has left behind: they are gone
    """

    def __init__(self, allocator: Any, req_to_token_pool: Any) -> None:
        self._allocator, self._pool = allocator, req_to_token_pool
        self._groups, self._tables = allocator.groups, allocator.tables
        self._page_size = allocator.page_size

    def own_pages(self, kv: Any, end: int) -> list[TokenPages]:
        """What the request may offer to the trees: per token group its own pages up to ``end``."""
        return [self._own(kv, group_id, end) for group_id in self._groups.of_tokens]

    def _own(self, kv: Any, group_id: int, end: int) -> TokenPages:
        begin, gone = kv.cache_protected_len, NO_TOKENS
        if group_id in self._groups.mapped:
            gone = self._groups.given_up(kv, group_id)
            if gone[0] == begin:  # nothing is left before them
                begin, gone = gone[1], NO_TOKENS
            elif gone[0] == gone[1]:
                gone = NO_TOKENS
        begin, end = self._tables.span(group_id, kv.req_pool_idx, begin, end)
        ids = self._tables.pages(group_id, kv.req_pool_idx, begin, end)
        return TokenPages(begin, ids.astype(np.int64), gone)

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
        slots = self._allocator.to_device(expand(self.named(pages), self._page_size))
        self._pool.write((row, slice(start, node.end)), slots.to(torch.int32))

    def named(self, pages: Mapping[int, np.ndarray]) -> np.ndarray:
        """Of the pages of a path, per group, those that a row names. Of its groups one has a page
        at each position, and the others the null page, which is 0."""
        first, *others = (pages[group_id] for group_id in self._groups.of_rows)
        return sum(others, start=first)

    def free(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Give back what of these positions is the request's own."""
        row, free = kv.req_pool_idx, self._allocator.free_row_pages
        gone = [(group_id, self._groups.given_up(kv, group_id)) for group_id in self._groups.mapped]
        for start, end in coalesce_ranges(ranges):
            start = max(start, kv.cache_protected_len)
            for group_id in self._groups.of_rows:
                free(group_id, row, start, end)
            for group_id, (first, last) in gone:
                free(group_id, row, start, min(end, first))
                free(group_id, row, max(start, last), end)

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

"""A request that has the server to itself: all that is cached may go for it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from sglang_jenga.plan.planner import most_that_fits
from sglang_jenga.serving.encoders import encoder_length, missing_encoder


class LoneRequest:
    """Cuts a prompt into chunks that fit, down to one small page at a time.

    It is served exactly if its need fits an empty pool: what it holds already is not asked for
    again, and its own cached prefix, which it has locked, counts as held.
    """

    def __init__(self, allocator: Any) -> None:
        self._core, self._groups = allocator.core, allocator.groups
        self._capacity, self._page_size = allocator.capacity, allocator.page_size

    def chunk(self, req: Any, extend: int, new: int, limit: int | None) -> int | None:
        """Tokens that its next chunk may have: ``extend`` at most if ``limit`` allows as much,
        whole pages otherwise; None if it does not fit now. ``new``: of its answer."""
        page_size, groups = self._page_size, self._groups
        prefix = req.prefix_len
        encoder = missing = 0
        if groups.encoder is not None:
            encoder, missing = encoder_length(req), missing_encoder(req)
        rest = self._capacity.need_of_rest(prefix, prefix + extend + new, encoder=encoder)
        if groups.state is not None and req.kv.holds_kv:
            rest[groups.state] = 0  # it has its states

        def fits(chunk: int) -> bool:
            # Every token group has to hold the chunk, the last one while the window is read too. A
            # request that decodes then takes its first token while the last chunk is still read.
            decodes = chunk == extend and new > 1
            need = list(rest)
            need[groups.row] = max(-(-chunk // page_size) - missing, rest[groups.row])
            for group_id in groups.mapped:
                need[group_id] = max(-(-(chunk + decodes) // page_size), rest[group_id])
            return self._core.fits_after_evicting(need)

        chunk = extend if limit is None else min(extend, limit)
        if not fits(chunk):
            most = 0 if limit is None else (chunk - 1) // page_size
            chunk = most_that_fits(most, lambda pages: fits(pages * page_size)) * page_size
        if chunk < extend:
            chunk -= chunk % page_size
            if chunk > self.window_large:
                chunk -= chunk % self.window_large
        return chunk or None

    @cached_property
    def window_large(self) -> int:
        """Tokens in a large page of windows; 1 without windows. A lone request takes such large
        pages whole and leaves them behind one after the other, so that there are no gaps."""
        plans = [self._core.plan.groups[group] for group in self._groups.mapped]
        sizes = (plan.smalls_per_large * plan.group.tokens_per_page for plan in plans)
        return max(sizes, default=1)

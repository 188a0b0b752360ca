"""What every request holds, on the host: SGLang's ``req_to_token`` mirrored in small pages."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from sglang_jenga.layers.base import Address
from sglang_jenga.pages.allocator import Chunks
from sglang_jenga.plan.spec import PoolPlan


def span(address: Address, start: Any, end: Any, border: Any) -> tuple[Any, Any]:
    """Of the positions ``[start, end)`` of a row, those at which a group that is found this way has
    pages. ``border``: the row's encoder has the positions before it. Numbers, or arrays of one per
    request."""
    if address is Address.ENCODER:
        return np.minimum(start, border), np.minimum(end, border)
    return np.maximum(start, border), np.maximum(end, border)


def _untouched(num_rows: int, pages: int) -> np.ndarray:
    """Zeros, ``[num_rows, pages]`` int32, that take memory where they are written, 4 KiB at a time.

    NumPy asks for huge pages, and the kernel clears 2 MiB where a row begins: milliseconds on the
    scheduler's thread, and all memory that requests of full length in every row would take.
    """
    memory = mmap.mmap(-1, max(1, 4 * num_rows * pages), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.int32, count=num_rows * pages).reshape(num_rows, pages)


class PageTables:
    """Host mirror of ``req_to_token``: per attention group ``[num_rows, pages]`` small ids, int32.

    What no request has reached costs address space only. ``borders[row]``: how many positions are
    those of the request's encoder, which come first; 0 for requests without one. There the row
    names the slots of one group, and behind it those of another.
    """

    def __init__(self, plan: PoolPlan, num_rows: int, max_tokens: int) -> None:
        self.tokens_per_page = plan.tokens_per_page
        pages = -(-max_tokens // self.tokens_per_page)
        self.rows = [
            _untouched(num_rows, pages)
            for item in plan.groups
            if item.group.kind.address is not Address.REQUEST  # one slot is no table
        ]
        self._addresses = [item.group.kind.address for item in plan.groups]
        self._encoders = Address.ENCODER in self._addresses
        self.borders = np.zeros(num_rows, dtype=np.int64)

    def span(self, group_id: int, row: int, start: int, end: int) -> tuple[int, int]:
        """Of the positions ``[start, end)``, those at which the group has pages."""
        if not self._encoders:
            return start, end
        first, last = span(self._addresses[group_id], start, end, self.borders[row])
        return int(first), int(last)

    def pages(self, group_id: int, row: int, start: int, end: int) -> np.ndarray:
        """Small ids of the group's pages that hold positions ``[start, end)`` of a row."""
        step = self.tokens_per_page
        start, end = self.span(group_id, row, start, end)
        return self.rows[group_id][row, start // step : -(-end // step)]

    def slots(self, group_id: int, row: int, start: int, end: int) -> np.ndarray:
        """SGLang's slots of positions ``[start, end)``, int64."""
        return expand(self.pages(group_id, row, start, end), self.tokens_per_page)[
            start % self.tokens_per_page :
        ][: end - start]

    def enter_prefixes(self, step: StepDemand) -> None:
        """Write the matched prefixes of a step's fresh requests."""
        for index in step.fresh:
            if step.starts[index]:
                assert step.prefix_pages is not None, "a hit has pages"
                for group_id, table in enumerate(self.rows):
                    pages = step.prefix_pages(step.reqs[index], group_id)
                    table[step.rows[index], : pages.size] = pages

    def chunks(self, group_id: int, step: StepDemand) -> Chunks | None:
        """What the allocator is told of a step's prompts in a group of text; None of other steps,
        and with encoders, whose tokens and text lie in different groups."""
        if step.coming is None or step.borders is not None:
            return None
        follows = step.starts > 0
        follows[step.fresh] = False  # what they hit is not in the table yet
        last = np.full_like(step.starts, -1)
        before = (step.starts[follows] - 1) // self.tokens_per_page
        last[follows] = self.rows[group_id][step.rows[follows], before]
        return Chunks(group_id, last, step.coming)

    def enter(self, group_id: int, step: StepDemand, ids: np.ndarray) -> np.ndarray:
        """Write a step's new small pages; the slots of its tokens, int64.

        ``ids``: one request's after another's, ``step.pages[i]`` of each."""
        table, per_page = self.rows[group_id], self.tokens_per_page
        if step.borders is not None:
            return self._enter_parts(table, *step.span(self._addresses[group_id]), step.rows, ids)
        if len(step.reqs) == len(ids) and per_page == 1:  # decode: one token, one small page each
            table[step.rows, step.starts] = ids
            return ids
        at = 0
        parts = []
        for row, start, end, count in step.spans():
            first = -(-start // per_page)
            table[row, first : first + count] = ids[at : at + count]
            at += count
            if per_page > 1:
                parts.append(self.slots(group_id, row, start, end))
        return np.concatenate(parts) if per_page > 1 else ids

    @staticmethod
    def _enter_parts(
        table: np.ndarray, starts: np.ndarray, ends: np.ndarray, rows: np.ndarray, ids: np.ndarray
    ) -> np.ndarray:
        """As `enter`, where requests have pages of a part of their positions, ``[start, end)``."""
        if ids.size:
            counts = ends - starts
            first = starts - (np.cumsum(counts) - counts)
            table[np.repeat(rows, counts), np.repeat(first, counts) + np.arange(ids.size)] = ids
        return ids

    def in_row_order(self, step: StepDemand, ids: Sequence[np.ndarray]) -> np.ndarray:
        """The slots of a step as rows name them, of two groups: each request's encoder first."""
        encoder = self._addresses.index(Address.ENCODER)
        row = self._addresses.index(Address.ROW)
        if not ids[encoder].size:
            return ids[row]
        starts, ends = step.span(Address.ENCODER)
        of_encoder = np.repeat(np.tile([True, False], len(step.reqs)), _pairs(ends - starts, step))
        slots = np.empty(of_encoder.size, dtype=np.int64)
        slots[of_encoder], slots[~of_encoder] = ids[encoder], ids[row]
        return slots


def _pairs(encoder: np.ndarray, step: StepDemand) -> np.ndarray:
    return np.stack([encoder, step.pages - encoder], axis=1).ravel()


def expand(small_ids: np.ndarray, tokens_per_page: int) -> np.ndarray:
    """All slots of small pages, in order, int64; with one token per page that may be the ids."""
    ids = small_ids.astype(np.int64, copy=False)
    if tokens_per_page == 1:
        return ids
    return (ids[:, None] * tokens_per_page + np.arange(tokens_per_page)).ravel()


class StepDemand:
    """What a batch is about to allocate: tokens ``[starts[i], ends[i])`` of ``reqs[i]``.

    ``pages[i]``: new small pages of request i in each group where a token takes an entry. These are
    arrays, since a decode step has hundreds of requests. ``rows``: their rows, if known already.
    ``fresh``: indices of the requests without a row yet. The pages of their matched prefix,
    ``prefix_pages(req, group_id)``, enter the page tables. ``borders``: how many positions of each
    request are its encoder's, where the model has one. ``totals``: tokens of each whole prompt, in
    a batch of prompts; ``coming[i]``: small pages that the rest of prompt i takes after this chunk.
    """

    __slots__ = (
        "_rows",
        "borders",
        "coming",
        "ends",
        "fresh",
        "num_pages",
        "pages",
        "prefix_pages",
        "reqs",
        "starts",
    )

    def __init__(
        self,
        reqs: Sequence[Any],
        starts: np.ndarray,
        ends: np.ndarray,
        tokens_per_page: int,
        *,
        rows: np.ndarray | None = None,
        fresh: Sequence[int] = (),
        prefix_pages: Callable[[Any, int], np.ndarray] | None = None,
        borders: np.ndarray | None = None,
        totals: np.ndarray | None = None,
    ) -> None:
        self.reqs, self.starts, self.ends, self.fresh = reqs, starts, ends, fresh
        self.prefix_pages, self.borders = prefix_pages, borders
        self._rows = rows
        step = tokens_per_page
        self.pages = ends - starts if step == 1 else -(-ends // step) - -(-starts // step)
        self.num_pages = int(self.pages.sum())
        self.coming = None if totals is None else -(-totals // step) - -(-ends // step)

    @property
    def rows(self) -> np.ndarray:
        """Rows of all requests; fresh ones must have got theirs."""
        if self._rows is None:
            self._rows = np.array([req.kv.req_pool_idx for req in self.reqs])
        return self._rows

    @property
    def num_encoder(self) -> int:
        """Of ``num_pages``, those of encoders' tokens."""
        if self.borders is None:
            return 0
        starts, ends = self.span(Address.ENCODER)
        return int((ends - starts).sum())

    def span(self, address: Address) -> tuple[np.ndarray, np.ndarray]:
        """Of each request's positions, those at which a group that is found this way has pages."""
        return span(address, self.starts, self.ends, self.borders)

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        """Row, start, end and new pages of each request."""
        lists = (array.tolist() for array in (self.rows, self.starts, self.ends, self.pages))
        return zip(*lists, strict=True)

"""SGLang's allocator face: tokens and slots on its side, small pages on ours.

What every request holds is known on the host, from `PageTables`; the device gets copies. No method
that a running step calls reads a device tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

from sglang_jenga.memory.buffer import PoolBuffer
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.tables import PageTables, StepDemand
from sglang_jenga.plan.planner import most_that_fits
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.serving.admission import JengaDenseBudget, JengaStateBudget, JengaSWABudget
from sglang_jenga.serving.groups import ServedGroups
from sglang_jenga.serving.pressure import Pressure
from sglang_jenga.serving.slot_map import SlotMap


class _JengaAllocator:
    """Common to dense and hybrid models; mixed into SGLang's allocator base classes.

    SGLang asks for tokens without saying whose. The hooks around its two allocation functions put
    the batch into ``step`` first, so demands are exact and requests have names.
    """

    def _setup(
        self,
        core: Allocator,
        tables: PageTables,
        kvcache: Any,
        *,
        buffer: PoolBuffer,
        forward_stream: Any,
        dtype: torch.dtype,
        device: str,
        max_tokens: int,
    ) -> None:
        self.core = core
        self.tables = tables
        self.buffer = buffer
        self.forward_stream = forward_stream
        self.page_size = tables.tokens_per_page
        self.dtype = dtype
        self.device = device
        self.max_tokens = max_tokens
        self.need_sort = False
        self.free_pages = self.release_pages = self.free_group = None
        self._kvcache = kvcache
        self._step: StepDemand | None = None
        self.groups = ServedGroups(core.plan)
        self.pressure = Pressure(core)
        self.rounds_stuck = 0  # see scheduling.next_batch
        self.was_asked = False  # whether admission was, in this round
        # The queue in which nobody more could be admitted, and for how many rounds that stands.
        self.refused: tuple[int, str | None] = (0, None)
        self.rounds_refused = 0
        # Per group whose pages are found through the full ones: where they lie.
        self.slot_maps = {
            group_id: SlotMap(
                core.plan.num_small(self.groups.row), self.page_size, device, self.to_device
            )
            for group_id in self.groups.mapped
        }
        # States that a new request takes: its own and those it is tracked in.
        self.states_per_request = 0
        # Says how many a decode step takes besides; None where it never does.
        self.states_of_step: Callable[[Sequence[Any]], int] | None = None

    # ---- capacity ---------------------------------------------------------------------------

    @cached_property
    def request_need(self) -> RequestNeed:
        return RequestNeed(self.core.plan, self.states_per_request)

    def need_of_rest(self, held: int, tokens: int) -> list[int]:
        """Small pages per group that a request of ``tokens`` tokens takes beyond those that it
        holds, or has locked, for the first ``held`` of them, a whole number of pages."""
        need = self.request_need.pages(tokens)
        kinds = self.groups.kinds
        return [
            max(0, count - kind.alive_pages(held, self.page_size))
            for count, kind in zip(need, kinds, strict=True)
        ]

    def max_new_tokens_for_memory(
        self,
        input_tokens: int,
        max_new_tokens: int,
        *,
        token_capacity: int,
        sliding_window_size: int | None,
        chunk_size: int | None,
    ) -> int | None:
        """The most new tokens with which the request fits an empty pool, None if it never does."""
        at_once = 0 if chunk_size else input_tokens
        longest = self.request_need.longest(input_tokens + max_new_tokens, at_once=at_once)
        return None if longest < input_tokens else longest - input_tokens

    def available_size(self) -> int:
        """Tokens that every group at once could take now, without evicting."""
        most = min(self.core.obtainable(group) for group in self.groups.of_tokens)
        if len(self.groups.of_tokens) > 1:
            need, size = self.groups.need, self.page_size
            most = most_that_fits(most, lambda pages: self.core.fits_now(need(pages * size)))
        return most * self.page_size

    def group_available(self, group_id: int) -> int:
        """Tokens one group alone could take, the cached pages of other groups given up for it.

        Its own cached pages are not in it: SGLang counts them as evictable beside this number.
        """
        large = self.core.large
        larges = large.num_empty + large.num_reclaimable - large.reclaimable[group_id]
        smalls = large.free[group_id] + larges * self.core.plan.groups[group_id].smalls_per_large
        return smalls * self.page_size

    def group_allocated(self, group_id: int) -> int:
        """Tokens' worth of small pages handed out to requests or held by the cache."""
        return (self.core.num_used[group_id] + self.core.num_cached[group_id]) * self.page_size

    def tokens_beside(self, states: int) -> int:
        """Tokens that fit together with ``states`` more states once everything cached is evicted;
        -1 if the states alone do not fit. Negative ``states``: that many are about to be given up,
        which frees large pages only where one state fills one."""
        large, plans = self.core.large, self.core.plan.groups
        row, state = self.groups.row, self.groups.state
        short = states - large.slack[state]
        if plans[state].smalls_per_large > 1:
            short = max(0, short)
        larges = (
            large.num_empty + large.num_reclaimable - -(-short // plans[state].smalls_per_large)
        )
        if larges < 0:
            return -1
        return (large.slack[row] + larges * plans[row].smalls_per_large) * self.page_size

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool:
        """Make room for the step being allocated; ``num_tokens`` counts if there is none."""
        if self._step is not None:
            num_tokens = self._step.num_pages * self.page_size
        return self.pressure.make_room(self.groups.need(num_tokens))

    def check_decode_capacity(
        self,
        *,
        num_tokens: int,
        tree_cache: Any,
        requests: Sequence[Any] | None = None,
        spec_algorithm: Any = None,
    ) -> bool:
        """Whether the next decode step fits; False makes SGLang retract a request and ask again."""
        if requests is not None:
            self.pressure.decoding = requests
            states = self.states_of_step(requests) if self.states_of_step is not None else 0
            if states:
                need = self.groups.need(num_tokens + self._tokens_ahead, states=states)
                if self.pressure.make_room(need, to_run=False):
                    return True  # else a request would be retracted so that another is tracked
        return self.pressure.make_room(self.groups.need(num_tokens))

    @property
    def _tokens_ahead(self) -> int:
        """Tokens that the next decode step takes at most. States that requests are only tracked in
        leave so many free, for they come back a step late."""
        return len(self.pressure.decoding) * self.page_size

    # ---- allocation -------------------------------------------------------------------------

    @contextmanager
    def allocating(self, step: StepDemand) -> Iterator[None]:
        """The calls of SGLang's allocation function for one batch happen inside."""
        assert self._step is None, "two batches cannot be allocated at once"
        self._step = step
        try:
            yield
        finally:
            self._step = None

    def alloc(self, need_size: int) -> torch.Tensor | None:
        return self._serve(need_size)

    def alloc_extend(
        self,
        prefix_lens: Any,
        prefix_lens_cpu: Any,
        seq_lens: Any,
        seq_lens_cpu: Any,
        last_loc: Any,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        return self._serve(extend_num_tokens)

    def alloc_decode(self, seq_lens: Any, seq_lens_cpu: Any, last_loc: Any) -> torch.Tensor | None:
        return self._serve(len(seq_lens_cpu))

    def _serve(self, num_tokens: int) -> torch.Tensor | None:
        """Allocate the step in every group; slots of its tokens, ``[num_tokens]`` int64."""
        step = self._step
        if step is None:
            raise RuntimeError(
                "an allocation outside of SGLang's batch allocation functions has no request to "
                "belong to; --memory-backend jenga does not carry the feature that made it"
            )
        ids = self.core.alloc(step.rows, self.groups.demand(step))
        if ids is None:
            return None
        self.buffer.zero_large_pages(self.core.large.take_stale(), self.forward_stream)
        self._enter_prefixes(step)
        slots = [self._enter(group, step, ids[group]) for group in self.groups.of_tokens]
        assert slots[self.groups.row].size == num_tokens
        return self._publish(slots[self.groups.row], ids)

    def alloc_states(self, count: int, *, to_run: bool) -> np.ndarray | None:
        """Slots of so many states, ``[count]`` int64, or None if they cannot be had.

        Cached prefixes are given up for them; ``to_run``: and states that requests are tracked in.
        There must be room for the step's tokens as well, which come next; so each state goes into
        a large page of states that has a place, if there is one.
        """
        tokens = 0 if to_run else self._tokens_ahead
        if to_run and self._step is not None:
            tokens = self._step.num_pages * self.page_size
        need = self.groups.need(tokens, states=count)
        if not self.pressure.make_room(need, to_run=to_run):
            return None
        demand = [np.zeros(count, dtype=np.int64) for _ in need]
        demand[self.groups.state] += 1
        ids = self.core.alloc([None] * count, demand)
        self.buffer.zero_large_pages(self.core.large.take_stale(), self.forward_stream)
        return ids[self.groups.state]

    def _enter_prefixes(self, step: StepDemand) -> None:
        for index in step.fresh:
            if step.starts[index]:
                for group_id, table in enumerate(self.tables.rows):
                    pages = step.prefix_pages(step.reqs[index], group_id)
                    table[step.rows[index], : pages.size] = pages

    def _enter(self, group_id: int, step: StepDemand, ids: np.ndarray) -> np.ndarray:
        """Write new pages into the page tables; slots of the step's tokens."""
        table = self.tables.rows[group_id]
        per_page = self.page_size
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
                parts.append(self.tables.slots(group_id, row, start, end))
        return np.concatenate(parts) if per_page > 1 else ids

    def _publish(self, slots: np.ndarray, ids: Sequence[np.ndarray]) -> torch.Tensor:
        """The step's slots on the device, and what the kernels need to find those of other groups;
        ``ids``: the step's new small pages per group."""
        for group_id, slot_map in self.slot_maps.items():
            slot_map.pair(ids[self.groups.row], ids[group_id])
        if not self.slot_maps:
            return self.to_device(slots)
        first, *others = self.slot_maps.values()
        for slot_map in others:
            slot_map.upload()
        return first.upload(beside=slots)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return self.buffer.ops.upload(torch.from_numpy(array))

    # ---- release ----------------------------------------------------------------------------

    def free_row_pages(self, group_id: int, row: int, start: int, end: int) -> None:
        """A request gives up its own pages of positions ``[start, end)``; ``start`` is aligned."""
        if end > start:
            pages = self.tables.pages(group_id, row, start, end)
            self.core.free(group_id, pages.astype(np.int64))

    def free_behind(self, group_id: int, row: int, start: int, end: int) -> None:
        """A request gives up its own pages of ``[start, end)`` in one group, but not the full ones
        of the same tokens."""
        if end > start:
            full = self.tables.pages(self.groups.row, row, start, end)
            self.slot_maps[group_id].part(full.astype(np.int64))
            self.free_row_pages(group_id, row, start, end)

    def free(self, free_index: torch.Tensor) -> None:
        """SGLang's roll-back of a failed allocation: the step's pages go back.

        Everything else is freed by row position, through the tree cache.
        """
        step = self._step
        if step is None:
            raise RuntimeError("slots are freed by row position under --memory-backend jenga")
        for row, start, end, _ in step.spans():
            first = -(-start // self.page_size) * self.page_size
            for group_id in self.groups.of_tokens:
                self.free_row_pages(group_id, row, first, end)

    def free_group_begin(self) -> None:
        """Frees are host work and done at once; there is nothing to group."""

    def free_group_end(self) -> None:
        pass

    def clear(self) -> None:
        self.core.clear()

    def resize(self, config: Any) -> None:
        raise RuntimeError("the jenga pool has one size for life")

    def get_all_free_pages(self) -> None:
        return None

    def debug_print(self) -> str:
        large = self.core.large
        groups = ", ".join(
            f"{plan.group.label}: used {used} cached {cached}"
            for plan, used, cached in zip(
                self.core.plan.groups, self.core.num_used, self.core.num_cached, strict=True
            )
        )
        return (
            f"#empty large pages {large.num_empty}, evictable {large.num_reclaimable}; {groups}; "
        )


class JengaTokenAllocator(_JengaAllocator, BaseTokenToKVPoolAllocator):
    """SGLang's face of models without mapped groups: full attention, and perhaps states."""

    def __init__(self, core: Allocator, tables: PageTables, kvcache: Any, **kwargs: Any) -> None:
        self._setup(core, tables, kvcache, **kwargs)

    @property
    def size(self) -> int:
        """Tokens; with states, those held and those that could be taken now: the split moves."""
        if self.groups.state is None:
            return self.max_tokens
        return self.available_size() + self.group_allocated(self.groups.row)

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> JengaDenseBudget:
        budget = JengaDenseBudget if self.groups.state is None else JengaStateBudget
        return budget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)


class JengaSWAAllocator(_JengaAllocator, SWATokenToKVPoolAllocator):
    """SGLang's face of models with mapped groups. Row slots are full slots; kernels find the window
    slot of a token through ``full_to_swa_index_mapping``, one tensor for life (CUDA graphs capture
    it)."""

    def __init__(self, core: Allocator, tables: PageTables, kvcache: Any, **kwargs: Any) -> None:
        self._setup(core, tables, kvcache, **kwargs)
        first = next(iter(self.slot_maps.values()))
        self.full_to_swa_index_mapping = first.tensor
        kvcache.register_mapping(first.tensor)

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> JengaSWABudget:
        return JengaSWABudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def full_available_size(self) -> int:
        return self.group_available(self.groups.row)

    def swa_available_size(self) -> int:
        return self.group_available(self.groups.mapped[0])

    def swa_capacity_and_available(
        self, *, full_capacity: int, swa_capacity: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The split moves, so a group's capacity is what it has plus what it could still get."""
        return tuple(
            (self.group_available(group) + self.group_allocated(group), self.group_available(group))
            for group in (self.groups.row, self.groups.mapped[0])
        )

    @property
    def size(self) -> int:
        return self.max_tokens

    @property
    def size_full(self) -> int:
        return self.max_tokens

    @property
    def size_swa(self) -> int:
        return self.core.plan.num_slots(self.groups.mapped[0]) - self.page_size


def is_ours(allocator: Any) -> bool:
    return isinstance(allocator, _JengaAllocator)

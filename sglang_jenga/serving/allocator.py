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
from sglang.srt.utils.common import is_pin_memory_available

from sglang_jenga.memory.buffer import PoolBuffer
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.tables import PageTables, Step
from sglang_jenga.plan.request_need import RequestNeed
from sglang_jenga.serving.admission import JengaDenseBudget, JengaStateBudget, JengaSWABudget
from sglang_jenga.serving.slot_map import SlotMap

FULL, WINDOW = 0, 1  # a group of states comes after the attention groups


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
        self._pin_memory = is_pin_memory_available(device)
        self.need_sort = False
        self.free_pages = self.release_pages = self.free_group = None
        self._kvcache = kvcache
        self._step: Step | None = None
        self.tree_cache: Any = None  # the prefix cache names itself here
        # Requests of the last decode step; some may have finished since.
        self.decoding: Sequence[Any] = ()
        # The request whose prompt has been computed in part, if any.
        self.prompt_in_flight: Any = None
        self.rounds_stuck = 0  # see scheduling._next_batch
        self.was_asked = False  # whether admission was, in this round
        # The queue in which nobody more could be admitted, and for how many rounds that stands.
        self.refused: tuple[int, str | None] = (0, None)
        self.rounds_refused = 0
        # Attention groups come first; a state group, if any, is the last one.
        self._num_groups = len(tables.rows)
        has_states = len(core.plan.groups) > self._num_groups
        self.state_group = self._num_groups if has_states else None
        # States that a new request takes: its own and those it is tracked in.
        self.states_per_request = 0
        # Says how many a decode step takes besides; None where it never does.
        self.states_of_step: Callable[[Sequence[Any]], int] | None = None

    # ---- capacity ---------------------------------------------------------------------------

    def need(self, *tokens: int, states: int = 0) -> list[int]:
        """Small pages per group: of tokens per attention group (one number means the same for all),
        and of states, which models without any have no group for."""
        if len(tokens) == 1:
            tokens *= self._num_groups
        pages = [-(-int(count) // self.page_size) for count in tokens]
        return pages if self.state_group is None else [*pages, states]

    @cached_property
    def request_need(self) -> RequestNeed:
        return RequestNeed(self.core.plan, self.states_per_request)

    def need_of_rest(self, held: int, tokens: int) -> list[int]:
        """Small pages per group that a request of ``tokens`` tokens takes beyond those that it
        holds, or has locked, for the first ``held`` of them, a whole number of pages."""
        need = self.request_need.pages(tokens)
        for group_id, plan in enumerate(self.core.plan.groups[: self._num_groups]):
            window = plan.group.window
            begin = 0 if window is None else max(0, held - window + 1)
            need[group_id] -= -(-held // self.page_size) - begin // self.page_size
        return [max(0, count) for count in need]

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
        low, high = 0, min(self.core.obtainable(group) for group in range(self._num_groups))
        if self._num_groups == 1:
            return high * self.page_size
        while low < high:
            middle = (low + high + 1) // 2
            if self.core.fits_now(self.need(middle * self.page_size)):
                low = middle
            else:
                high = middle - 1
        return low * self.page_size

    def group_available(self, group_id: int) -> int:
        """Tokens one group alone could take, the cached pages of other groups given up for it.

        Its own cached pages are not in it: SGLang counts them as evictable beside this number.
        """
        large = self.core.large
        larges = large.num_empty + large.num_idle - large.idle[group_id]
        smalls = large.free[group_id] + larges * self.core.plan.groups[group_id].smalls_per_large
        return smalls * self.page_size

    def group_allocated(self, group_id: int) -> int:
        """Tokens' worth of small pages handed out to requests or held by the cache."""
        return (self.core.num_used[group_id] + self.core.num_cached[group_id]) * self.page_size

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool:
        """Make room for the step being allocated; ``num_tokens`` counts if there is none."""
        need = self.need(num_tokens)
        if self._step is not None:
            need = self.need(self._step.num_pages * self.page_size)
        return self._make_room(tree_cache, need)

    def _make_room(self, tree_cache: Any, need: Sequence[int], *, to_run: bool = True) -> bool:
        """Free what costs least to lose until ``need`` fits: slid-out pages, then cached prefixes,
        then the last few slid-out pages, and if it is needed ``to_run``, states that requests are
        tracked in, before SGLang retracts one.

        Tokens that nothing can hit any more go before another large page is taken for new ones: it
        may be wanted for a state.
        """
        if tree_cache is not None and tree_cache.supports_mamba():
            tree_cache.trees.evict_stranded(self.core.smalls_missing(need))
        if self.core.fits_now(need) or tree_cache is None:
            return self.core.fits_now(need)
        for exactly in (False, True):
            tree_cache.slide(self.decoding, exactly=exactly)
            tree_cache.slide_prompt(self.prompt_in_flight, exactly=exactly)
            if tree_cache.supports_prefix_sharing():
                tree_cache.evict_to_fit(need)
            if self.core.fits_now(need):
                return True
        if to_run and tree_cache.supports_mamba():
            for _ in tree_cache.states.give_up(self.decoding):
                tree_cache.evict_to_fit(need)
                if self.core.fits_now(need):
                    return True
        return False

    def states_to_give_up(self) -> int:
        """States that decoding requests are tracked in, and can go on without."""
        if self.tree_cache is None or not self.tree_cache.supports_mamba():
            return 0
        return self.tree_cache.states.given_up(self.decoding)

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
            self.decoding = requests
            states = self.states_of_step(requests) if self.states_of_step is not None else 0
            if states:
                need = self.need(num_tokens + self._tokens_ahead, states=states)
                if self._make_room(tree_cache, need, to_run=False):
                    return True  # else a request would be retracted so that another is tracked
        return self._make_room(tree_cache, self.need(num_tokens))

    @property
    def _tokens_ahead(self) -> int:
        """Tokens that the next decode step takes at most. States that requests are only tracked in
        leave so many free, for they come back a step late."""
        return len(self.decoding) * self.page_size

    # ---- allocation -------------------------------------------------------------------------

    @contextmanager
    def allocating(self, step: Step) -> Iterator[None]:
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
        demand = [step.pages] * self._num_groups
        if self.state_group is not None:
            demand.append(np.zeros_like(step.pages))
        ids = self.core.alloc(step.rows, demand)
        if ids is None:
            return None
        self.buffer.zero_large_pages(self.core.large.take_stale(), self.forward_stream)
        self._enter_prefixes(step)
        slots = [self._enter(group_id, step, ids[group_id]) for group_id in range(self._num_groups)]
        assert slots[FULL].size == num_tokens
        return self._publish(slots[FULL], ids)

    def alloc_states(self, count: int, *, to_run: bool) -> np.ndarray | None:
        """Slots of so many states, ``[count]`` int64, or None if they cannot be had.

        Cached prefixes are given up for them; ``to_run``: and states that requests are tracked in.
        There must be room for the step's tokens as well, which come next; so each state goes into
        a large page of states that has a place, if there is one.
        """
        tokens = 0 if to_run else self._tokens_ahead
        if to_run and self._step is not None:
            tokens = self._step.num_pages * self.page_size
        if not self._make_room(self.tree_cache, self.need(tokens, states=count), to_run=to_run):
            return None
        none, each = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
        ids = self.core.alloc([None] * count, [none] * self._num_groups + [each])
        self.buffer.zero_large_pages(self.core.large.take_stale(), self.forward_stream)
        return ids[-1]

    def _enter_prefixes(self, step: Step) -> None:
        for index in step.fresh:
            if step.starts[index]:
                for group_id, table in enumerate(self.tables.rows):
                    pages = self.prefix_pages(step.reqs[index], group_id)
                    table[step.rows[index], : pages.size] = pages

    def _enter(self, group_id: int, step: Step, ids: np.ndarray) -> np.ndarray:
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

    def prefix_pages(self, req: Any, group_id: int) -> np.ndarray:
        """Small ids of the request's matched prefix; the tree cache knows them."""
        return self.tree_cache.trees.pages_to(req.last_node, group_id)

    def _publish(self, slots: np.ndarray, ids: Sequence[np.ndarray]) -> torch.Tensor:
        """The step's slots on the device, and what the kernels need to find those of other groups;
        ``ids``: the step's new small pages per group."""
        return self.to_device(slots)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._pin_memory:
            tensor = tensor.pin_memory()  # an unpinned copy would wait for the forward in flight
        return tensor.to(self.device, non_blocking=True)

    # ---- release ----------------------------------------------------------------------------

    def free_row_pages(self, group_id: int, row: int, start: int, end: int) -> None:
        """A request gives up its own pages of positions ``[start, end)``; ``start`` is aligned."""
        if end > start:
            pages = self.tables.pages(group_id, row, start, end)
            self.core.free(group_id, pages.astype(np.int64))

    def free(self, free_index: torch.Tensor) -> None:
        """SGLang's roll-back of a failed allocation: the step's pages go back.

        Everything else is freed by row position, through the tree cache.
        """
        step = self._step
        if step is None:
            raise RuntimeError("slots are freed by row position under --memory-backend jenga")
        for row, start, end, _ in step.spans():
            first = -(-start // self.page_size) * self.page_size
            for group_id in range(self._num_groups):
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
        return f"#empty large pages {large.num_empty}, evictable {large.num_idle}; {groups}; "


class JengaTokenAllocator(_JengaAllocator, BaseTokenToKVPoolAllocator):
    """Models with one attention group. Holds what stock SGLang holds, in the same bytes."""

    def __init__(self, core: Allocator, tables: PageTables, kvcache: Any, **kwargs: Any) -> None:
        self._setup(core, tables, kvcache, **kwargs)
        self.size = self.max_tokens

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> JengaDenseBudget:
        return JengaDenseBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)


class JengaStateAllocator(_JengaAllocator, BaseTokenToKVPoolAllocator):
    """Models with full attention and recurrent states, which compete for the same large pages."""

    def __init__(self, core: Allocator, tables: PageTables, kvcache: Any, **kwargs: Any) -> None:
        self._setup(core, tables, kvcache, **kwargs)

    @property
    def size(self) -> int:
        """Tokens held and tokens that could be taken now: the split between KV and states moves."""
        return self.available_size() + self.group_allocated(FULL)

    def tokens_beside(self, states: int) -> int:
        """Tokens that could be had beside so many more states, if everything cached went for them;
        -1 if not even the states can be had. Fewer than none: so many are given up, which empties
        large pages where each of them fills one."""
        large, (full, state) = self.core.large, self.core.plan.groups
        short = states - large.slack[self.state_group]
        if state.smalls_per_large > 1:
            short = max(0, short)
        larges = large.num_empty + large.num_idle - -(-short // state.smalls_per_large)
        if larges < 0:
            return -1
        return (large.slack[FULL] + larges * full.smalls_per_large) * self.page_size

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> JengaStateBudget:
        return JengaStateBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)


class JengaSWAAllocator(_JengaAllocator, SWATokenToKVPoolAllocator):
    """Models with full and window layers. Row slots are full slots; kernels find the window slot of
    a token through ``full_to_swa_index_mapping``, one tensor for life (CUDA graphs capture it)."""

    def __init__(self, core: Allocator, tables: PageTables, kvcache: Any, **kwargs: Any) -> None:
        self._setup(core, tables, kvcache, **kwargs)
        self.slot_map = SlotMap(
            core.plan.num_small(FULL), self.page_size, self.device, self.to_device
        )
        self.full_to_swa_index_mapping = self.slot_map.tensor
        kvcache.register_mapping(self.slot_map.tensor)

    def _publish(self, slots: np.ndarray, ids: Sequence[np.ndarray]) -> torch.Tensor:
        self.slot_map.pair(ids[FULL], ids[WINDOW])
        return self.slot_map.upload(beside=slots)

    def free_behind_window(self, row: int, start: int, end: int) -> None:
        """A request gives up its own window pages of ``[start, end)``, but not the full ones."""
        if end > start:
            self.slot_map.part(self.tables.pages(FULL, row, start, end).astype(np.int64))
            self.free_row_pages(WINDOW, row, start, end)

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> JengaSWABudget:
        return JengaSWABudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def full_available_size(self) -> int:
        return self.group_available(FULL)

    def swa_available_size(self) -> int:
        return self.group_available(WINDOW)

    def swa_capacity_and_available(
        self, *, full_capacity: int, swa_capacity: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The split moves, so a group's capacity is what it has plus what it could still get."""
        return tuple(
            (self.group_available(group) + self.group_allocated(group), self.group_available(group))
            for group in (FULL, WINDOW)
        )

    @property
    def size(self) -> int:
        return self.max_tokens

    @property
    def size_full(self) -> int:
        return self.max_tokens

    @property
    def size_swa(self) -> int:
        return self.core.plan.num_slots(WINDOW) - self.page_size


def is_ours(allocator: Any) -> bool:
    return isinstance(allocator, _JengaAllocator)

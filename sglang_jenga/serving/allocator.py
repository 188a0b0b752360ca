"""SGLang's allocator face: tokens and slots on its side, small pages on ours.

What every request holds is known on the host, from `PageTables`; the device gets copies. No method
that a running step calls reads a device tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

from sglang_jenga.memory.buffer import PoolBuffer
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.pages.tables import PageTables, StepDemand
from sglang_jenga.serving.admission import JengaBudget
from sglang_jenga.serving.capacity import Capacity
from sglang_jenga.serving.encoders import encoder_length
from sglang_jenga.serving.groups import ServedGroups
from sglang_jenga.serving.newcomers import Newcomers
from sglang_jenga.serving.pressure import Pressure
from sglang_jenga.serving.rank_trace import trace_of
from sglang_jenga.serving.rounds import Rounds
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
        self.capacity = Capacity(core, self.groups, self.page_size)
        self.rounds = Rounds()
        self.newcomers = Newcomers()
        self.pressure = Pressure(core)
        # Per group whose pages are found through the full ones: where they lie.
        self.slot_maps = {
            group_id: SlotMap(
                core.plan.num_small(self.groups.row), self.page_size, device, self.to_device
            )
            for group_id in self.groups.mapped
        }
        self.embeddings: Any = None  # of images, where the model makes any
        self.rank_trace = trace_of(core)
        self.asked_by: Any = None  # the request whose answer's length is being settled
        self.sending: Sequence[Any] = ()  # a prefill server's requests whose pages are being sent
        # Says how many states a decode step takes; None where it never takes any.
        self.states_of_step: Callable[[Sequence[Any]], int] | None = None

    # ---- capacity ---------------------------------------------------------------------------

    def max_new_tokens_for_memory(
        self,
        input_tokens: int,
        max_new_tokens: int,
        *,
        token_capacity: int,
        sliding_window_size: int | None,
        chunk_size: int | None,
    ) -> int | None:
        return self.capacity.most_new_tokens(
            input_tokens,
            max_new_tokens,
            chunked=bool(chunk_size),
            encoder=encoder_length(self.asked_by) if self.groups.encoder is not None else 0,
        )

    def available_size(self) -> int:
        return self.capacity.available()

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> JengaBudget:
        return JengaBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool:
        """Make room for the step being allocated; ``num_tokens`` counts if there is none."""
        if self._step is None:
            return self.pressure.make_room(self.groups.need(num_tokens))
        encoder = self._step.num_encoder
        tokens = (self._step.num_pages - encoder) * self.page_size
        need = self.groups.need(tokens, encoder=encoder)
        return self._make_room_ahead(need, self._step) or self.pressure.make_room(need)

    def _make_room_ahead(self, need: list[int], step: StepDemand) -> bool:
        """Room for what prompts in chunks will take of the large pages that they begin: in what is
        left here and there of others they would keep many from being emptied. No more than that:
        what is cached may be hit before the rest of a long prompt wants its place."""
        row = self.groups.row
        if step.coming is None or step.borders is not None:
            return False
        coming = int(np.minimum(step.coming, self.core.plan.groups[row].smalls_per_large).sum())
        if not coming:
            return False
        ahead = list(need)
        ahead[row] += coming
        return self.pressure.make_room(ahead)

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
        chunks = self.tables.chunks(self.groups.row, step)
        ids = self.core.alloc(step.rows, self.groups.demand(step), chunks)
        if ids is None:
            return None
        self.buffer.zero_large_pages(self.core.large.take_stale(), self.forward_stream)
        if step.borders is not None:
            self.tables.borders[step.rows] = step.borders
        self.tables.enter_prefixes(step)
        entered = [self.tables.enter(group, step, ids[group]) for group in self.groups.of_tokens]
        slots = entered[self.groups.row]
        if self.groups.encoder is not None:
            slots = self.tables.in_row_order(step, ids)
        assert slots.size == num_tokens
        return self._publish(slots, ids)

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
        state = self.groups.state
        assert state is not None, "only models with states ask"
        demand = [np.zeros(count, dtype=np.int64) for _ in need]
        demand[state] += 1
        ids = self.core.alloc([None] * count, demand)
        assert ids is not None, "room has been made"
        self.buffer.zero_large_pages(self.core.large.take_stale(), self.forward_stream)
        return ids[state]

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

    def free_behind(self, group_id: int, spans: Sequence[tuple[int, int, int]]) -> None:
        """Requests give up their own pages of rows' positions ``(row, start, end)`` in one group,
        but not the full ones of the same tokens. All at once: each call costs microseconds."""
        if not spans:
            return
        full, own = (
            np.concatenate([self.tables.pages(group, *span) for span in spans]).astype(np.int64)
            for group in (self.groups.row, group_id)
        )
        self.slot_maps[group_id].part(full)
        self.core.free(group_id, own)

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
        if self.embeddings is not None:
            self.embeddings.clear()

    def resize(self, config: Any) -> None:
        raise RuntimeError("the jenga pool has one size for life")

    def get_all_free_pages(self) -> None:
        return None

    # ---- prefill and decode servers ---------------------------------------------------------

    def prealloc_ceiling_fits(self, full_tokens: int, swa_tokens: int) -> bool:
        return True  # intake has refused whoever does not fit an empty pool

    def get_cpu_copy(self, indices: torch.Tensor, **slots: Any) -> Any:
        """What lies in these slots, on the host: a decode server's request that is retracted."""
        self._upload_maps()
        return self._kvcache.get_cpu_copy(indices, **slots)

    def load_cpu_copy(self, copy: Any, indices: torch.Tensor, **slots: Any) -> None:
        self._kvcache.load_cpu_copy(copy, indices, **slots)

    def _upload_maps(self) -> None:
        """For whoever reads them between two steps."""
        for slot_map in self.slot_maps.values():
            slot_map.upload()

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
        """Tokens; of several groups, those held and those that could be taken now: the split
        moves."""
        if self.groups.state is None and self.groups.encoder is None:
            return self.max_tokens
        held = sum(self.capacity.group_allocated(group) for group in self.groups.of_rows)
        return self.available_size() + held


class JengaSWAAllocator(_JengaAllocator, SWATokenToKVPoolAllocator):
    """SGLang's face of models with mapped groups. Row slots are full slots; kernels find the window
    slot of a token through ``full_to_swa_index_mapping``, one tensor for life (CUDA graphs capture
    it)."""

    def __init__(self, core: Allocator, tables: PageTables, kvcache: Any, **kwargs: Any) -> None:
        self._setup(core, tables, kvcache, **kwargs)
        first = next(iter(self.slot_maps.values()))
        self.full_to_swa_index_mapping = first.tensor
        kvcache.register_mapping(first.tensor)

    def translate_swa_indices_for_transfer(self, kv_indices: torch.Tensor) -> torch.Tensor:
        self._upload_maps()
        indices: torch.Tensor = super().translate_swa_indices_for_transfer(kv_indices)
        return indices

    def full_available_size(self) -> int:
        return self.capacity.group_available(self.groups.row)

    def swa_available_size(self) -> int:
        return self.capacity.group_available(self.groups.mapped[0])

    def swa_capacity_and_available(
        self, *, full_capacity: int, swa_capacity: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The split moves, so a group's capacity is what it has plus what it could still get."""
        capacity = self.capacity
        full, swa = (
            (available + capacity.group_allocated(group), available)
            for group in (self.groups.row, self.groups.mapped[0])
            for available in [capacity.group_available(group)]
        )
        return full, swa

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

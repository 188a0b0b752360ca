"""Slots of recurrent states, and the request rows that hold them.

Slot ids live on the host, as CPU tensors, for life: SGLang passes them around and gives them back
by value, so nothing is ever read from the device. What kernels index with is copied there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool, ReqToTokenPool
from sglang.srt.mem_cache.ple_state_pool import NGramPool, ShortConvPool

from sglang_jenga.memory.state import JengaStatePool
from sglang_jenga.plan.spec import STATE_SINK
from sglang_jenga.serving.tracking import Tracking


class StateSlots:
    """SGLang's face of a state group: hands out one small page per running request."""

    def __init__(self, allocator: Any, size: int) -> None:
        self._allocator = allocator
        self._group_id = allocator.groups.state
        self.size = size

    def available_size(self) -> int:
        """Slots that nobody holds, for SGLang's leak check; memory may be short of them."""
        core = self._allocator.core
        return self.size - core.num_used[self._group_id] - core.num_cached[self._group_id]

    def schedulable_available_size(self) -> int:
        return self._allocator.core.obtainable(self._group_id)

    @property
    def free_slots(self) -> torch.Tensor:
        """Only SGLang's report of a leak asks for a list; there is none to give."""
        return torch.zeros(0, dtype=torch.int64)

    def alloc(self, need_size: int, *, to_run: bool = False) -> torch.Tensor | None:
        """Slots, ``[need_size]`` int64 on the host, or None. ``to_run``: a request needs them to
        begin, so that others may be left untracked for them."""
        ids = self._allocator.alloc_states(need_size, to_run=to_run)
        return None if ids is None else torch.from_numpy(ids)

    def alloc_to_cache(self) -> torch.Tensor | None:
        """A slot for a state that nobody runs on, ``[1]``; None if a shielded one had to go."""
        capacity, groups = self._allocator.capacity, self._allocator.groups
        if not capacity.fits(groups.need(0, states=1), beside_shielded=True):
            return None
        return self.alloc(1)

    def free(self, free_index: torch.Tensor) -> None:
        assert free_index.device.type == "cpu", "state slots live on the host"
        self._allocator.core.free(self._group_id, free_index.view(-1).numpy().astype(np.int64))

    def alloc_group_begin(self, num_reqs: int) -> None:
        """Nothing to amortise: a request gets its slot with its row, not while it is matched."""

    def alloc_group_end(self) -> None:
        pass

    def clear(self) -> None:
        """The allocator of all groups is cleared as one."""


class JengaStateRows(HybridReqToTokenPool):
    """Request rows that each hold a state slot besides, and slots that the state is tracked in.

    A request's tracking slots are a host tensor; SGLang says which of them are empty. Forwards find
    them through ``req_index_to_mamba_ping_pong_track_buffer_mapping``, ``[rows, slots]`` int64.
    """

    def __init__(
        self,
        state_pool: JengaStatePool,
        track_grid: int,
        *,
        least_tracked: int = 0,
        size: int,
        extra_rows: int = 0,
        **kwargs: Any,
    ) -> None:
        self._state_pool = state_pool
        self._to_device = state_pool.to_device
        self._track_grid = track_grid  # tokens between two track boundaries
        super().__init__(size=size + extra_rows, mamba_size=state_pool.size, **kwargs)
        self.size, self.pre_alloc_size = size, extra_rows
        # SGLang's other ways to track swap two slots in every forward.
        least = least_tracked if self.enable_mamba_extra_buffer_lazy else 0
        self.tracking = Tracking(least, self.mamba_initial_tracking_slots)

    def _init_mamba_pool(
        self,
        *,
        mamba_layer_ids: list[int],
        device: str,
        enable_mamba_extra_buffer: bool,
        **_: Any,
    ) -> None:
        self.mamba_pool = self._state_pool
        self.mamba_allocator: Any = None  # `StateSlots`, once the allocator exists
        self.mamba_map = {layer_id: index for index, layer_id in enumerate(mamba_layer_ids)}
        self.mamba_ckpt_pool = None
        none = {"size": 0, "device": device}
        self.short_conv_pool = ShortConvPool(
            state_shape=None, layer_ids=[], dtype=torch.bfloat16, **none
        )
        self.ngram_pool = NGramPool(context_len=0, eos_token_id=0, **none)
        self.device = device
        num_rows = self.req_to_token.shape[0]
        self.req_index_to_mamba_index_mapping = torch.zeros(
            num_rows, dtype=torch.int32, device=device
        )
        if self.enable_mamba_extra_buffer_lazy:
            self.mamba_ping_pong_track_buffer_size = 2  # one without overlap: too few
        if enable_mamba_extra_buffer:
            self.req_index_to_mamba_ping_pong_track_buffer_mapping = torch.zeros(
                (num_rows, self.mamba_ping_pong_track_buffer_size), dtype=torch.int64, device=device
            )
        self._lead_padding_to_the_sink()

    def clear(self) -> None:
        super().clear()
        self._lead_padding_to_the_sink()

    def _lead_padding_to_the_sink(self) -> None:
        """Rows of padding have the number 0, and their forwards write states: SGLang's warm-up,
        capture of CUDA graphs, and batches that it pads without graphs."""
        self.req_index_to_mamba_index_mapping[0] = STATE_SINK
        if self.enable_mamba_extra_buffer:
            self.req_index_to_mamba_ping_pong_track_buffer_mapping[0] = STATE_SINK

    @property
    def states_per_request(self) -> int:
        """States that a request takes at most when it is admitted: its own and those it is tracked
        in."""
        return 1 + self.mamba_initial_tracking_slots

    def states_of(self, req: Any) -> int:
        """States that this one takes when it is admitted."""
        return 1 + self.tracking.slots_of(req)

    def states_of_step(self, reqs: Sequence[Any]) -> int:
        """States that SGLang's lazy mode takes in the next decode step: one for each request that
        comes to a track boundary, has no second tracking slot yet and is to be tracked there."""
        grid, takes = self._track_grid, self.tracking.takes_slot
        due = [req for req in reqs if not (req.kv.kv_committed_len + 1) % grid]  # few of hundreds
        return sum(takes(req, req.kv.kv_committed_len + 1) for req in due)

    def alloc(self, reqs: list[Any]) -> list[int] | None:
        rows = ReqToTokenPool.alloc(self, reqs)
        if rows is None:
            return None
        tracks = self.mamba_initial_tracking_slots > 0
        fresh = [req for req in reqs if not req.kv.holds_mamba]
        begin = [req for req in reqs if tracks and req.kv.mamba_ping_pong_track_buffer is None]
        counts = [self.tracking.slots_of(req) for req in begin]
        count = len(fresh) + sum(counts)
        slots = self.mamba_allocator.alloc(count, to_run=True)
        if slots is None:
            raise RuntimeError(f"admission promised {count} states that cannot be had")
        for req, slot in zip(fresh, slots[: len(fresh)], strict=True):
            req.kv.mamba_pool_idx = slot
            # Unless a cached state is to be copied there.
            req.kv.mamba_needs_clear = req.kv.mamba_cow_src_index is None
        for req, own in zip(begin, slots[len(fresh) :].split(counts), strict=True):
            self._begin_tracking(req, own)
        index = self._to_device(torch.tensor(rows, dtype=torch.int64))
        held = torch.stack([req.kv.mamba_pool_idx for req in reqs]).to(torch.int32)
        self.req_index_to_mamba_index_mapping[index] = self._to_device(held)
        if tracks:
            buffers = torch.stack([req.kv.mamba_ping_pong_track_buffer for req in reqs])
            mapping = self.req_index_to_mamba_ping_pong_track_buffer_mapping
            mapping[index] = self._to_device(buffers)
        return rows

    def _begin_tracking(self, req: Any, slots: torch.Tensor) -> None:
        """Fill SGLang's two places for tracking slots (one without overlap); its lazy mode fills
        the second only while a step writes there. What a request without a slot is tracked in
        is nobody's."""
        places = self.mamba_ping_pong_track_buffer_size
        buffer = torch.full((places,), -1, dtype=torch.int64)
        buffer[: slots.numel()] = slots
        if not slots.numel():
            buffer[0] = STATE_SINK
        kv = req.kv
        kv.mamba_ping_pong_track_buffer = buffer
        kv.mamba_ping_pong_empty = [place >= slots.numel() for place in range(places)]
        kv.mamba_prev_track_seqlen = kv.mamba_last_track_seqlen = None
        kv.mamba_next_track_idx = 0
        lazy = self.enable_mamba_extra_buffer_lazy
        kv.mamba_last_track_idx = 0 if lazy else self.get_mamba_ping_pong_other_idx(0)

    def set_mamba_ping_pong_slot(self, req: Any, idx: int, value: torch.Tensor | int) -> None:
        """Put a slot in a request's place ``idx``, or -1 to empty it."""
        kv = req.kv
        kv.mamba_ping_pong_track_buffer[idx] = value
        kv.mamba_ping_pong_empty[idx] = not torch.is_tensor(value)
        mapping = self.req_index_to_mamba_ping_pong_track_buffer_mapping
        mapping[kv.req_pool_idx] = self._to_device(kv.mamba_ping_pong_track_buffer)

    def track_nowhere(self, req: Any, idx: int) -> None:
        """Take tracking slot ``idx`` away. A step in flight may still write there, so the place is
        pointed at the request's own state; the copy then changes nothing."""
        kv = req.kv
        other = self.get_mamba_ping_pong_other_idx(idx)
        if kv.mamba_ping_pong_empty[other]:
            kv.mamba_ping_pong_track_buffer[other] = -1  # to SGLang: a boundary found no slot
        kv.mamba_ping_pong_track_buffer[idx] = kv.mamba_pool_idx
        kv.mamba_ping_pong_empty[idx] = True
        kv.mamba_prev_track_seqlen = kv.mamba_last_track_seqlen = None
        mapping = self.req_index_to_mamba_ping_pong_track_buffer_mapping
        mapping[kv.req_pool_idx] = self._to_device(kv.mamba_ping_pong_track_buffer)

    def free_mamba_cache(self, req: Any, *_: Any, **__: Any) -> None:
        """Take back what states a request still holds."""
        kv = req.kv
        slots = [] if kv.mamba_pool_idx is None else [int(kv.mamba_pool_idx)]
        if kv.mamba_ping_pong_track_buffer is not None:
            places = zip(kv.mamba_ping_pong_track_buffer, kv.mamba_ping_pong_empty, strict=True)
            slots += [int(slot) for slot, empty in places if not empty]
        self.mamba_allocator.free(torch.tensor(slots, dtype=torch.int64))
        kv.mamba_pool_idx = None
        kv.mamba_ping_pong_track_buffer = kv.mamba_ping_pong_empty = None
        kv.mamba_next_track_idx = kv.mamba_last_track_idx = None
        kv.mamba_prev_track_seqlen = kv.mamba_last_track_seqlen = None
        kv.mamba_cow_src_index, kv.mamba_needs_clear = None, False

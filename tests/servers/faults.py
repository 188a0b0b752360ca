"""Faults to plant in an engine's process, to see that the parity tests would notice them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def one_wrong_page() -> None:
    """Every prompt's fourth-last page is found in the null page instead of its own."""
    from sglang_jenga.serving.allocator import _JengaAllocator

    publish = _JengaAllocator._publish

    def wrong(self: Any, slots: np.ndarray, ids: Sequence[np.ndarray]) -> torch.Tensor:
        if len(slots) > 4 * len(self._step.reqs):
            ends = np.cumsum(self._step.ends - self._step.starts)
            slots = slots.copy()
            slots[[end - 4 for end in ends if end >= 4]] = 0
        return publish(self, slots, ids)

    _JengaAllocator._publish = wrong


def one_window_token_too_few() -> None:
    """Window layers see one token less than they should, from their first forward on: a server
    looks at its layers before."""
    from sglang.srt.layers.radix_attention import RadixAttention

    forward = RadixAttention.forward

    def shortened(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.sliding_window_size > 0 and not hasattr(self, "_shortened"):
            self.sliding_window_size -= 1
            self._shortened = True
        return forward(self, *args, **kwargs)

    RadixAttention.forward = shortened


def poisoned_free_states() -> None:
    """No fault: every state that nobody holds any more reads as NaN until it is given out again."""
    import torch

    from sglang_jenga.memory.state import JengaStatePool
    from sglang_jenga.pages.allocator import Allocator

    pools: list[Any] = []
    build, free, evict = JengaStatePool.__init__, Allocator.free, Allocator.evict

    def remembered(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        pools.append(self)

    def poison(ids: np.ndarray) -> None:
        for view in (pools[0].mamba_cache.temporal, *pools[0].mamba_cache.conv):
            view[:, torch.from_numpy(ids)] = torch.nan

    def freed(self: Any, group_id: int, small_ids: np.ndarray) -> None:
        free(self, group_id, small_ids)
        if group_id == pools[0].group_id:
            poison(small_ids)

    def evicted(self: Any, extent: Any) -> None:
        evict(self, extent)
        if extent.group_id == pools[0].group_id:
            poison(extent.ids)

    JengaStatePool.__init__ = remembered
    Allocator.free, Allocator.evict = freed, evicted


def states_not_copied() -> None:
    """A request that hits a cached prefix begins with an empty state instead of the cached one."""
    from sglang_jenga.memory.state import JengaStatePool

    def nothing(self: Any, src_indices: Any, dst_indices: Any) -> None:
        self.clear_slots(dst_indices)

    JengaStatePool.copy_from = nothing

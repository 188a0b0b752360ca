"""The pool: one byte buffer, and strided views of it that SGLang's kernels take for KV buffers.

A group's view covers the whole buffer: row ``slot`` begins at byte ``slot * padded_entry_bytes``,
and a layer is an offset in the entry, ``[K_0 | V_0 | K_1 | V_1 | ...]``. Since a large page is a
multiple of every small page, slot -> address is affine and no kernel needs to know of large pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from sglang_jenga.memory.ops import ops_of, words
from sglang_jenga.plan.spec import PoolPlan

Regions = tuple[list[int], list[int], list[int]]
"""Where regions begin, their lengths, and the lengths of their items, in bytes."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """K and V of one token in one layer: ``[num_heads, k_dim]`` and ``[num_heads, v_dim]``."""

    num_heads: int
    k_dim: int
    v_dim: int

    def entry_bytes(self, num_layers: int, itemsize: int) -> int:
        return num_layers * self.num_heads * (self.k_dim + self.v_dim) * itemsize


class PoolBuffer:
    """The bytes, ``[plan.pool_bytes]``, uint8. Zeroed once: masked rows still enter ``0 * x``."""

    def __init__(self, plan: PoolPlan, device: str, *, enable_memory_saver: bool) -> None:
        self.plan = plan
        self.device = device
        self.ops = ops_of(device)
        saver = TorchMemorySaverAdapter.create(enable=enable_memory_saver)
        with saver.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.bytes = torch.zeros(plan.pool_bytes, dtype=torch.uint8, device=device)
        # Of a lone group: its layers, and the bytes of one slot's K and V in a layer.
        self._planes: tuple[int, int, int] | None = None

    @property
    def lies_by_layers(self) -> bool:
        """A lone group shares its bytes with nobody: each layer's rows lie together."""
        return len(self.plan.groups) == 1

    def layer_views(
        self, group_id: int, heads: HeadShape, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """K and V of every layer of a group, ``[num_slots, num_heads, dim]``.

        Row stride: an entry. Those of a lone group lie exactly as in stock SGLang, and a dense
        model runs at stock's speed.
        """
        group = self.plan.groups[group_id]
        stride, rest = divmod(group.padded_entry_bytes, dtype.itemsize)
        if rest:
            raise ValueError(
                f"an entry of {group.padded_entry_bytes} bytes is no multiple of {dtype}"
            )
        typed = self.bytes.view(dtype)
        num_slots = self.plan.num_slots(group_id)
        k_row, v_row = heads.num_heads * heads.k_dim, heads.num_heads * heads.v_dim
        alone = self.lies_by_layers
        if alone:
            row_bytes = k_row * dtype.itemsize, v_row * dtype.itemsize
            self._planes = len(group.group.layer_ids), *row_bytes
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        offset = 0
        for _ in group.group.layer_ids:
            for views, dim, row in ((keys, heads.k_dim, k_row), (values, heads.v_dim, v_row)):
                shape = (num_slots, heads.num_heads, dim)
                views.append(typed.as_strided(shape, (row if alone else stride, dim, 1), offset))
                offset += row * num_slots if alone else row
        return keys, values

    @cached_property
    def larges(self) -> list[torch.Tensor]:
        """The bytes of large pages, ``[num_large, planes, words]``, words being the widest integers
        that fit: one view, or of a lone group one for each width of its rows, which lie in planes.

        For whoever comes after `layer_views`.
        """
        plan = self.plan
        if self._planes is None:
            return [self._view_of_larges(1, plan.large_page_bytes, 0, 0)]
        num_layers, k_row, v_row = self._planes
        slots = plan.num_slots(0) // plan.num_large
        k_plane, v_plane = k_row * plan.num_slots(0), v_row * plan.num_slots(0)
        if k_row == v_row:
            return [self._view_of_larges(2 * num_layers, slots * k_row, k_plane, 0)]
        return [
            self._view_of_larges(num_layers, slots * k_row, k_plane + v_plane, 0),
            self._view_of_larges(num_layers, slots * v_row, k_plane + v_plane, k_plane),
        ]

    def _view_of_larges(self, planes: int, run: int, stride: int, offset: int) -> torch.Tensor:
        """``run`` bytes of a large page in each of so many planes, ``stride`` bytes apart, of which
        the first begins at ``offset``."""
        view, width = words(self.bytes, run, stride, offset)
        shape = (self.plan.num_large, planes, run // width)
        return view.as_strided(shape, (run // width, stride // width, 1), offset // width)

    def zero_large_pages(self, large_ids: list[int], stream: Any) -> None:
        """Clear large pages that change element format, ordered on the stream of the forwards: one
        in flight may still write there for the old owner."""
        if not large_ids:
            return
        size = self.plan.large_page_bytes
        ids = self.ops.upload(torch.tensor(large_ids, dtype=torch.int64))
        with self.ops.behind(stream, ids):
            if self._planes is None:
                self.ops.zero(self.bytes, ids, size, size)
                return
            for view in self.larges:
                view.index_fill_(0, ids, 0)

    def settle(self, stream: Any) -> None:
        """Wait until whatever may still write into pages that were given back has: zeroing, and the
        step in flight of a request that ended in the one before. For whoever hands small pages to a
        writer that follows no stream: another server."""
        self.ops.wait(stream)

    def region(self, group_id: int) -> Regions:
        """A group's bytes to the transfer engines, which know of items: item ``i`` of the one
        region is the group's small page ``i``, with all its layers."""
        item = self.plan.groups[group_id].small_page_bytes
        return [self.bytes.data_ptr()], [self.plan.pool_bytes], [item]

    def zero_null_pages(self) -> None:
        """Clear what only padding reads and writes, on the current stream."""
        if self._planes is None:
            self.bytes[: self.plan.null_bytes].zero_()
            return
        for view in self.larges:  # of a lone group a large page is one small page
            view[: self.plan.null_larges].zero_()

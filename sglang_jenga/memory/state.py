"""Recurrent states in the pool: SGLang's Mamba pool on our bytes.

One small page of a state group is one request's state over all its layers:

    [temporal_0 | temporal_1 | ... | conv a_0 | conv a_1 | ... | conv b_0 | ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MambaPool

from sglang_jenga.memory.buffer import PoolBuffer, Regions

ALIGNMENT = 16
"""Bytes that each part of an entry starts at a multiple of."""


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of the state of every layer, ``[num_layers, *shape]``, at ``offset`` bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def layer_bytes(self) -> int:
        itemsize: int = self.dtype.itemsize
        return prod(self.shape) * itemsize


@dataclass(frozen=True, slots=True)
class StateShape:
    """Layout of one request's state: the recurrent part, then the convolutions'."""

    layer_ids: tuple[int, ...]
    temporal: StatePart
    conv: tuple[StatePart, ...]
    entry_bytes: int

    @classmethod
    def of(
        cls, params: Any, layer_ids: tuple[int, ...], num_layers: int | None = None
    ) -> StateShape:
        """From SGLang's ``BaseLinearStateParams``, for the state layers of this rank.

        ``num_layers``: for how many there is room, those of this rank if None.
        """
        room = len(layer_ids) if num_layers is None else num_layers
        wanted = [(params.shape.temporal, params.dtype.temporal)]
        wanted += [(shape, params.dtype.conv) for shape in params.shape.conv]
        parts, offset = [], 0
        for shape, dtype in wanted:
            parts.append(StatePart(offset, tuple(shape), dtype))
            offset += -(-parts[-1].layer_bytes * room // ALIGNMENT) * ALIGNMENT
        return cls(layer_ids, parts[0], tuple(parts[1:]), offset)

    @property
    def element(self) -> str:
        return f"state {self.temporal.dtype} {self.conv[0].dtype}"


class JengaStatePool(MambaPool):
    """SGLang's pool of recurrent states as views of the shared bytes, ``[layers, slots, ...]``.

    The parent's constructor would allocate a pool of its own; it is not called.
    """

    def __init__(self, buffer: PoolBuffer, group_id: int, shape: StateShape) -> None:
        self._buffer, self.group_id = buffer, group_id
        self.to_device = buffer.ops.upload
        plan = buffer.plan.groups[group_id]
        num_slots = buffer.plan.num_small(group_id)
        entry = plan.padded_entry_bytes
        self._entry = shape.entry_bytes, entry  # bytes, and from one to the next

        def view(part: StatePart) -> torch.Tensor:
            size = part.dtype.itemsize
            if entry % size:
                raise ValueError(f"an entry of {entry} bytes is no multiple of {part.dtype}")
            inner = [prod(part.shape[axis + 1 :]) for axis in range(len(part.shape))]
            return buffer.bytes.view(part.dtype).as_strided(
                (len(shape.layer_ids), num_slots, *part.shape),
                (part.layer_bytes // size, entry // size, *inner),
                part.offset // size,
            )

        self.mamba_cache = self.State(
            conv=[view(part) for part in shape.conv], temporal=view(shape.temporal)
        )
        self.mamba_layer_ids = list(shape.layer_ids)
        self.num_mamba_layers = len(shape.layer_ids)
        # Slots that can be handed out: not the null pages, nor what is in large pages with those of
        # another group.
        own = group_id == buffer.plan.null_group
        lost = buffer.plan.null_larges * plan.smalls_per_large
        self.size = num_slots - (buffer.plan.null_smalls if own else lost)
        self.device = buffer.device
        self.mem_usage = buffer.plan.pool_bytes / (1 << 30)
        self.memory_saver_adapter = None
        self.enable_custom_mem_pool, self.custom_mem_pool = False, None
        self.debug_memory_pool = False
        # Everything that speculative decoding would want is refused at the start.
        self.enable_linear_replayssm = self.enable_linear_replayssm_spec = False
        self.linear_replayssm_cache_len = 16
        self.replayssm_is_kda = self.replayssm_spec_fold = False
        self.replayssm_write_pos = self.replayssm_spec_write_pos = None
        self.replayssm_cache_base = self.replayssm_is_flush = None
        self.conv_shard_groups, self.conv_slice_axis = None, 0

    def clear_slots(self, indices: torch.Tensor) -> None:
        """Zero whole states; on the stream of the caller, SGLang's forward."""
        self._buffer.ops.zero(self._buffer.bytes, self.to_device(indices), *self._entry)

    def copy_from(self, src_indices: torch.Tensor, dst_indices: torch.Tensor) -> None:
        """Copy whole states; on the stream of the caller."""
        src, dst = map(self.to_device, (src_indices, dst_indices))
        self._buffer.ops.copy(self._buffer.bytes, src, dst, *self._entry)

    # ---- what a retracted request of a decode server takes along ----------------------------

    def get_cpu_copy(self, indices: torch.Tensor) -> Any:
        """States on the host. Of one number SGLang takes a view, which a pool that lies on the host
        itself would go on writing to; of a list it takes a copy."""
        return super().get_cpu_copy(indices.view(-1))

    def load_cpu_copy(self, copy: Any, indices: torch.Tensor) -> None:
        super().load_cpu_copy(copy, indices.view(-1))

    # ---- for transfers to another server ----------------------------------------------------

    def get_contiguous_buf_infos(self) -> Regions:
        """One region: a request's state, with all layers, is one item."""
        return self._buffer.region(self.group_id)

    def get_state_layer_ids(self) -> list[int]:
        """By which layer the two sides of a transfer pair the region."""
        return self.mamba_layer_ids[:1]

    def get_state_dim_per_tensor(self) -> list[int]:
        """Nothing: an item cannot be cut for other numbers of ranks."""
        return []

    def get_state_slice_outer_counts(self) -> list[int]:
        return []

    def get_state_conv_shard_groups(self) -> list[Any]:
        return []

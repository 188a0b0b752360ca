"""SGLang's KV pools on the shared bytes: of one attention group, of full and window layers, and of
self and cross attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_jenga.layers.base import Address, Storage
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer, Regions


class JengaMHAPool(MHATokenToKVPool):
    """SGLang's KV pool of one attention group, its buffers being views of the shared bytes."""

    def __init__(
        self,
        buffer: PoolBuffer,
        group_id: int,
        heads: HeadShape,
        dtype: torch.dtype,
        *,
        start_layer: int | None = None,
        end_layer: int | None = None,
        enable_alt_stream: bool = True,
    ) -> None:
        group = buffer.plan.groups[group_id]
        # Set before the parent's constructor: it calls _create_buffers.
        self._buffer, self._group_id, self._heads = buffer, group_id, heads
        super().__init__(
            # SGLang's size leaves out one page of padding, our null page.
            size=buffer.plan.num_slots(group_id) - group.group.tokens_per_page,
            page_size=group.group.tokens_per_page,
            dtype=dtype,
            head_num=heads.num_heads,
            head_dim=heads.k_dim,
            v_head_dim=heads.v_dim,
            layer_num=len(group.group.layer_ids),
            device=buffer.device,
            enable_memory_saver=False,  # the buffer is in the saver's region already
            start_layer=start_layer,
            end_layer=end_layer,
            enable_alt_stream=enable_alt_stream,
            enable_kv_cache_copy=False,  # asserts contiguity
            kv_cache_layout="nhd",
        )

    def _create_buffers(self) -> None:
        # What an unquantized pool of SGLang's has beside its buffers: backends ask for it.
        self.k_scale_buffer = self.v_scale_buffer = None
        self.native_k_scale_buffer = self.native_v_scale_buffer = None
        self.dq_k_buffer = self.dq_v_buffer = None
        self.k_buffer, self.v_buffer = self._views()
        self._kv_buffer_descs = self._build_kv_buffer_descs()
        self._init_data_ptrs_and_strides()

    def _views(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """K and V of each layer."""
        return self._buffer.layer_views(self._group_id, self._heads, self.store_dtype)

    def _clear_buffers(self) -> None:
        """The views live as long as the buffer."""

    def get_contiguous_buf_infos(self) -> Regions:
        """For transfers to another server. A lone group lies as in stock SGLang, in as many
        regions; of others a small page is one item, with all layers of its group."""
        if self._buffer.lies_by_layers:
            regions: Regions = super().get_contiguous_buf_infos()
            return regions
        return self._buffer.region(self._group_id)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """The row's group answers for the whole pool, since all groups share its bytes."""
        if self._group_id != self._buffer.plan.row_group:
            return 0, 0
        k_bytes = self._buffer.plan.pool_bytes // 2
        return k_bytes, self._buffer.plan.pool_bytes - k_bytes


class JengaCrossPool(JengaMHAPool):
    """SGLang's KV pool of a model with self-attention and cross-attention layers. Its rows name
    slots of two groups, and each layer reads those of its own: so a layer's view is its group's."""

    def __init__(
        self,
        buffer: PoolBuffer,
        heads: Sequence[HeadShape],
        dtype: torch.dtype,
        *,
        enable_alt_stream: bool = True,
    ) -> None:
        self._of_groups = heads
        layers = sorted(layer for item in buffer.plan.groups for layer in item.group.layer_ids)
        if layers != list(range(len(layers))):
            raise ValueError(f"layers must have the numbers from 0 on, got {layers}")
        row = buffer.plan.row_group
        super().__init__(
            buffer,
            row,
            heads[row],
            dtype,
            end_layer=len(layers) - 1,
            enable_alt_stream=enable_alt_stream,
        )
        self.layer_num = len(layers)  # of all groups, as there are buffers

    def _views(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        keys: dict[int, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        for group_id, item in enumerate(self._buffer.plan.groups):
            views = self._buffer.layer_views(group_id, self._of_groups[group_id], self.store_dtype)
            for of_layers, found in zip((keys, values), views, strict=True):
                of_layers.update(zip(item.group.layer_ids, found, strict=True))
        layers = sorted(keys)
        return [keys[layer] for layer in layers], [values[layer] for layer in layers]

    def _build_kv_buffer_descs(self) -> list[Any]:
        """SGLang describes all layers by the first one, for transfers that are refused; here their
        numbers of rows differ."""
        return []


class JengaSWAPool(SWAKVPool):
    """SGLang's pool of a model with full and window layers, on the shared bytes.

    The parent's constructor would allocate two separate pools; it is not called.
    """

    def __init__(
        self,
        buffer: PoolBuffer,
        heads: Sequence[HeadShape],
        dtype: torch.dtype,
        *,
        enable_alt_stream: bool = True,
    ) -> None:
        plans = [item.group for item in buffer.plan.groups]
        ids = {
            address: [at for at, group in enumerate(plans) if group.kind.address is address]
            for address in (Address.ROW, Address.MAPPED)
        }
        if [len(of_address) for of_address in ids.values()] != [1, 1] or len(heads) != 2:
            labels = ", ".join(plan.label for plan in plans if plan.kind.storage is Storage.KV)
            raise ValueError(
                "SGLang finds the pages of one group through the slots of another, "
                f"so of these one is too many: {labels}"
            )
        (full_id,), (window_id,) = ids.values()
        full, window = plans[full_id], plans[window_id]
        self._buffer = buffer
        self.full_kv_pool, self.swa_kv_pool = (
            JengaMHAPool(
                buffer, group_id, heads[group_id], dtype, enable_alt_stream=enable_alt_stream
            )
            for group_id in (full_id, window_id)
        )
        self.layers_mapping: dict[int, tuple[int, bool]] = {}
        for group, pool in ((full, self.full_kv_pool), (window, self.swa_kv_pool)):
            pool.model_layer_ids = group.layer_ids
            mapped = group.kind.address is Address.MAPPED
            for index, layer_id in enumerate(group.layer_ids):
                self.layers_mapping[layer_id] = (index, mapped)

        self.size, self.size_swa = self.full_kv_pool.size, self.swa_kv_pool.size
        self.page_size = full.tokens_per_page
        self.dtype = dtype
        self.head_num, self.head_dim = heads[full_id].num_heads, heads[full_id].k_dim
        self.device = buffer.device
        self.full_layer_nums, self.swa_layer_nums = len(full.layer_ids), len(window.layer_ids)
        self.layer_num = self.full_layer_nums + self.swa_layer_nums
        self.start_layer = min(self.layers_mapping)  # backends ask for a layer of this rank by it
        self.layer_transfer_counter = None
        self.enable_custom_mem_pool, self.custom_mem_pool = False, None
        self.dsa_kv_cache_store_fp8 = False
        self.kv_cache_dim = self.index_head_dim = None
        self.full_to_swa_index_mapping: torch.Tensor | None = None
        self.mem_usage = buffer.plan.pool_bytes / (1 << 30)

    def get_kv_layer_ids(self) -> list[int]:
        """A layer for each region of full KV, by which the two sides of a transfer pair them: the
        one region goes by its first layer's number. Where SGLang finds none it takes the first half
        of the regions for keys, which of one region is nothing."""
        return list(self.full_kv_pool.model_layer_ids[:1])


class JengaHybridPool(HybridLinearKVPool):
    """SGLang's pool of a model with full attention and states, on the shared bytes."""

    def get_kv_layer_ids(self) -> list[int]:
        """As `JengaSWAPool.get_kv_layer_ids`."""
        return list(self.full_attention_layer_id_mapping)[:1]

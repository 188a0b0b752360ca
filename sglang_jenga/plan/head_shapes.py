"""K and V heads of one layer, under the names that SGLang reads them by. Stdlib only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from sglang_jenga.plan.layer_lists import Read, need


class Heads(NamedTuple):
    """KV heads of one layer, on all ranks together, and the width of their rows."""

    count: int
    k_dim: int
    v_dim: int

    def row_elements(self, tp: int) -> int:
        """Elements of one token's K and V on one rank; with fewer heads than ranks each keeps
        one."""
        return max(1, self.count // tp) * (self.k_dim + self.v_dim)


class LayerHeads(NamedTuple):
    """The shapes of full layers and of window layers."""

    full: Heads
    window: Heads


HeadRule = Callable[[Read], LayerHeads]
_COUNTS = (
    "n_head_kv",
    "num_kv_heads",
    "num_key_value_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
_FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")


def common(read: Read) -> LayerHeads:
    """As SGLang's ``ModelConfig``: ``_derive_model_shapes``, ``get_total_num_kv_heads``,
    ``get_swa_num_kv_heads``."""
    k_dim = read("head_dim")
    if k_dim is None:
        k_dim = need(read, "hidden_size") // need(read, "num_attention_heads")
    window_dim = read("swa_head_dim") or k_dim
    full = Heads(_kv_heads(read), k_dim, read("v_head_dim") or k_dim)
    return LayerHeads(
        full,
        Heads(_window_heads(read, full), window_dim, read("swa_v_head_dim") or window_dim),
    )


def gemma4(read: Read) -> LayerHeads:
    """The config states the window layers' shape and overrides it for the full ones."""
    count, dim = need(read, "num_key_value_heads"), need(read, "head_dim")
    full_count = read("num_global_key_value_heads") if read("attention_k_eq_v") else None
    full_dim = read("global_head_dim") or 512
    return LayerHeads(Heads(full_count or count, full_dim, full_dim), Heads(count, dim, dim))


def _kv_heads(read: Read) -> int:
    new_falcon = read("model_type") in _FALCON and read("new_decoder_architecture")
    if read("multi_query") and not new_falcon:
        return 1
    section = read("attn_config")  # DBRX, MPT
    if isinstance(section, Mapping) and section.get("kv_n_heads"):
        return section["kv_n_heads"]
    blocks = read("block_configs")
    if blocks and read("model_type") == "nemotron-nas":
        return _of_blocks(blocks, need(read, "num_attention_heads"))
    counts = (read(name) for name in _COUNTS)
    found = next((count for count in counts if count is not None), None)
    return need(read, "num_attention_heads") if found is None else found


def _of_blocks(blocks: list[Mapping], heads: int) -> int:
    """Nemotron-NAS: every block says how many query heads share one of K and V."""
    sections = [block.get("attention") for block in blocks if isinstance(block, Mapping)]
    shared = {
        section.get("n_heads_in_group")
        for section in sections
        if isinstance(section, Mapping) and not section.get("no_op")
    }
    if len(shared) != 1 or any(type(count) is not int or count <= 0 for count in shared):
        raise ValueError("block_configs must agree on a number n_heads_in_group")
    return heads // shared.pop()


def _window_heads(read: Read, full: Heads) -> int:
    if read("swa_num_key_value_heads") is not None:
        return read("swa_num_key_value_heads")
    section = read("attention_other_setting")  # Step-3.5
    if isinstance(section, Mapping) and section.get("num_attention_groups"):
        return section["num_attention_groups"]
    return full.count

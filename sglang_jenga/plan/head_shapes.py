"""K and V heads of one layer, under the names that SGLang reads them by. Stdlib only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sglang_jenga.plan.layer_lists import Read, need


class Heads(NamedTuple):
    """KV heads of one layer, on all ranks together, and the width of their rows."""

    count: int  # type: ignore[assignment]  # nobody asks a shape for tuple.count
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
    nested = _nested(read, "attn_config", "kv_n_heads")  # DBRX, MPT
    if nested:
        return nested
    blocks = read("block_configs")
    if blocks and read("model_type") == "nemotron-nas":
        return _of_blocks(blocks, need(read, "num_attention_heads"))
    counts = (read(name) for name in _COUNTS)
    found = next((count for count in counts if count is not None), None)
    heads: int = need(read, "num_attention_heads") if found is None else found
    return heads


def _of_blocks(blocks: list[Mapping[str, Any]], heads: int) -> int:
    """Nemotron-NAS: every block says how many query heads share one of K and V."""
    sections = [block.get("attention") for block in blocks if isinstance(block, Mapping)]
    shared: set[Any] = {
        section.get("n_heads_in_group")
        for section in sections
        if isinstance(section, Mapping) and not section.get("no_op")
    }
    count = shared.pop() if len(shared) == 1 else None
    if type(count) is not int or count <= 0:
        raise ValueError("block_configs must agree on a number n_heads_in_group")
    return heads // count


def _window_heads(read: Read, full: Heads) -> int:
    count: int | None = read("swa_num_key_value_heads")
    if count is not None:
        return count
    nested = _nested(read, "attention_other_setting", "num_attention_groups")  # Step-3.5
    return nested or full.count


def _nested(read: Read, section: str, name: str) -> int | None:
    fields = read(section)
    found: int | None = fields.get(name) if isinstance(fields, Mapping) else None
    return found

"""Compares the groups that a pool is cut for with the attention layers that SGLang has built.

Groups come from a model's config, by the table of models; layers from its code. Where the two part,
a layer reads pages that were given back or belong to somebody else, and answers wrong tokens
without a word. So a server looks before it builds the pool, and stops in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_jenga.boot import known_model
from sglang_jenga.layers.base import Address
from sglang_jenga.memory.buffer import HeadShape
from sglang_jenga.plan.spec import LayerGroup

if TYPE_CHECKING:
    from sglang_jenga.boot.geometry import ServedLayers

_logger = logging.getLogger(__name__)


class BuiltLayer(NamedTuple):
    """An attention layer as built. ``sees`` counts tokens, the current one included; None if all.
    ``in_chunks``: it keeps to a chunk, and its kernel knows which."""

    layer_id: int
    heads: HeadShape
    sees: int | None
    in_chunks: bool = False


def of_model(model: Any) -> list[BuiltLayer]:
    """Return the layers of a model that read and write a KV pool.

    Layers that share KV name the layer that writes it, and several layers may have one number.
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    # The Transformers fallback keeps its layers beside the model.
    beside = getattr(model, "attention_instances", None) or {}
    return [
        BuiltLayer(
            module.layer_id,
            HeadShape(module.tp_k_head_num, module.qk_head_dim, module.v_head_dim),
            # SGLang's window excludes the current token, ours includes it.
            module.sliding_window_size + 1 if module.sliding_window_size > -1 else None,
            module.use_irope,
        )
        for module in (*model.modules(), *beside.values())
        if isinstance(module, RadixAttention) and module.attn_type != AttentionType.ENCODER_ONLY
    ]


def differences(
    layers: Iterable[BuiltLayer],
    groups: Sequence[LayerGroup],
    heads: Sequence[HeadShape],
    seen: int | None,
) -> list[str]:
    """Say in what the built layers differ from the attention groups, whose heads are `heads`.

    `seen` is how many tokens a window layer sees by the table of models, None if it has no row. A
    layer of a full group may see less than all: that is safe.
    """
    home = {
        layer_id: (group, shape)
        for group, shape in zip(groups, heads, strict=True)
        for layer_id in group.layer_ids
    }
    found = []
    for layer in layers:
        name = f"layer {layer.layer_id}"
        if layer.layer_id not in home:
            found.append(f"{name} is in no group")
            continue
        group, shape = home[layer.layer_id]
        if layer.heads != shape:
            found.append(f"{name} has {_shown(layer.heads)}, its group {_shown(shape)}")
        if group.kind.address is Address.MAPPED and not layer.in_chunks:
            found += _window_differences(name, layer.sees, group, seen)
    return list(dict.fromkeys(found))


def _window_differences(
    name: str, sees: int | None, group: LayerGroup, seen: int | None
) -> list[str]:
    if sees is None:
        return [f"{name} sees all tokens, its group is {group.label}"]
    if sees > group.window:
        return [f"{name} sees {sees} tokens, its group is {group.label}"]
    if seen is not None and sees != seen:
        return [f"{name} sees {sees} tokens, {seen} by the table of models"]
    return []


def _shown(heads: HeadShape) -> str:
    return f"{heads.num_heads} KV heads of {heads.k_dim} and {heads.v_dim}"


def refusal(configurator: Any, geometry: ServedLayers) -> str | None:
    """Return the line to stop with, or None if the model of SGLang's ``KVCacheConfigurator`` was
    built as its groups are planned."""
    layers = of_model(configurator.model)
    known = known_model.of_model(configurator.model_config)
    groups = geometry.groups[: len(geometry.heads)]
    seen = None
    if known.listed:
        seen = known.row.window.seen(known.read)
        _note_width(groups, known.row.window.stored(known.read))
    found = differences(layers, groups, geometry.heads, seen)
    _note_unread(layers, groups)
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"--memory-backend jenga: SGLang built {known.architecture} otherwise than planned: "
        f"{found[0]}{more}; drop --memory-backend"
    )


def _note_width(groups: Sequence[LayerGroup], stored: int | None) -> None:
    """SGLang's runner may keep more than its layers see, and then a plan is off by so much."""
    held = next((group.window for group in groups if group.window is not None), stored)
    if held != stored:
        _logger.warning(
            "jenga: the window group holds %s tokens, %s by the table of models", held, stored
        )


def _note_unread(layers: Sequence[BuiltLayer], groups: Sequence[LayerGroup]) -> None:
    planned = {layer_id for group in groups for layer_id in group.layer_ids}
    unread = len(planned - {layer.layer_id for layer in layers})
    if planned and not layers:
        _logger.warning("jenga: no attention layer found to compare the plan with")
    elif unread:  # KV is shared: waste, and stock SGLang's waste too
        _logger.info("jenga: %d layers have rows that no attention layer writes", unread)

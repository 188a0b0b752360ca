"""Compares the groups that a pool is cut for with the attention layers that SGLang has built.

Groups come from a model's config, by the table of models; layers from its code. Where the two part,
a layer reads pages that were given back or belong to somebody else, and answers wrong tokens
without a word. So a server looks before it builds the pool, and stops in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sglang.srt.runtime_context import get_parallel

from sglang_jenga.boot import known_model
from sglang_jenga.boot.geometry import ServedLayers, stages_of
from sglang_jenga.layers import agreement
from sglang_jenga.layers.base import Address
from sglang_jenga.memory.buffer import HeadShape
from sglang_jenga.plan.spec import LayerGroup

_logger = logging.getLogger(__name__)


class BuiltLayer(NamedTuple):
    """An attention layer as built. ``sees`` counts tokens, the current one included; None if all.
    ``chunk``: it keeps to an aligned chunk of so many tokens, and its kernel knows which.
    ``cross``: it reads an encoder's tokens, and none of the text."""

    layer_id: int
    heads: HeadShape
    sees: int | None
    chunk: int | None = None
    cross: bool = False

    @property
    def reads(self) -> agreement.Reads | None:
        """What it reads of the tokens before one, None for all."""
        chunk, sees = self.chunk, self.sees
        if chunk is not None:
            return lambda length: ((length - length % chunk, length),)
        if sees is None:
            return None
        return lambda length: ((max(0, length - sees + 1), length),)


def of_model(model: Any, chunk: int | None = None) -> list[BuiltLayer]:
    """Return the layers of a model that read and write a KV pool; ``chunk``: tokens in a chunk of
    those that keep to one.

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
            chunk if module.use_irope else None,
            module.is_cross_attention,
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
    layer of a full group may see less than all: that is safe. Of a group that gives tokens back,
    its type says which, and a layer must read none of them.
    """
    home = {
        layer_id: (group, shape)
        for group, shape in zip(groups, heads, strict=True)
        for layer_id in group.layer_ids
    }
    found = []
    known: dict[tuple[Any, ...], list[str]] = {}
    for layer in layers:
        name = f"layer {layer.layer_id}"
        if layer.layer_id not in home:
            found.append(f"{name} is in no group")
            continue
        group, shape = home[layer.layer_id]
        if layer.cross != (group.kind.address is Address.ENCODER):
            read = "an encoder's tokens" if layer.cross else "text"
            found.append(f"{name} reads {read}, its group is {group.label}")
        if layer.heads != shape:
            found.append(f"{name} has {_shown(layer.heads)}, its group {_shown(shape)}")
        if group.kind.address is Address.MAPPED:
            way = (group.label, layer.sees, layer.chunk)
            if way not in known:  # a model has many layers of one kind
                known[way] = _window_differences(layer, group, seen)
            found += [f"{name} {what}" for what in known[way]]
    return list(dict.fromkeys(found))


def _window_differences(layer: BuiltLayer, group: LayerGroup, seen: int | None) -> list[str]:
    """The same but for a layer's name."""
    if layer.reads is None:
        return [f"sees all tokens, its group is {group.label}"]
    wrong = agreement.fault(group.kind, layer.reads)
    if wrong is not None:
        how = f"sees {layer.sees} tokens" if layer.chunk is None else f"has chunks of {layer.chunk}"
        return [f"{how}, its group is {group.label}: {wrong}"]
    if layer.chunk is None and seen is not None and layer.sees != seen:
        return [f"sees {layer.sees} tokens, {seen} by the table of models"]
    return []


def _shown(heads: HeadShape) -> str:
    return f"{heads.num_heads} KV heads of {heads.k_dim} and {heads.v_dim}"


def refusal(configurator: Any, geometry: ServedLayers) -> str | None:
    """Return the line to stop with, or None if the model of SGLang's ``KVCacheConfigurator`` was
    built as its groups are planned."""
    layers = of_model(configurator.model, configurator.model_config.attention_chunk_size)
    known = known_model.of_model(configurator.model_config)
    groups = geometry.groups[: len(geometry.heads)]
    seen = None
    if known.listed:
        seen = known.row.window.seen(known.read)
        _note_width(groups, known.row.window.stored(known.read))
    found = _stage_differences(configurator)
    found += differences(layers, groups, geometry.heads, seen)
    _note_unread(layers, groups)
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"--memory-backend jenga: SGLang built {known.architecture} otherwise than planned: "
        f"{found[0]}{more}; drop --memory-backend"
    )


def _stage_differences(configurator: Any) -> list[str]:
    """Say whether this stage of a pipeline was cut otherwise than all stages count with."""
    stages, rank = stages_of(configurator), get_parallel().pp_rank
    if len(stages) == 1:
        return []
    built, planned = configurator.layer_info, stages[rank]
    if (built.start_layer, built.end_layer) == (planned.start, planned.stop):
        return []
    return [
        f"stage {rank} has layers {built.start_layer} to {built.end_layer - 1}, "
        f"not {planned.start} to {planned.stop - 1}"
    ]


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

"""Window models that stock SGLang stores as if every layer were full.

Under the flag they become hybrid: their window layers get pages of their own and give them back
when the window has passed. Which layers those are must be the rule of SGLang's model code, because
that is what the attention layers were built with; the config's own list may say it otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_logger = logging.getLogger(__name__)
_enabled = False


Kinds = list[bool | None]
"""Per layer whether it has a window; None for a layer without attention."""


def _every_second(config: Any) -> Kinds:
    has_window = getattr(config, "sliding_window", None) is not None
    return [has_window and layer % 2 == 0 for layer in range(config.num_hidden_layers)]


def _by_layer_types(config: Any) -> Kinds:
    types = getattr(config, "layer_types", None) or ()
    is_window = [kind == "sliding_attention" for kind in types[: config.num_hidden_layers]]
    return is_window if len(is_window) == config.num_hidden_layers else []


def _by_pattern(config: Any) -> Kinds:
    pattern = getattr(config, "sliding_window_pattern", None)
    if not pattern or not isinstance(pattern, str):
        return []
    return [(layer + 1) % len(pattern) != 0 for layer in range(config.num_hidden_layers)]


def _beside_states(config: Any) -> Kinds:
    kinds = {"attn": False, "swa": True}
    return [kinds.get(kind) for kind in config.layer_types]


# Olmo-3 arrives under the name Olmo2ForCausalLM, and Olmo-2 proper has no layer types.
WINDOW_RULES: dict[str, Callable[[Any], Kinds]] = {
    "Gemma2ForCausalLM": _every_second,
    "Gemma3ForCausalLM": _by_layer_types,
    "Gemma3ForConditionalGeneration": _by_layer_types,
    "Olmo2ForCausalLM": _by_layer_types,
    "Exaone4ForCausalLM": _by_pattern,
    "Cohere2ForCausalLM": _by_layer_types,
    "JetNemotronForCausalLM": _beside_states,
}


def enable(on: bool) -> None:
    """Set whether the record that this process works on asks for jenga.

    SGLang asks "is this model hybrid?" without saying for which record.
    """
    global _enabled
    _enabled = on


def window_layers(architectures: list[str], text_config: Any) -> Kinds | None:
    """Say per layer whether it has a window, or None if this model is not ours to change."""
    rule = next((WINDOW_RULES[arch] for arch in architectures if arch in WINDOW_RULES), None)
    if not _enabled or rule is None or text_config is None:
        return None
    is_window = rule(text_config)
    return is_window if any(is_window) else None


def is_hybrid(original: Any, model_architectures: list[str], hf_text_config: Any = None) -> bool:
    if window_layers(model_architectures, hf_text_config) is not None:
        return True
    return original(model_architectures, hf_text_config)


def layer_ids(original: Any, model_architectures: list[str], hf_text_config: Any) -> tuple:
    is_window = window_layers(model_architectures, hf_text_config)
    if is_window is None:
        return original(model_architectures, hf_text_config)
    window = [layer for layer, yes in enumerate(is_window) if yes]
    full = [layer for layer, yes in enumerate(is_window) if yes is False]
    return window, full


def register_overrides() -> None:
    """Take back SGLang's forced --disable-hybrid-swa-memory, unless the user typed it."""
    from sglang.srt.arg_groups.model_override_base import register_model_override_predicate

    # Predicates run after the models' own overrides, and the last writer wins.
    @register_model_override_predicate(WINDOW_RULES.__contains__)
    def jenga_stores_windows(server_args: Any, hf_config: Any) -> dict[str, bool]:
        if not _enabled or server_args.disable_hybrid_swa_memory:
            return {}
        # SGLang has just logged the opposite.
        _logger.info("jenga stores the window layers of %s as such", hf_config.architectures[0])
        return {"disable_hybrid_swa_memory": False}

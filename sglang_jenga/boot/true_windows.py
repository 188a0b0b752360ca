"""The attention layers that --jenga-true-windows gives the windows of their config.

Hooks of a scheduler under the switch alone. SGLang's count of a window leaves out the current
token, that of a config includes it.
"""

from __future__ import annotations

from typing import Any

from sglang_jenga.boot import hook_table, hooks, known_model
from sglang_jenga.boot.flags import Refused
from sglang_jenga.plan.layer_lists import LayerList

_active = False


def activate() -> None:
    """Patch SGLang's attention layers, once per process; raise if anything is not as we know it."""
    global _active
    if _active:
        return
    try:
        hooks.apply(hook_table.TRUE_WINDOWS)
    except hooks.HookError as error:
        raise Refused(f"--jenga-true-windows cannot start: {error}") from error
    _active = True


def _layers_of(config: Any) -> tuple[LayerList, int] | None:
    """What the layers of a text config store, and its window; None if the switch is off, or means
    nothing for this model."""
    model = known_model.of_config(getattr(config, "architectures", None) or (), config)
    window = model.row.window.seen(model.read) if model.truly else None
    return None if window is None else (model.row.stored_layers(model.read), window)


def window_size(_result: int | None, self: Any) -> int | None:
    """What SGLang's ``ModelConfig`` says of the window; None leaves that as it is."""
    known = known_model.of_model(self)
    window = known.row.window.seen(known.read) if known.truly else None
    return None if window is None else window - 1


def window_of_attention(_result: None, self: Any, config: Any, *_: Any, **__: Any) -> None:
    """SGLang's Llama attention, which Mistral is run by, knows no window."""
    known = _layers_of(config)
    if known is None:
        return
    layers, window = known
    if layers[self.attn.layer_id] == ("window",):
        self.attn.sliding_window_size = window - 1


def windows_of_fallback(attentions: dict[int, Any], self: Any) -> None:
    """The Transformers fallback takes the config's number for SGLang's."""
    text = known_model.of_config(self.config.architectures or (), self.text_config)
    window = text.row.window.seen(text.read) if text.truly else None
    if window is None:
        return
    layers = text.row.stored_layers(text.read)
    for layer_id, attention in attentions.items():
        attention.sliding_window_size = window - 1 if layers[layer_id] == ("window",) else -1

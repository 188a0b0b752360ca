"""The attention layers that --jenga-true-windows gives the windows of their config.

Hooks of a scheduler under the switch alone. SGLang's count of a window leaves out the current
token, that of a config includes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_jenga.boot import hook_table, hooks, known_model
from sglang_jenga.boot.flags import Refused

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


class _Windows(NamedTuple):
    """Per layer whether it has a window, and how wide that is by SGLang's count."""

    layers: list[bool]
    size: int

    def of(self, layer_id: int) -> int:
        return self.size if self.layers[layer_id] else -1


def _windows_of(architectures: Sequence[str] | None, text_config: Any) -> _Windows | None:
    """None if the switch is off, or means nothing for this model."""
    model = known_model.of_config(architectures or (), text_config)
    seen = model.row.window.seen(model.read) if model.truly else None
    if seen is None:
        return None
    layers = model.row.stored_layers(model.read)
    return _Windows(["window" in of_layer for of_layer in layers], seen - 1)


def window_size(_result: int | None, self: Any) -> int | None:
    """What SGLang's ``ModelConfig`` says of the window; None leaves that as it is."""
    windows = _windows_of(self.hf_config.architectures, self.hf_text_config)
    return None if windows is None else windows.size


def window_of_attention(_result: None, self: Any, config: Any, *_: Any, **__: Any) -> None:
    """SGLang's Llama attention, which Mistral is run by, knows no window."""
    windows = _windows_of(getattr(config, "architectures", None), config)
    if windows is not None:
        self.attn.sliding_window_size = windows.of(self.attn.layer_id)


def windows_of_fallback(attentions: dict[int, Any], self: Any) -> None:
    """The Transformers fallback takes the config's number for SGLang's."""
    windows = _windows_of(self.config.architectures, self.text_config)
    if windows is not None:
        for layer_id, attention in attentions.items():
            attention.sliding_window_size = windows.of(layer_id)

"""Window models that stock SGLang stores as if every layer were full.

Under the flag they become hybrid: their window layers get pages of their own and give them back
when the window has passed. Which layers those are is in the table of models (`layer_rules`), by the
rules of SGLang's model code: that is what the attention layers were built with, and the config's
own list may say it otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sglang_jenga.boot import known_model
from sglang_jenga.boot.flags import Refused
from sglang_jenga.boot.known_model import KnownModel
from sglang_jenga.plan import layer_rules
from sglang_jenga.plan.layer_lists import LayerList
from sglang_jenga.plan.layer_rules import row_of
from sglang_jenga.plan.model_row import ModelRow, UnknownPlaceError

_logger = logging.getLogger(__name__)
_enabled = False


Kinds = list[bool | None]
"""Per layer whether it has a window; None for a layer without attention."""


def enable(on: bool, *, true_windows: bool = False) -> None:
    """Set whether the record that this process works on asks for jenga, and for true windows.

    SGLang asks "is this model hybrid?" without saying for which record.
    """
    global _enabled
    _enabled = on
    known_model.expect_true_windows(on and true_windows)


def window_layers(architectures: Sequence[str] | None, text_config: Any) -> Kinds | None:
    """Say per layer whether it has a window, or None if this model is not ours to change."""
    if not _enabled or text_config is None:
        return None
    model = known_model.of_config(architectures or (), text_config)
    if not _is_ours(model.row):
        return None
    layers = _layers_of(model)
    if not any("window" in kinds for kinds in layers):
        return None
    return [True if "window" in kinds else False if "full" in kinds else None for kinds in layers]


def _is_ours(row: ModelRow) -> bool:
    """Whether the table may have windows for a model that SGLang has none for."""
    return row.layers is not None and not row.refused and not row.stock_stores_windows


def _has_no_windows(architectures: Sequence[str] | None, text_config: Any) -> bool:
    """Whether SGLang has a window pool for such models, and this one has no window layer."""
    if not _enabled or text_config is None:
        return False
    model = known_model.of_config(architectures or (), text_config)
    if not model.listed or model.row.layers is None or not model.row.stock_stores_windows:
        return False
    layers = _layers_of(model)
    return bool(layers) and all("window" not in kinds for kinds in layers)


def _layers_of(model: KnownModel) -> LayerList:
    """What each layer stores, nothing for a row that `model_rules` refuses once SGLang knows which
    model it is; `Refused` for a config that the table cannot read."""
    try:
        return model.row.stored_layers(model.read)
    except UnknownPlaceError:
        return []
    except ValueError as error:
        raise Refused(layer_rules.refusal(model.architecture, str(error))) from None


def stored_window(model: Any) -> int | None:
    """Tokens that the window group of this ``ModelConfig`` will hold, None if only the model's code
    knows."""
    known = known_model.of_model(model)
    return known.row.window.stored(known.read) if known.listed else None


def is_hybrid(
    original: Callable[..., bool], model_architectures: list[str], hf_text_config: Any = None
) -> bool:
    if window_layers(model_architectures, hf_text_config) is not None:
        return True
    if _has_no_windows(model_architectures, hf_text_config):
        return False  # SGLang would cut a window pool for no layer
    return original(model_architectures, hf_text_config)


def layer_ids(
    original: Callable[..., tuple], model_architectures: list[str], hf_text_config: Any
) -> tuple:
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
    @register_model_override_predicate(lambda architecture: _is_ours(row_of([architecture])))
    def jenga_stores_windows(server_args: Any, hf_config: Any) -> dict[str, bool]:
        if not _enabled or server_args.disable_hybrid_swa_memory:
            return {}
        text_config = getattr(hf_config, "text_config", None) or hf_config
        if window_layers(hf_config.architectures, text_config) is None:
            return {}
        # SGLang has just logged the opposite.
        _logger.info("jenga stores the window layers of %s as such", hf_config.architectures[0])
        return {"disable_hybrid_swa_memory": False}

"""What a row of the table of models says. Stdlib only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_jenga.layers import agreement
from sglang_jenga.layers.registry import sliding_kind
from sglang_jenga.plan import head_shapes, layer_lists
from sglang_jenga.plan.head_shapes import HeadRule
from sglang_jenga.plan.layer_lists import LayerList, LayerRule, Read
from sglang_jenga.plan.state_sizes import StateRule


class UnknownPlaceError(ValueError):
    """A row lists layers of what SGLang has no place for; the message says of what."""


WINDOWS_BESIDE_STATES = (
    "all its attention layers are window layers, and beside states that is not carried yet"
)
NO_STATES = "SGLang's code for it keeps states, and its config leaves no layer to them"
_ALL_FULL = layer_lists.every_layer("full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How far a window layer looks back. Widths count the current token; SGLang's do not.

    The config states a length in the first of ``fields`` that is there; a dot leads into a nested
    section. A layer sees ``beside`` tokens more than that. SGLang's runner keeps ``kept`` tokens
    more than a layer sees.
    """

    fields: tuple[str, ...] = ("sliding_window_size", "sliding_window")
    beside: int = 0
    kept: int = 0

    def seen(self, read: Read) -> int | None:
        """Tokens that a layer sees, the current one included; None without a window."""
        for name in self.fields:
            length: int | None = _nested(read, name)
            if length:
                return length + self.beside
        return None

    def stored(self, read: Read) -> int | None:
        """Tokens that the window group holds of a long request."""
        seen = self.seen(read)
        return None if seen is None else seen + self.kept


def _nested(read: Read, name: str) -> Any:
    field_name, *path = name.split(".")
    value = read(field_name)
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """What is known of the models of one architecture.

    ``layers(read)`` says per layer what it stores, by the places that SGLang has for it: a tuple of
    ``"full"``, ``"window"``, ``"state"`` and ``"cross"``; `layer_lists` has the usual ones. It
    is None for a model that is refused and whose layers nobody needs to list. ``sliding`` is the
    layer type of what ``layers`` calls a window, as `layers.registry` knows it; it is made of the
    width that ``window.stored`` reads from the config.
    ``stock_stores_windows``: stock SGLang has a pool for windows too; else it stores them in full.
    ``state`` sizes the state of one layer; ``stateless``: SGLang takes a config without a state
    layer as one of attention alone; ``tracks``: SGLang tracks states inside prompts.
    ``encoder`` counts, from the whole config, the tokens that cross attention holds of one image.
    ``refused`` is why the server does not serve the model: a sentence, or a function of the config
    that gives one, empty for a config that is served. ``defaults`` are fields that transformers
    fills in when a checkpoint leaves them out. ``heads`` reads the shapes of full and of window
    layers. ``kv_cache_dtype`` is what SGLang makes of ``auto``. ``note`` is shown beside a plan.
    ``true_windows`` is the row in place of this one under --jenga-true-windows; None for a model on
    which that means nothing.
    """

    layers: LayerRule | None = _ALL_FULL
    window: Window = Window()
    sliding: str = "window"
    stock_stores_windows: bool = False
    state: StateRule | None = None
    stateless: bool = False
    tracks: bool = False
    encoder: Callable[[Mapping[str, Any]], int] | None = None
    refused: str | Callable[[Read], str] = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    heads: HeadRule = head_shapes.common
    kv_cache_dtype: str = "auto"
    note: str = ""
    true_windows: ModelRow | None = None

    def stored_layers(self, read: Read) -> LayerList:
        """What each layer stores; without a window in the config, window layers are full ones."""
        if self.layers is None:
            raise ValueError("the layers of a model that is not served are not listed")
        found = self.layers(read)
        unknown = {name for of_layer in found for name in of_layer} - set(layer_lists.PLACES)
        if unknown:
            raise UnknownPlaceError(
                f"its row in the table of models lists layers of {sorted(unknown)}, and a list is "
                f"of {', '.join(layer_lists.PLACES)}: the type of a window is what `sliding` says"
            )
        if self.window.stored(read) is not None:
            return found
        return layer_lists.windows_as_full(found)

    def why_refused(self, read: Read) -> str:
        """Why this model is not served, or an empty text."""
        why = self.refused if isinstance(self.refused, str) else self.refused(read)
        if why or self.layers is None:
            return why
        why = self.why_wrong(read)
        if why:
            return why
        places = {place for of_layer in self.stored_layers(read) for place in of_layer}
        if "window" in places and "state" in places and "full" not in places:
            return WINDOWS_BESIDE_STATES
        lacks_states = self.state is not None and "state" not in places
        return NO_STATES if lacks_states and not self.stateless else ""

    def why_wrong(self, read: Read) -> str:
        """Why this row says nothing that a plan or a server could use, or an empty text."""
        if self.layers is None:
            return ""
        try:
            layers = self.stored_layers(read)
        except UnknownPlaceError as error:
            return str(error)
        if any("cross" in of_layer and len(of_layer) > 1 for of_layer in layers):
            return "its row in the table of models lists a layer of cross attention and another one"
        if self.encoder is None and ("cross",) in layers:
            return "its row in the table of models has cross attention and no `encoder`"
        width = self.window.stored(read)
        if width is None or not any("window" in of_layer for of_layer in layers):
            return ""
        try:
            kind = sliding_kind(self.sliding, width)
        except ValueError as error:
            return str(error)
        found = agreement.fault(kind)
        return "" if found is None else f"the policy of {kind.label} does not agree: {found}"

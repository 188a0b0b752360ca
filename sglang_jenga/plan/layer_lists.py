"""Which layers of a model store what, asked of its config as SGLang's model code asks it.

A list says per layer what that layer stores, by the places that SGLang has for it: ``("full",)``
say, two of them where attention and a state stand side by side, none for a layer that stores
nothing. A ``"cross"`` layer stores an encoder's tokens and no text. Of which layer type a
``"window"`` is, the model's row says. The functions
read fields of the text config through ``read(name)``, which answers None for a field that is not
there. So the planner asks a parsed config.json and the server an object of transformers, by the
same rule. Stdlib only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Read = Callable[[str], Any]
LayerTypes = tuple[str, ...]
LayerList = list[LayerTypes]
LayerRule = Callable[[Read], LayerList]

PLACES = ("full", "window", "state", "cross")
FULL, WINDOW, STATE, NOTHING, CROSS = ("full",), ("window",), ("state",), (), ("cross",)
_OF_NAME: dict[str, LayerTypes] = {
    "full_attention": FULL,
    "attention": FULL,
    "attn": FULL,
    "sliding_attention": WINDOW,
    "swa": WINDOW,
    "linear_attention": STATE,
    "mamba": STATE,
    "conv": STATE,
    "short_conv": STATE,
    "jet": STATE,
    "mlp": NOTHING,
    "moe": NOTHING,
}
_OF_CHARACTER = {"M": STATE, "*": FULL, "-": NOTHING, "E": NOTHING}


def need(read: Read, name: str) -> Any:
    """Return a field that the model cannot do without; raise ValueError if it is not there."""
    value = read(name)
    if value is None:
        raise ValueError(f"config.json lacks {name}")
    return value


def every_layer(*types: str) -> LayerRule:
    """All layers alike."""
    return lambda read: [types] * need(read, "num_hidden_layers")


def looped(*loops: str) -> LayerRule:
    """Full attention in layers that run several times, each time with KV of its own."""

    def rule(read: Read) -> LayerList:
        times = math.prod(read(name) or 1 for name in loops)
        return [FULL] * (need(read, "num_hidden_layers") * times)

    return rule


def by_layer_types(
    run: int = 0, *, last: LayerTypes | None = None, last_by_default: LayerTypes | None = None
) -> LayerRule:
    """The config's own list. Without one: `run` window layers before each full one, or all full.
    `last` is what the last layer stores whatever the list says, `last_by_default` without one."""

    def rule(read: Read) -> LayerList:
        names = read("layer_types") or read("layers_block_type")
        if names:
            layers = _named(names, read("num_hidden_layers"))
        else:
            period = read("sliding_window_pattern") or run + 1
            count = need(read, "num_hidden_layers")
            layers = [FULL if (layer + 1) % period == 0 else WINDOW for layer in range(count)]
        at_end = last if names else last or last_by_default
        return layers if at_end is None else [*layers[:-1], at_end]

    return rule


def from_first(period: int) -> LayerRule:
    """The config's list. Without one the first of each `period` layers is full, the others windows:
    where the model has its own idea of a default."""

    def rule(read: Read) -> LayerList:
        names = read("layer_types")
        if names:
            return _named(names, read("num_hidden_layers"))
        count = need(read, "num_hidden_layers")
        return [WINDOW if layer % period else FULL for layer in range(count)]

    return rule


def every_nth_full(period: int, *, window: str = "sliding_window") -> LayerRule:
    """Windows in all layers but each `period`-th, if the config has a window at all."""

    def rule(read: Read) -> LayerList:
        count = need(read, "num_hidden_layers")
        if read(window) is None:
            return [FULL] * count
        return [WINDOW if (layer + 1) % period else FULL for layer in range(count)]

    return rule


def in_full(rule: LayerRule) -> LayerRule:
    """The same layers, windows stored as full ones."""
    return lambda read: windows_as_full(rule(read))


def windows_as_full(found: LayerList) -> LayerList:
    return [FULL if of_layer == WINDOW else of_layer for of_layer in found]


def by_pattern_length(read: Read) -> LayerList:
    """Exaone-4: of a pattern such as ``LLLG`` SGLang takes the length."""
    pattern, count = read("sliding_window_pattern"), need(read, "num_hidden_layers")
    if not isinstance(pattern, str) or not pattern or read("sliding_window") is None:
        return [FULL] * count
    return [WINDOW if (layer + 1) % len(pattern) else FULL for layer in range(count)]


def by_flags(read: Read) -> LayerList:
    """``hybrid_layer_pattern``: 1 for a window, 0 for full attention."""
    flags, count = need(read, "hybrid_layer_pattern"), need(read, "num_hidden_layers")
    _require_length("hybrid_layer_pattern", flags, count)
    return [WINDOW if flag == 1 else FULL for flag in flags[:count]]


def as_stored_by_sglang(read: Read) -> LayerList:
    """A model without a row: full, unless its config asks SGLang for a window pool."""
    if read("is_hybrid_swa") and read("hybrid_layer_pattern") is not None:
        return by_flags(read)
    return [FULL] * need(read, "num_hidden_layers")


def states_unless_listed(read: Read) -> LayerList:
    """Granite-4: the config's list. Without one every layer keeps a state."""
    count = need(read, "num_hidden_layers")
    names = read("layer_types")
    return _named(names, count) if names else [STATE] * count


def in_blocks(read: Read) -> LayerList:
    """IQuest-Q1: some first layers, a block that repeats, some last layers."""
    count = need(read, "num_hidden_layers")
    if read("use_sliding_window") is False or read("use_hybrid_layers") is False:
        return [FULL] * count
    names = [
        *(read("first_layers_types") or ()),
        *(read("hybrid_layers_types_block") or ()) * (read("num_hybrid_layers_block") or 0),
        *(read("last_layers_types") or ()),
    ]
    return _named(names, count)


def by_interval(read: Read) -> LayerList:
    """Qwen3-Next: full attention in each ``full_attention_interval``-th layer, whatever
    ``layer_types`` says."""
    count, interval = need(read, "num_hidden_layers"), read("full_attention_interval") or 4
    return [STATE if (layer + 1) % interval else FULL for layer in range(count)]


def by_characters(read: Read) -> LayerList:
    """Nemotron-H: ``M`` Mamba-2, ``*`` attention, ``-`` and ``E`` feed-forward."""
    pattern = read("hybrid_override_pattern")
    if pattern is None:
        names = need(read, "layers_block_type")
        return _named(names, len(names))
    if not set(pattern) <= set(_OF_CHARACTER):
        raise ValueError(
            f"hybrid_override_pattern must be of {''.join(_OF_CHARACTER)}, got {pattern!r}"
        )
    return [_OF_CHARACTER[character] for character in pattern]


def by_full_ids(read: Read) -> LayerList:
    """LFM2: a list of layer types, or the numbers of the layers with attention."""
    names, count = read("layer_types"), read("num_hidden_layers")
    if names:
        return _named(names, count)
    full = read("full_attn_idxs")
    ids = range(need(read, "num_hidden_layers"))
    return [FULL if full is None or layer in full else STATE for layer in ids]


def by_cross_ids(read: Read) -> LayerList:
    """Mllama: the numbers of the layers with cross attention."""
    cross, count = need(read, "cross_attention_layers"), need(read, "num_hidden_layers")
    return [CROSS if layer in cross else FULL for layer in range(count)]


def by_period(read: Read) -> LayerList:
    """Jamba: attention in one layer of each period, at an offset."""
    period, offset = need(read, "attn_layer_period"), need(read, "attn_layer_offset")
    count = need(read, "num_hidden_layers")
    return [FULL if layer % period == offset else STATE for layer in range(count)]


def _named(names: Sequence[str], count: int | None) -> LayerList:
    unknown = sorted(set(names) - set(_OF_NAME))
    if unknown:
        raise ValueError(f"layer_types must be of {sorted(_OF_NAME)}, got {unknown}")
    _require_length("layer_types", names, count)
    return [_OF_NAME[name] for name in names[:count]]


def _require_length(field: str, listed: Sequence[Any], count: int | None) -> None:
    if count is not None and len(listed) < count:
        raise ValueError(f"{field} names {len(listed)} layers of {count}")

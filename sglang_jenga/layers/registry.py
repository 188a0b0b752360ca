"""The layer types there are, by name. A package of one's own adds to them.

    from sglang_jenga.layers.registry import register_kind

    def load() -> None:                       # entry point of the group "sglang.srt.plugins"
        register_kind(SinkWindow)

SGLang calls the plugins of that group in every process, before anything is built.
"""

from __future__ import annotations

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window

_KINDS: dict[str, type[LayerKind]] = {kind.name: kind for kind in (Full, Window, Chunked, State)}


def register_kind(kind: type[LayerKind]) -> None:
    """Make a layer type known by its name.

    Raises:
        ValueError: the name is another type's.
        TypeError: `kind` is no subclass of `LayerKind`, or has no name or no policy.
    """
    if not (isinstance(kind, type) and issubclass(kind, LayerKind)):
        raise TypeError(f"a layer type is a subclass of LayerKind, got {kind!r}")
    if not getattr(kind, "name", None) or kind.policy is LayerKind.policy:
        raise TypeError(f"{kind.__name__} must have a name and a policy")
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a layer type {kind.name!r} already")


def kind_of(name: str, *parameters: int) -> LayerKind:
    """The layer type of this name, with its width where it has one.

    Raises:
        ValueError: nobody registered such a type.
    """
    if name not in _KINDS:
        raise ValueError(f"unknown layer type {name!r}, known are {', '.join(_KINDS)}")
    return _KINDS[name](*parameters)

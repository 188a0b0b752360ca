"""The layer types there are, by name. A package of one's own adds to them.

    # its pyproject.toml
    [project.entry-points."sglang_jenga.layers"]
    sink_window = "sink_window:register"

    # its module
    def register() -> None:
        register_kind(SinkWindow)
        register_model("SinkGemmaForCausalLM", ModelRow(..., sliding="sink_window"))

`load_installed` calls what is registered there: once in every process of a server, before anything
is built, and in `sglang-jenga plan`. `examples/sink_window` is a complete package.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from sglang_jenga.layers.base import LayerKind
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window

_KINDS: dict[str, type[LayerKind]] = {kind.name: kind for kind in (Full, Window, Chunked, State)}

ENTRY_POINTS = "sglang_jenga.layers"
_loaded = False


class RegistrationError(ValueError):
    """A package of layer types cannot be used."""


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


def load_installed() -> None:
    """Let the installed packages register their layer types and models, once per process.

    Raises:
        RegistrationError: one of them failed; the message names it.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()()
        except Exception as error:
            raise RegistrationError(
                f"the layer types of {entry.value} could not be registered: "
                f"{type(error).__name__}: {error}; mend that package or remove it"
            ) from error

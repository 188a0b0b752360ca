"""The layer types there are, by name. A package of one's own adds to them.

    # its pyproject.toml
    [project.entry-points."sglang_jenga.layers"]
    sink_window = "sink_window:register"

    # its module
    def register() -> None:
        register_kind(SinkWindow)
        register_model("SinkGemmaForCausalLM", ModelRow(..., sliding="sink_window"))

`load_installed` calls what is registered there: once in every process of a server with the flag,
before anything is built, and in `sglang-jenga plan`. `examples/sink_window` is a complete package.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from inspect import signature

from sglang_jenga.layers.base import Address, LayerKind, Storage
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.cross import Cross
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window

_KINDS: dict[str, type[LayerKind]] = {
    kind.name: kind for kind in (Full, Window, Chunked, State, Cross)
}

ENTRY_POINTS = "sglang_jenga.layers"
_loaded = False
_failed: RegistrationError | None = None


class RegistrationError(ValueError):
    """A package of layer types cannot be used."""


def register_kind(kind: type[LayerKind]) -> None:
    """Make a layer type known by its name.

    It must be one that a server can carry. SGLang has one pool of full attention, one pool whose
    slots are found through that one's, and one pool of states; the first and the last have their
    types. So it is `MAPPED`, stores K and V rows, and is made of its width in tokens alone.

    Raises:
        ValueError: the name is another type's.
        TypeError: `kind` is no subclass of `LayerKind`, has no name or no policy, or is a type that
            no server can carry.
    """
    if not (isinstance(kind, type) and issubclass(kind, LayerKind)):
        raise TypeError(f"a layer type is a subclass of LayerKind, got {kind!r}")
    if not getattr(kind, "name", None) or kind.policy is LayerKind.policy:
        raise TypeError(f"{kind.__name__} must have a name and a policy")
    _require_a_place(kind)
    if _KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a layer type {kind.name!r} already")


def _require_a_place(kind: type[LayerKind]) -> None:
    name = f"the layer type {kind.name!r}"
    if kind.address is not Address.MAPPED or kind.storage is not Storage.KV:
        raise TypeError(
            f"{name} must be {Address.MAPPED.name} and store {Storage.KV.name}, not "
            f"{kind.address.name} and {kind.storage.name}: SGLang has one pool of full attention "
            "and one of states, and both have their type"
        )
    stored = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    if "width" not in stored and not isinstance(getattr(kind, "width", None), property):
        raise TypeError(f"{name} must have a `width`: the tokens, at most, that a step reads")
    try:
        signature(kind).bind(1)
    except TypeError as error:
        raise TypeError(
            f"{name} must be made of its width alone, as {kind.__name__}(1024): {error}"
        ) from None


def sliding_kind(name: str, width: int) -> LayerKind:
    """The layer type of a model's windows, made of their width.

    Raises:
        ValueError: nobody registered such a type, or its pages are not found through full slots.
    """
    if name in _KINDS and _KINDS[name].address is not Address.MAPPED:
        mapped = [known for known, kind in _KINDS.items() if kind.address is Address.MAPPED]
        raise ValueError(
            f"a window cannot be of the layer type {name!r}, only of {', '.join(mapped)}"
        )
    kind = kind_named(name)(width)  # type: ignore[call-arg]  # so it was registered
    found = getattr(kind, "width", None)
    if not isinstance(found, int) or found < 1:
        raise ValueError(f"the layer type {name!r} made of {width} has the width {found!r}")
    return kind


def kind_of(name: str, *parameters: int) -> LayerKind:
    """The layer type of this name, with its width where it has one.

    Raises:
        ValueError: nobody registered such a type.
    """
    return kind_named(name)(*parameters)


def kind_named(name: str) -> type[LayerKind]:
    """The class of this layer type.

    Raises:
        ValueError: nobody registered such a type.
    """
    if name not in _KINDS:
        raise ValueError(f"unknown layer type {name!r}, known are {', '.join(_KINDS)}")
    return _KINDS[name]


def load_installed() -> None:
    """Let the installed packages register their layer types and models, once per process.

    Raises:
        RegistrationError: one of them failed; the message names it.
    """
    global _loaded, _failed
    if _failed is not None:
        raise _failed
    if _loaded:
        return
    _loaded = True
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()()
        except Exception as error:
            why = " ".join(str(error).split())
            _failed = RegistrationError(
                f"the layer types of {entry.value} could not be registered: "
                f"{type(error).__name__}: {why}; mend that package or remove it"
            )
            raise _failed from error

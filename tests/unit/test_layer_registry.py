"""Layer types by their names, and which ones of a package of its own a server can carry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sglang_jenga.layers import registry
from sglang_jenga.layers.base import Address, LayerKind, Sliding
from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.layers.full import Full, FullPolicy
from sglang_jenga.layers.registry import kind_of, register_kind, sliding_kind
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window, WindowPolicy
from sglang_jenga.radix.policy import LayerPolicy


class Alternating(Window):
    """A type that is somebody else's."""

    __slots__ = ()
    name = "alternating"


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


@pytest.mark.usefixtures("own_registry")
def test_a_registered_type_is_known_by_its_name():
    register_kind(Alternating)
    register_kind(Alternating)  # SGLang loads its plugins more than once in some processes

    assert kind_of("alternating", 8) == Alternating(8)
    assert kind_of("alternating", 8).label == "alternating(8)"


@pytest.mark.usefixtures("own_registry")
def test_a_type_cannot_take_the_name_of_another():
    class Impostor(Window):
        __slots__ = ()

    with pytest.raises(ValueError, match="there is a layer type 'window' already"):
        register_kind(Impostor)


@pytest.mark.parametrize("thing", [LayerPolicy, Full(), "full"])
def test_what_is_no_layer_type_is_refused(thing):
    with pytest.raises(TypeError, match="a layer type is a subclass of LayerKind"):
        register_kind(thing)


def test_a_type_needs_a_name_and_a_policy():
    with pytest.raises(TypeError, match="must have a name and a policy"):
        register_kind(type("Nameless", (LayerKind,), {"__slots__": ()}))


def test_an_unknown_type_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown layer type 'latent', known are full, window"):
        kind_of("latent")


def test_types_say_how_sglang_finds_their_pages():
    found = {kind.name: kind.address for kind in (Full(), Window(4), Chunked(4), State())}

    assert found == {
        "full": Address.ROW,
        "window": Address.MAPPED,
        "chunked": Address.MAPPED,
        "state": Address.REQUEST,
    }


# ---- what a server can carry ----------------------------------------------------------------

PLACES = "SGLang has one pool of full attention and one of states, and both have their type"


@dataclass(frozen=True, slots=True)
class Summary(State):
    """Per request."""

    name = "summary"


@dataclass(frozen=True, slots=True)
class Latent(LayerKind):
    """Found by the row."""

    name = "latent"

    @property
    def policy(self):
        return FullPolicy()


@dataclass(frozen=True, slots=True)
class Widthless(LayerKind):
    """Mapped, without a width."""

    name = "widthless"
    address = Address.MAPPED
    near: int = 4

    @property
    def policy(self):
        return FullPolicy()


@dataclass(frozen=True, slots=True)
class Dilated(Sliding):
    """Made of two numbers."""

    name = "dilated"
    width: int
    every: int

    @property
    def policy(self):
        return WindowPolicy(self.width - 1)


@dataclass(frozen=True, slots=True)
class Halved(LayerKind):
    """A width that it works out itself."""

    name = "halved"
    address = Address.MAPPED
    near: int

    @property
    def width(self):
        return self.near // 2

    @property
    def policy(self):
        return WindowPolicy(self.width - 1)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Summary, f"'summary' must be MAPPED and store KV, not REQUEST and STATE: {PLACES}"),
        (Latent, f"'latent' must be MAPPED and store KV, not ROW and KV: {PLACES}"),
        (Widthless, "'widthless' must have a `width`: the tokens, at most, that a step reads"),
        (Dilated, "'dilated' must be made of its width alone, as Dilated(1024): "),
    ],
)
def test_a_type_that_no_server_can_carry_is_refused_in_one_line(kind, why):
    with pytest.raises(TypeError) as raised:
        register_kind(kind)

    assert str(raised.value).startswith(f"the layer type {why}")
    assert "\n" not in str(raised.value)
    assert kind.name not in registry._KINDS


@pytest.mark.usefixtures("own_registry")
def test_a_width_may_be_worked_out_but_must_be_a_number_of_tokens():
    register_kind(Halved)

    assert sliding_kind("halved", 16).width == 8
    with pytest.raises(ValueError, match="the layer type 'halved' made of 1 has the width 0"):
        sliding_kind("halved", 1)


@pytest.mark.parametrize("name", ["full", "state"])
def test_a_window_is_of_a_type_whose_pages_are_found_through_full_ones(name):
    with pytest.raises(ValueError, match=f"a window cannot be of the layer type '{name}'"):
        sliding_kind(name, 8)

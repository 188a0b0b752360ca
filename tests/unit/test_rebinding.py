"""Names bound anew outside SGLang's registry: what is checked before, and after."""

from __future__ import annotations

import sys
import types

import pytest

from sglang_jenga.boot import rebinding
from sglang_jenga.boot.hooks import HookError
from sglang_jenga.boot.rebinding import UNBOUND, Rebinding

THERE = "sglang.srt.pretended"
USER = "sglang.srt.pretended_user"


def compute(x, scale):
    return x * scale


def ours(x, scale):
    return -x * scale


def around(original, *args, **kwargs):
    return original(*args, **kwargs) + 1


class Record:
    def __init__(self, value=0):
        self.value = value


def no():
    return False


@pytest.fixture
def there(monkeypatch, tmp_path):
    """A module of SGLang with a function, a value and a class; another imports from it."""
    module, user = types.ModuleType(THERE), types.ModuleType(USER)
    module.compute, module.FLAG, module.Engine = compute, True, type("Engine", (), {"made": Record})
    user.renamed = compute
    source = tmp_path / "pretended.py"
    source.write_text("def run(x):\n    return bound_on_gpus_only(x)\n")
    module.__file__ = str(source)
    for name, value in ((THERE, module), (USER, user)):
        monkeypatch.setitem(sys.modules, name, value)
        monkeypatch.setattr(
            sys.modules["sglang.srt"], name.rpartition(".")[2], value, raising=False
        )
    monkeypatch.setattr(rebinding, "_ours", {})
    return module


def row(name, expected, value, kind="replace", **kwargs):
    return Rebinding(f"{THERE}.{name}", kind, expected, value, "a test", **kwargs)


def test_a_function_is_replaced_where_it_is_and_where_it_was_imported(there):
    rebinding.rebind([row("compute", "(x, scale)", f"{__name__}:ours")])

    assert there.compute(2, 3) == -6
    assert sys.modules[USER].renamed(2, 3) == -6


def test_a_wrapper_gets_the_original_and_keeps_its_signature(there):
    rebinding.rebind([row("compute", "(x, scale)", f"{__name__}:around", "around")])

    assert there.compute(2, scale=3) == 7
    assert rebinding.describe(f"{THERE}.compute") == "(x, scale)"


def test_a_value_is_replaced(there):
    rebinding.rebind([row("FLAG", "bool", False)])

    assert there.FLAG is False


def test_a_class_that_stands_in_a_class_is_wrapped_without_becoming_a_method(there):
    rebinding.rebind([row("Engine.made", "class", f"{__name__}:wrapped", "around")])

    assert there.Engine().made(value=4).value == 5


def wrapped(original, value):
    return original(value + 1)


def test_an_unbound_name_is_bound_if_the_modules_code_uses_it(there):
    rebinding.rebind([row("bound_on_gpus_only", UNBOUND, f"{__name__}:ours")])

    assert there.bound_on_gpus_only is ours
    with pytest.raises(HookError, match="no such name"):
        rebinding.rebind([row("never_heard_of", UNBOUND, f"{__name__}:ours")])


def test_a_method_that_a_class_lacks_is_bound_if_a_neighbour_has_it(there, monkeypatch, tmp_path):
    there.Engine.__module__ = THERE  # a class is found in its module's file
    (tmp_path / "neighbour.py").write_text("class Other:\n    def length(self): ...\n")

    rebinding.rebind([row("Engine.length", UNBOUND, f"{__name__}:length")])

    assert there.Engine().length() == 1
    with pytest.raises(HookError, match="no such name"):
        rebinding.rebind([row("Engine.never_heard_of", UNBOUND, f"{__name__}:length")])
    with pytest.raises(HookError, match="bound by now"):
        rebinding.rebind([row("Engine.made", UNBOUND, f"{__name__}:length")])


def length(self):
    return 1


def test_applying_twice_wraps_once(there):
    rows = [row("compute", "(x, scale)", f"{__name__}:around", "around")]

    rebinding.rebind(rows)
    rebinding.rebind(rows)

    assert there.compute(2, 3) == 7


def test_a_row_for_another_machine_is_left_out(there):
    rebinding.rebind([row("compute", "(nonsense)", f"{__name__}:ours", where=f"{__name__}:no")])

    assert there.compute is compute


@pytest.mark.parametrize(
    ("name", "expected", "found"),
    [
        ("compute", "(x)", "(x, scale)"),
        ("FLAG", "str", "bool"),
        ("Engine.made", "(value)", "class"),
        ("gone", "bool", "no such name"),
    ],
)
def test_another_sglang_is_refused_in_a_line_and_nothing_is_bound(there, name, expected, found):
    good = row("FLAG", "bool", False)

    with pytest.raises(HookError) as caught:
        rebinding.rebind([good, row(name, expected, f"{__name__}:ours")])

    assert f"{THERE}.{name}: written for {expected}, SGLang" in str(caught.value)
    assert found in str(caught.value)
    assert there.FLAG is True and there.compute is compute


def test_a_name_that_did_not_take_the_value_is_an_error(there, monkeypatch):
    class Stubborn(type):
        def __setattr__(cls, name, value):
            pass

    there.Engine = Stubborn("Engine", (), {"flag": True})

    with pytest.raises(HookError, match="could not be patched"):
        rebinding.rebind([row("Engine.flag", "bool", False)])

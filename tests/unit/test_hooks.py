"""The table of hooks: what it checks before SGLang is patched, and after."""

from __future__ import annotations

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_jenga.boot import hooks
from sglang_jenga.boot.hooks import Hook, HookError


class Target:
    """Stands for an SGLang class."""

    def plain(self, sizes: int, *, pool: str = "x") -> str:
        return f"{sizes}{pool}"

    @classmethod
    def made(cls, args: list[str]) -> str:
        return cls.__name__

    @staticmethod
    def free(parser: object) -> None:
        return None


def path(name: str) -> str:
    return f"{__name__}.Target.{name}"


def shout(original, self, sizes, **kwargs):
    return original(self, sizes, **kwargs).upper()


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """SGLang's registry is global: keep what others put there out, and ours in here."""
    for method in ("plain", "made", "free"):
        monkeypatch.setattr(Target, method, Target.__dict__[method])
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("plain", "(self, sizes, *, pool)"),
        ("made", "(cls, args)"),
        ("free", "(parser)"),
    ],
)
def test_signature_is_the_parameter_list_that_a_hook_receives(name, signature):
    assert hooks.signature_of(path(name)) == signature


def test_applied_hook_wraps_its_target():
    hooks.apply([Hook(path("plain"), "around", "(self, sizes, *, pool)", shout)])

    assert Target().plain(3, pool="y") == "3Y"


def test_signature_stays_readable_through_a_hook_that_is_already_on():
    hooks.apply([Hook(path("plain"), "around", "(self, sizes, *, pool)", shout)])

    assert hooks.signature_of(path("plain")) == "(self, sizes, *, pool)"


def test_mismatch_names_target_expected_found_and_version():
    with pytest.raises(HookError) as caught:
        hooks.register([Hook(path("plain"), "around", "(self, size)", shout)])

    assert str(caught.value) == (
        f"{path('plain')}: written for (self, size), "
        f"SGLang {hooks.sglang_version} has (self, sizes, *, pool)"
    )


@pytest.mark.parametrize("target", ["Target.gone", "Gone.method"])
def test_missing_target_is_a_mismatch(target):
    with pytest.raises(HookError, match="no such function"):
        hooks.register([Hook(f"{__name__}.{target}", "around", "(self)", shout)])


def test_one_mismatch_registers_none_of_the_table():
    good = Hook(path("made"), "around", "(cls, args)", shout)
    bad = Hook(path("plain"), "around", "(self)", shout)

    with pytest.raises(HookError):
        hooks.register([good, bad])

    assert not HookRegistry._hooks


def test_target_patched_by_another_plugin_is_refused_instead_of_ignored():
    HookRegistry.register(path("plain"), shout)
    HookRegistry._patched.add(path("plain"))

    with pytest.raises(HookError, match="already patched by another SGLang plugin"):
        hooks.apply([Hook(path("plain"), "around", "(self, sizes, *, pool)", shout)])


def test_hook_that_sglang_failed_to_apply_is_an_error(monkeypatch):
    """SGLang only logs it."""
    monkeypatch.setattr(HookRegistry, "apply_hooks", lambda: None)

    with pytest.raises(HookError, match="could not be patched"):
        hooks.apply([Hook(path("plain"), "around", "(self, sizes, *, pool)", shout)])

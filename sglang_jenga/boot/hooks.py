"""How this package enters SGLang: one row per name that it touches, checked before it is used.

The rows stand in `hook_table`. SGLang's ``HookRegistry`` logs and swallows every failure, so both
ends are checked here: the target is still the function we were written for, and afterwards the
patch is really on. `rebinding` has the rows that the registry cannot serve.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType
from sglang.version import __version__ as sglang_version

_SOURCE = HookSource(plugin_name="jenga", dist_name="sglang-jenga")


class Hook(NamedTuple):
    """One patch of one SGLang function.

    ``expected_signature`` is the target's parameter list without annotations and defaults, as
    written in a ``def``: ``"(self, *, sizes, req_to_token_pool)"``. ``function``, or the name
    ``"module:function"`` of one, gets the target's arguments after ``original`` (kind ``around``)
    or after ``result`` (kind ``after``). ``why`` says what it is there for, ``look`` what a new
    SGLang may change that the parameter list does not show.
    """

    target: str
    kind: Literal["before", "after", "around", "replace"]
    expected_signature: str
    function: Callable[..., Any] | str
    why: str = ""
    look: str = ""

    def resolved(self) -> Callable[..., Any]:
        """The function, imported if need be."""
        named = isinstance(self.function, str)
        return pkgutil.resolve_name(self.function) if named else self.function


class Call(NamedTuple):
    """A function of SGLang through which this package registers something; ``function`` calls it.

    Nothing is patched. The row is there so that a changed parameter list is told in one line.
    """

    target: str
    expected_signature: str
    function: str
    why: str
    look: str = ""


class Subclass(NamedTuple):
    """A class of SGLang that one of ours extends, and so depends on beyond its signatures.

    ``constructs``: ours runs the parent's constructor; otherwise it sets the attributes by hand.
    """

    target: str
    ours: str
    why: str
    constructs: bool = True


class HookError(RuntimeError):
    """SGLang is not the program our hooks were written for."""


def register(hooks: Sequence[Hook]) -> None:
    """Check every target, then register all hooks, or none of them."""
    problems = [problem for hook in hooks if (problem := _mismatch(hook))]
    if problems:
        raise HookError("; ".join(problems))
    for hook in hooks:
        HookRegistry.register(hook.target, hook.resolved(), HookType(hook.kind), source=_SOURCE)


def check(calls: Sequence[Call]) -> None:
    """See that SGLang still takes what we are about to register."""
    problems = [problem for call in calls if (problem := _mismatch(call))]
    if problems:
        raise HookError("; ".join(problems))


def apply(hooks: Sequence[Hook]) -> None:
    """Register `hooks` after SGLang has applied its own round, and see that they took effect."""
    for hook in hooks:
        if hook.target in HookRegistry._patched:
            # SGLang patches a target once per process: a later hook would be ignored in silence.
            raise HookError(f"{hook.target} is already patched by another SGLang plugin")
    register(hooks)
    HookRegistry.apply_hooks()
    missing = sorted(target for target in _ours(hooks) if target not in HookRegistry._patched)
    if missing:
        raise HookError(f"SGLang {sglang_version} could not be patched at {', '.join(missing)}")


def _ours(hooks: Sequence[Hook]) -> set[str]:
    """Return the targets of `hooks` and of what this package registered in other ways."""
    registered = {
        target
        for target, entries in HookRegistry._hooks.items()
        if any(function.__module__.startswith("sglang_jenga.") for _, function, _ in entries)
    }
    return registered | {hook.target for hook in hooks}


def signature_of(target: str) -> str:
    """Return a dotted target's parameter list without annotations and defaults."""
    owner_path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    # Past the descriptor, so that a class method shows the `cls` that its hook will receive.
    raw = owner.__dict__.get(name, getattr(owner, name)) if isinstance(owner, type) else None
    function = getattr(raw, "__func__", raw) if raw is not None else getattr(owner, name)
    bare = {"annotation": inspect.Parameter.empty, "default": inspect.Parameter.empty}
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([parameter.replace(**bare) for parameter in parameters]))


def describe(target: str) -> str:
    """Say what a dotted name holds: a parameter list, ``class``, or the type of anything else."""
    value = pkgutil.resolve_name(target)
    if inspect.isclass(value):
        return "class"
    try:
        return signature_of(target)
    except (TypeError, ValueError):  # not callable, or written in C
        return type(value).__name__


def _mismatch(hook: Hook | Call) -> str | None:
    """Describe how the target differs from what `hook` expects, or return None."""
    try:
        found = signature_of(hook.target)
    except (ImportError, AttributeError) as error:
        found = f"no such function ({error})"
    if found == hook.expected_signature:
        return None
    return (
        f"{hook.target}: written for {hook.expected_signature}, SGLang {sglang_version} has {found}"
    )

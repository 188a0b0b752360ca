"""Names that are bound anew where SGLang's hook registry does not reach: values, and torch itself.

A `Rebinding` is a row of the table as a `Hook` is. It is checked before it is used, seen to be
applied, and may be applied again: a name that holds ours already is left alone.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from sglang_jenga.boot.hooks import HookError, describe, sglang_version

UNBOUND = "unbound"
"""What is expected of a name that a module's code uses and binds on other devices only, or of a
class's method that it lacks while its neighbours have it."""

_ours: dict[str, Any] = {}


class Rebinding(NamedTuple):
    """One name that this package binds anew.

    ``expected`` is what `describe` says of SGLang's own binding: a function's parameter list,
    ``class``, the type of a value; or `UNBOUND`. ``value`` is bound in its place; a string
    ``"module:function"`` names one of ours, which gets the original before its arguments if
    ``kind`` is ``around``. ``where``, a name as well, says whether the row is for this machine.
    A function of SGLang is also replaced in the modules that have imported it.
    """

    target: str
    kind: Literal["replace", "around"]
    expected: str
    value: Any
    why: str
    look: str = ""
    where: str = ""

    def is_for_here(self) -> bool:
        return not self.where or pkgutil.resolve_name(self.where)()


def rebind(rows: Sequence[Rebinding]) -> None:
    """Check every row that is for this machine, then bind all names, or none of them."""
    todo = [row for row in rows if row.is_for_here() and not _is_on(row)]
    check(todo)
    for row in todo:
        _bind(row)
    missing = sorted(row.target for row in todo if not _is_on(row))
    if missing:
        raise HookError(f"SGLang {sglang_version} could not be patched at {', '.join(missing)}")


def check(rows: Sequence[Rebinding]) -> None:
    """See that every name holds what its row was written for, or ours already."""
    problems = [problem for row in rows if not _is_on(row) and (problem := _mismatch(row))]
    if problems:
        raise HookError("; ".join(problems))


def _owner(target: str) -> tuple[Any, str]:
    owner, _, name = target.rpartition(".")
    return pkgutil.resolve_name(owner), name


def _is_on(row: Rebinding) -> bool:
    if row.target not in _ours:
        return False
    owner, name = _owner(row.target)
    return getattr(owner, name, UNBOUND) is _ours[row.target]


def _mismatch(row: Rebinding) -> str | None:
    try:
        owner, name = _owner(row.target)
        found = _unbound(owner, name) if row.expected == UNBOUND else describe(row.target)
    except (ImportError, AttributeError) as error:
        found = f"no such name ({error})"
    if found == row.expected:
        return None
    return f"{row.target}: written for {row.expected}, SGLang {sglang_version} has {found}"


def _unbound(owner: Any, name: str) -> str:
    """`UNBOUND` if the code of a module uses the name, or if a class lacks it and a file beside
    its own has it; otherwise what is wrong."""
    if inspect.isclass(owner) and hasattr(owner, name):
        return "bound by now"
    path = Path(inspect.getfile(owner))
    files = path.parent.glob("*.py") if inspect.isclass(owner) else [path]
    used = any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files)
    return UNBOUND if used else "no such name"


def _bind(row: Rebinding) -> None:
    owner, name = _owner(row.target)
    original = getattr(owner, name, None)
    new = _value(row, original)
    _ours[row.target] = new
    static = isinstance(owner, type) and inspect.isclass(original)
    setattr(owner, name, staticmethod(new) if static else new)
    if inspect.isfunction(original):
        _replace_imported(original, new)


def _value(row: Rebinding, original: Any) -> Any:
    value = row.value
    if isinstance(value, str):
        value = pkgutil.resolve_name(value)
    if row.kind == "replace":
        return value

    def around(*args: Any, **kwargs: Any) -> Any:
        return value(original, *args, **kwargs)

    return around if inspect.isclass(original) else functools.wraps(original)(around)


def _replace_imported(original: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Put right what ``from module import function`` has copied before."""
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("sglang.srt.") or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, new)

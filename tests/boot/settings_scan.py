"""Which functions of a source tree read which of SGLang's settings, found in the source.

A setting is a server argument or a ``SGLANG_*`` environment variable. Nothing is imported: SGLang
takes ten seconds to import, its syntax trees a few.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

SRT = Path(find_spec("sglang").submodule_search_locations[0]) / "srt"

# Calls that return configuration, and names that hold it. Attributes behind them are settings.
_VIEWS = re.compile(
    "get_(device|model|exec|schedule|memory|spec|lora|mm|disagg|serving|observability|parallel)"
    "|get_(global_)?server_args|resolv(ed|ing)_view"
)
_RECORDS = frozenset({"server_args", "cfg"})
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_VARIABLE = re.compile(r"SGLANG_[A-Z0-9_]+")


@functools.cache
def server_arguments() -> frozenset[str]:
    """Every field of ``ServerArgs`` that a user may give."""
    fields = set()
    for path in (SRT / "arg_groups" / "fields").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
                fields |= {name for name in names if not name.startswith("_")}
    return frozenset(fields)


@functools.cache
def readers_in(path: Path, arguments: frozenset[str]) -> dict[str, set[str]]:
    """Setting -> qualified names of the functions and classes of this file that read it.

    A constant of the module stands for what it was read from: its readers are those who use it.
    What the module reads otherwise has the reader ``""``.
    """
    scan = _Scan(arguments)
    tree = ast.parse(path.read_text())
    scan.visit_in(tree, "", frozenset())
    scan.follow_constants(tree)
    return dict(scan.readers)


def sources(scope: str) -> Iterator[tuple[str, Path]]:
    """Files of a folder or one file of SGLang, with their names in it."""
    root = SRT / scope
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        yield path.relative_to(SRT).as_posix(), path


@functools.cache
def functions_in(path: Path) -> set[str]:
    """Qualified names of all functions and classes of a file."""
    names: set[str] = set()

    def visit(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _DEFINITIONS):
                names.add(f"{function}.{child.name}".lstrip("."))
                visit(child, f"{function}.{child.name}".lstrip("."))

    visit(ast.parse(path.read_text()), "")
    return names


def lies_in(module: str, function: str, place: str) -> bool:
    """Whether a function lies in a place: a folder, a file, or ``file::function``."""
    file, _, outer = place.partition("::")
    inside = module == file or module.startswith(file + "/")
    return inside and (not outer or function == outer or function.startswith(outer + "."))


class _Scan:
    def __init__(self, arguments: frozenset[str]) -> None:
        self._arguments = arguments
        self.readers: defaultdict[str, set[str]] = defaultdict(set)
        self._constants: defaultdict[str, set[str]] = defaultdict(set)

    def visit_in(self, node: ast.AST, function: str, records: frozenset[str]) -> None:
        """Visit what lies in ``node``, which is part of ``function``; ``records`` are names that
        hold configuration there."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            records |= _records_of(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _DEFINITIONS):
                inner = f"{function}.{child.name}".lstrip(".")
                self.visit_in(child, inner, records)
                continue
            found = self._read_by(child, records)
            for setting in found:
                self.readers[setting].add(function)
            self.visit_in(child, function, records)
        if not function and isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = {name for part in ast.walk(node) for name in self._read_by(part, records)}
            for target in targets:
                if isinstance(target, ast.Name):
                    self._constants[target.id] |= inside

    def _read_by(self, node: ast.AST, records: frozenset[str]) -> set[str]:
        """Settings that this very node reads."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value} if _VARIABLE.fullmatch(node.value) else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "getattr" and len(node.args) > 1:
                name = getattr(node.args[1], "value", None)
                return {name} & self._arguments if _is_record(node.args[0], records) else set()
            return set()
        if not isinstance(node, ast.Attribute):
            return set()
        if isinstance(node.value, ast.Name) and node.value.id == "envs":
            return {node.attr} if _VARIABLE.fullmatch(node.attr) else set()
        return {node.attr} & self._arguments if _is_record(node.value, records) else set()

    def follow_constants(self, tree: ast.Module) -> None:
        """Move what a constant was read from to the functions that use the constant."""
        users: defaultdict[str, set[str]] = defaultdict(set)
        _users_of(tree, "", self._constants.keys(), users)
        for constant, settings in self._constants.items():
            for setting in settings if users[constant] else ():
                self.readers[setting].discard("")
                self.readers[setting] |= users[constant]


def _records_of(function: ast.AST) -> frozenset[str]:
    """Names that the function's own statements bind to configuration."""
    return frozenset(
        node.targets[0].id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and _is_record(node.value, frozenset())
    )


def _is_record(node: ast.AST, records: frozenset[str]) -> bool:
    """Whether an expression is configuration, or a part of it: ``get_exec().mamba``."""
    while isinstance(node, ast.Attribute):
        if node.attr == "server_args":
            return True
        node = node.value
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and bool(_VIEWS.fullmatch(node.func.id))
    return isinstance(node, ast.Name) and (node.id in records or node.id in _RECORDS)


def _users_of(node: ast.AST, function: str, names: object, users: dict[str, set[str]]) -> None:
    for child in ast.iter_child_nodes(node):
        inner = function
        if isinstance(child, _DEFINITIONS):
            inner = f"{function}.{child.name}".lstrip(".")
        elif isinstance(child, ast.Name) and function and child.id in names:
            users[child.id].add(function)
        _users_of(child, inner, names, users)

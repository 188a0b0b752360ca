"""The table of everything that we touch in SGLang, against the SGLang that is installed."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from sglang_jenga.boot import (
    cpu_table,
    hook_docs,
    hook_table,
    hooks,
    rebinding,
    scheduler_table,
)
from sglang_jenga.boot.hooks import Call, Hook, HookError
from sglang_jenga.boot.rebinding import Rebinding
from sglang_jenga.testing.engines import preload

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row for moment in hook_table.TABLE for row in moment.rows]
HOOKS = [row for row in ROWS if isinstance(row, Hook | Call)]
REBINDINGS = [row for row in ROWS if isinstance(row, Rebinding)]


def target_of(row) -> str:
    return row.target.removeprefix("sglang.")


@pytest.fixture(scope="module", autouse=True)
def sglang_is_imported():
    preload()


def test_every_group_of_rows_has_its_moment():
    """A group that no moment lists would be in use and in no document."""
    groups = [
        value
        for module in (hook_table, scheduler_table, cpu_table)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, tuple) and isinstance(value[0], tuple)
    ]
    listed = {id(row) for row in (*ROWS, *hook_table.TABLE)}

    assert len(groups) > 8
    assert [row for group in groups for row in group if id(row) not in listed] == []


def test_no_name_is_bound_twice_on_one_machine():
    for_a_gpu = {row.target for row in REBINDINGS if row.where.endswith(":on_a_gpu")}
    for_a_cpu = {row.target for row in (*cpu_table.CPU_SCHEDULER, *cpu_table.CPU_RESOLUTION)}
    targets = [row.target for row in ROWS]

    twice = {target for target in targets if targets.count(target) > 1}
    assert twice == for_a_gpu & for_a_cpu
    assert all(targets.count(target) == 2 for target in twice)


@pytest.mark.parametrize("row", HOOKS, ids=target_of)
def test_hook_is_written_for_this_sglang(row: Hook | Call):
    hooks.check([row])
    resolved = pkgutil.resolve_name(row.function)

    assert callable(resolved)


@pytest.mark.parametrize("row", REBINDINGS, ids=target_of)
def test_rebinding_is_written_for_this_sglang(row: Rebinding):
    rebinding.check([row])
    if isinstance(row.value, str):
        assert callable(pkgutil.resolve_name(row.value))


@pytest.mark.parametrize("row", HOOKS, ids=target_of)
def test_a_hook_whose_target_has_another_parameter_is_refused(row: Hook | Call):
    with pytest.raises(HookError, match="written for"):
        hooks.check([row._replace(expected_signature="(self, one_more)")])


@pytest.mark.parametrize("row", ROWS, ids=target_of)
def test_a_name_that_is_gone_is_refused(row):
    gone = row._replace(target=f"{row.target}_of_the_past")
    checked = rebinding.check if isinstance(row, Rebinding) else hooks.check

    with pytest.raises(HookError, match="no such"):
        checked([gone])


@pytest.mark.parametrize("row", [row for row in REBINDINGS if row.kind == "replace"], ids=target_of)
def test_a_replacement_takes_what_its_callers_may_leave_out(row: Rebinding):
    """Whatever ours requires, SGLang's has too."""
    if not row.expected.startswith("("):
        return
    names = re.findall(r"\w+", row.expected)
    parameters = inspect.signature(pkgutil.resolve_name(row.value)).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD}

    assert required <= set(names)


def test_nothing_in_the_package_binds_names_of_sglang_by_hand():
    """Neither ``module.name = ...`` on a module that was imported from there nor ``setattr``."""
    found = []
    for path in (ROOT / "sglang_jenga").rglob("*.py"):
        if path.name == "rebinding.py" or "testing" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom | ast.Import)
            and re.match(r"(sglang|torch)\b", getattr(node, "module", "") or node.names[0].name)
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                targets = [ast.Attribute(node.args[0], "name")]
            for target in targets:
                if isinstance(target, ast.Attribute):
                    root = ast.unparse(target.value).partition(".")[0]
                    if root in imported:
                        found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")

    assert found == []


def test_the_page_on_upgrading_is_what_the_table_says():
    assert (ROOT / "docs" / "upgrading-sglang.md").read_text() == hook_docs.page()

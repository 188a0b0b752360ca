"""docs/upgrading-sglang.md, written from the table: ``python -m sglang_jenga.boot.hook_docs``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from sglang_jenga.boot.hook_table import TABLE, Moment
from sglang_jenga.boot.hooks import Call, Hook
from sglang_jenga.boot.rebinding import UNBOUND, Rebinding
from sglang_jenga.boot.subclass_table import SUBCLASSES

_HEAD = """# Moving to the next SGLang

This page is generated from the table in `sglang_jenga/boot/hook_table.py` (`make docs`). It lists
every name of SGLang and of torch that this package patches, binds anew, registers with or extends.
A row is checked before it is used: the name exists, and its parameter list is the one written here.
Afterwards the patch is seen to be on. Whatever differs stops `--memory-backend jenga` with one line
that names the target, what was expected and what was found.

## How to move

1. Install the new SGLang in an environment of its own. Change `SGLANG` and `RANGE` in
   `.ci/setup.sh`, the range in `pyproject.toml`, and `CHECKED_SGLANG` and `SGLANG_RANGE` in
   `sglang_jenga/plugin.py`.
2. `make test ARGS="tests/boot/test_hook_table.py tests/unit/test_parents.py"`. The first says which
   row no longer fits, the second which attribute a parent's constructor sets that ours lacks.
3. For each row that fails, read the target in the new SGLang, then the function of ours. Change the
   row's parameter list only after the function.
4. For each row that still fits, read *look at*: what a parameter list does not show.
5. `make test ARGS="tests/boot/test_settings.py"`. It lists every server argument and environment
   variable that SGLang's memory code newly reads; each has to be honoured, refused or warned about.
6. `make test`. The parity tests compare tokens with the new stock SGLang.
7. `make docs`, and read the difference. It also writes `sglang_jenga/plan/catalogue.json`: the
   models that SGLang and its Transformers have code for, the defaults of their config classes.
   `tests/boot/test_catalogue.py` compares it with what is installed.

`around` gets the original function first, `after` its result. `replace` stands in its place.
"""

_SUBCLASSES = """
## Classes of SGLang that ours extend

Ours depends on more of these than their signatures. Where the parent's constructor is skipped,
`tests/unit/test_parents.py` builds the stock object and compares the attributes.

| class of SGLang | ours | parent's constructor | why |
|---|---|---|---|
"""

_REST = """
## What needs no name of SGLang

* `sglang_jenga.cpu.sgl_kernel` answers `import common_ops`, the last resort of `sgl_kernel`'s
  loader, and defines the CPU operators of `torch.ops.sgl_kernel` that no library has defined. It
  does so on the CPU engine only. A library that brings one of them wins.
* The record of server arguments carries three attributes of ours: `_memory_backend`,
  `_memory_backend_cli`, `_jenga_refusal`. SGLang pickles the record to every process.
"""


def page() -> str:
    """The whole page."""
    moments = "".join(f"\n## Applied {moment.when}\n{_rows(moment)}" for moment in TABLE)
    subclasses = "".join(
        f"| `{row.target}` | `{row.ours}` | {'runs' if row.constructs else 'skipped'} "
        f"| {row.why} |\n"
        for row in SUBCLASSES
    )
    return _HEAD + moments + _SUBCLASSES + subclasses + _REST


def _rows(moment: Moment) -> str:
    return "\n" + "".join(line for row in moment.rows for line in _lines(row))


def _lines(row: Hook | Rebinding | Call) -> Iterator[str]:
    yield f"* `{row.target}`, {_kind(row)}\n"
    yield f"  * expects: {_expected(row)}\n"
    yield f"  * why: {row.why}\n"
    if row.look:
        yield f"  * look at: {row.look}\n"


def _kind(row: Hook | Rebinding | Call) -> str:
    if isinstance(row, Call):
        return f"called by `{row.function}`"
    if isinstance(row, Hook):
        return f"{row.kind}: `{row.function}`"
    value = f"`{row.value}`"
    only = f", only if `{row.where}`" if row.where else ""
    return f"bound anew, {row.kind}: {value}{only}"


def _expected(row: Hook | Rebinding | Call) -> str:
    if not isinstance(row, Rebinding):
        return f"`{row.expected_signature}`"
    if row.expected == UNBOUND:
        return "a name that the module's code uses, bound or not"
    return f"`{row.expected}`" if row.expected.startswith("(") else f"a {row.expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", default="docs/upgrading-sglang.md", type=Path)
    parser.parse_args().path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

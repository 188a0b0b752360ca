"""Which folder may import which. The table is the rule; imports inside functions count too."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The links of the checkout: these folders lie at the top and import under the package's name.
MAPPED = ("radix", "kernels")


class Layer(NamedTuple):
    """Its modules may import each other, the standard library, and what the two sets name."""

    third_party: frozenset[str]
    layers: frozenset[str]


def layer(third_party: str = "", layers: str = "") -> Layer:
    return Layer(frozenset(third_party.split()), frozenset(layers.split()))


# A folder is a layer. A row of its own for a module wins over its folder's.
LAYERS = {
    # Arithmetic: what the command line needs, on machines with neither torch nor SGLang.
    "plan": layer(layers="layers"),
    "__main__": layer(layers="plan"),
    # One file per layer type: its rule. Of the trees it knows what they ask of a policy.
    "layers": layer(layers="radix.policy"),
    "radix.policy": layer(),
    # Bookkeeping of pages: ids and numbers, never bytes or requests.
    "pages": layer("numpy numba", "plan layers"),
    # What is reusable: token keys and opaque ids.
    "radix": layer("numpy", "radix.policy"),
    # Bytes and views of them.
    "memory": layer("torch sglang", "plan layers memory.ops"),
    "memory.ops": layer("torch sglang", "kernels"),
    "memory.byte_strings": layer("torch numpy", "memory"),
    "kernels": layer("torch triton numpy"),
    # What SGLang's scheduler talks to.
    "serving": layer(
        "torch sglang numpy prometheus_client",
        "plan layers pages radix radix.policy memory memory.byte_strings",
    ),
    # How the flag gets into SGLang; runs in processes that hold no pool, so without torch.
    "boot": layer("sglang psutil transformers", "plan layers"),
    # Run by `make docs`, and by nobody who serves.
    "boot.write_catalogue": layer("sglang transformers", "plan"),
    # And what is built under the flag, in the processes that do.
    "boot.geometry": layer("torch sglang", "boot plan layers memory"),
    "boot.boot_check": layer("sglang", "boot boot.geometry plan serving"),
    "boot.built_layers": layer("sglang", "boot boot.geometry plan layers memory"),
    "boot.rank_agreement": layer("sglang", "boot plan serving"),
    "boot.construction": layer(
        "torch sglang",
        "boot boot.built_layers boot.geometry boot.rank_agreement plan pages memory serving",
    ),
    "boot.image_cache": layer("sglang", "boot pages memory memory.byte_strings serving"),
    "boot.own_models": layer("sglang transformers", "boot models"),
    # Model code that SGLang lacks: SGLang's layers, our kernels, nothing of the flag.
    "models": layer("torch sglang transformers", "kernels"),
    # The machine without a GPU. `import torch` itself imports the first.
    "cpu.sgl_kernel": layer("torch", "cpu"),
    "cpu": layer("torch sglang"),
    "testing": layer(
        "torch transformers tokenizers safetensors PIL sglang requests numpy sgl_kernel flashinfer "
        "triton",
        "boot boot.construction cpu cpu.sgl_kernel layers plan memory kernels radix.policy",
    ),
    "plugin": layer(
        "sglang packaging",
        "layers boot boot.boot_check boot.construction boot.own_models cpu cpu.sgl_kernel",
    ),
    "testing.server_reading": layer(
        "sglang", "boot boot.boot_check boot.geometry boot.own_models plan plugin"
    ),
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its name inside sglang_jenga: `plan.spec`, `radix.tree`."""
    roots = [(ROOT / "sglang_jenga", "")] + [(ROOT / name, f"{name}.") for name in MAPPED]
    found = {}
    for root, prefix in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if path.stem != "__init__" and (prefix or parts[0] not in MAPPED):
                found[prefix + ".".join(parts)] = path
    return found


def layer_of(module: str) -> str:
    return module if module in LAYERS else module.partition(".")[0]


def imported_names(tree: ast.AST) -> set[str]:
    """Absolute names of all imports, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(module: str, source: str, known: set[str]) -> list[str]:
    own = layer_of(module)
    row = LAYERS[own]
    found = []
    for name in sorted(imported_names(ast.parse(source))):
        top, _, rest = name.partition(".")
        if top != "sglang_jenga":
            if top not in sys.stdlib_module_names | row.third_party:
                found.append(f"{module} ({own}) imports {name}")
            continue
        # The longest prefix that is a module: names after it are its functions.
        parts = rest.split(".")
        prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        target = next((prefix for prefix in prefixes if prefix in known), None)
        if target is not None and layer_of(target) not in row.layers | {own}:
            found.append(f"{module} ({own}) imports {target} ({layer_of(target)})")
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_imports_only_what_its_layer_may(module: str):
    known = modules()

    assert violations(module, known[module].read_text(), set(known)) == []


@pytest.mark.parametrize("init", sorted((ROOT / "sglang_jenga").glob("**/__init__.py")), ids=str)
def test_a_package_itself_imports_nothing(init: Path):
    """It runs before every module inside, in every SGLang process."""
    assert imported_names(ast.parse(init.read_text())) == set()


def test_table_has_a_row_for_each_folder_and_names_what_exists():
    known = set(modules())

    assert {layer_of(module) for module in known} == set(LAYERS)
    assert {name for row in LAYERS.values() for name in row.layers} <= set(LAYERS)


def test_only_construction_reaches_serving_and_nobody_reaches_back():
    """The rows as arrows have no circle."""
    seen: set[str] = set()
    rest = dict(LAYERS)
    while rest:
        low = {name for name, row in rest.items() if row.layers <= seen}
        assert low, f"a circle among {sorted(rest)}"
        seen |= low
        rest = {name: row for name, row in rest.items() if name not in low}


@pytest.mark.parametrize(
    ("folder", "may"),
    [
        ("benchmarks", {"benchmarks"}),
        ("tests", {"tests"}),
        ("tests/benches", {"tests", "benchmarks"}),
    ],
)
def test_tests_and_benchmarks_keep_apart(folder: str, may: set[str]):
    """Only the tests of the benchmarks import them; benchmarks need no tests."""
    for path in (ROOT / folder).rglob("*.py"):
        if folder == "tests" and "benches" in path.parts:
            continue
        tops = {name.partition(".")[0] for name in imported_names(ast.parse(path.read_text()))}
        assert tops & {"tests", "benchmarks"} <= may, path


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan.planner", "def f():\n    import torch"),
        ("radix.tree", "from sglang_jenga.pages.large_pages import LargePages"),
        ("radix.tree", "from sglang_jenga.plan import spec"),
        ("boot.flags", "from sglang_jenga.boot.construction import init_pools"),
        ("serving.scheduling", "from sglang_jenga.boot.hooks import Hook"),
        ("cpu.sgl_kernel", "from sglang.srt.utils import is_cpu"),
    ],
)
def test_the_check_sees(module: str, source: str):
    assert len(violations(module, source, set(modules()))) == 1

"""Who may import what. The table is the rule; imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "sglang_jenga": "sglang_jenga",
    "radix": "sglang_jenga.radix",
    "kernels": "sglang_jenga.kernels",
}


class Layer(NamedTuple):
    """`modules` may import each other, the standard library, and what the two sets name."""

    modules: frozenset[str]
    third_party: frozenset[str]
    layers: frozenset[str] = frozenset()


def layer(modules: str, third_party: str = "", layers: str = "") -> Layer:
    return Layer(*(frozenset(names.split()) for names in (modules, third_party, layers)))


LAYERS = {
    # Arithmetic: what the command line needs, on machines with neither torch nor SGLang.
    "plan": layer("spec planner stock hf_config planner_report cli request_need"),
    # Bookkeeping of pages: ids and numbers, never bytes or requests.
    "pages": layer("extent page_books large_pages allocator", "numpy numba", "plan"),
    # What is reusable: token keys and opaque ids.
    "radix": layer("radix.*", "numpy"),
    "kernels": layer("kernels.*", "torch triton numpy"),
    # How the flag gets into SGLang; runs in processes that hold no pool, so without torch.
    "flag": layer(
        "hooks flags validate flag_rules environment_rules model_rules state_strategy refusal "
        "request_rules window_models",
        "sglang psutil",
    ),
    # The machine without a GPU, and the models for it. `import torch` itself imports cpu_ops.
    "cpu": layer("cpu_ops", "torch", "operators"),
    "operators": layer(
        "state_ops cpu_repairs packed elementwise conv_ops gdn_ops mamba_ops gated_ops track_ops",
        "torch sglang",
    ),
    "tiny": layer(
        "tiny_models tiny_families tiny_jet", "torch transformers tokenizers safetensors"
    ),
}
# The rest puts it all together: pool, token_allocator, tree_cache, runtime, plugin, ...
SERVING = layer("", "numpy torch triton sglang prometheus_client", " ".join(LAYERS))


def modules() -> dict[str, Path]:
    """Every module by its name inside sglang_jenga: `spec`, `radix.tree`."""
    found = {}
    for folder, package in FOLDERS.items():
        prefix = package.removeprefix("sglang_jenga").lstrip(".")
        for path in (ROOT / folder).glob("*.py"):
            found[f"{prefix}.{path.stem}".lstrip(".")] = path
    return found


def layer_of(module: str) -> str:
    folder = module.partition(".")[0] + ".*" if "." in module else module
    return next((name for name, row in LAYERS.items() if folder in row.modules), "serving")


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
    row = LAYERS.get(own, SERVING)
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


def test_the_package_itself_imports_nothing():
    """It runs before every submodule, in every SGLang process."""
    assert imported_names(ast.parse((ROOT / "sglang_jenga" / "__init__.py").read_text())) == set()


def test_table_names_modules_that_exist():
    known = set(modules())
    named = {name for row in LAYERS.values() for name in row.modules if not name.endswith(".*")}

    assert named <= known


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("planner", "def f():\n    import torch"),
        ("radix.tree", "from sglang_jenga.large_pages import LargePages"),
        ("radix.tree", "from sglang_jenga import spec"),
        ("flags", "from sglang_jenga.runtime import HOOKS"),
        ("cpu_ops", "from sglang.srt.utils import is_cpu"),
    ],
)
def test_the_check_sees(module: str, source: str):
    assert len(violations(module, source, set(modules()))) == 1

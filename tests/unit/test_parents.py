"""Our subclasses that skip their parent's constructor have every attribute that it would set.

SGLang's methods read them on our objects. What a new SGLang adds to a constructor shows up here.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_jenga.boot.hooks import Subclass
from sglang_jenga.boot.subclass_table import SUBCLASSES
from sglang_jenga.layers.full import Full
from sglang_jenga.layers.state import State
from sglang_jenga.layers.window import Window
from sglang_jenga.memory.buffer import HeadShape, PoolBuffer
from sglang_jenga.memory.kv import JengaSWAPool
from sglang_jenga.memory.state import JengaStatePool, StateShape
from sglang_jenga.plan.planner import plan_pool
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.testing.context import Settings, configured
from tests.faces.pools import Shape, build_pools

ROOT = Path(__file__).resolve().parents[2]
HEADS = HeadShape(num_heads=1, k_dim=8, v_dim=8)

_BY_SLOT = "read only by methods that free by slot or look for one; here requests own pages"
_RING = "a window ring per request, of a model that is not served"
# What ours does without, and why no code that runs under the flag can miss it.
ABSENT = {
    "SWATokenToKVPoolAllocator": {
        "full_attn_allocator": _BY_SLOT,
        "swa_attn_allocator": _BY_SLOT,
        "swa_free_group": _BY_SLOT,
        "swa_page_ids_group": _BY_SLOT,
        "_size_full": "behind `size_full`, which is ours",
        "_size_swa": "behind `size_swa`, which is ours",
        "_req_to_token_pool": _RING,
        "_swa_ring_cost": _RING,
    },
}


@pytest.fixture(scope="module", autouse=True)
def sglang_is_configured() -> Iterator[None]:
    with configured():
        yield


def kv_buffer() -> PoolBuffer:
    groups = [
        LayerGroup(Full(), (0,), HEADS.entry_bytes(1, 4)),
        LayerGroup(Window(8), (1,), HEADS.entry_bytes(1, 4)),
    ]
    return PoolBuffer(plan_pool(groups, 1 << 20), "cpu", enable_memory_saver=False)


def window_pools() -> tuple[Any, Any]:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    stock = SWAKVPool(
        size=16,
        size_swa=16,
        page_size=1,
        dtype=torch.float32,
        head_num=1,
        head_dim=8,
        swa_attention_layer_ids=[1],
        full_attention_layer_ids=[0],
        device="cpu",
        enable_alt_stream=False,
    )
    return stock, JengaSWAPool(kv_buffer(), (HEADS, HEADS), torch.float32, enable_alt_stream=False)


def state_params() -> Any:
    from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape

    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=16,
        n_groups=1,
        num_heads=2,
        head_dim=8,
        state_size=4,
        conv_kernel=4,
    )
    return Mamba2CacheParams(shape=shape, layers=[0, 2])


def state_pools() -> tuple[Any, Any]:
    from sglang.srt.mem_cache.memory_pool import MambaPool

    params = state_params()
    stock = MambaPool(
        size=4, spec_state_size=4, cache_params=params, mamba_layer_ids=[0, 2], device="cpu"
    )
    shape = StateShape.of(params, (0, 2))
    groups = [
        LayerGroup(Full(), (1,), HEADS.entry_bytes(1, 4)),
        LayerGroup(State(), (0, 2), shape.entry_bytes, element=shape.element),
    ]
    buffer = PoolBuffer(plan_pool(groups, 1 << 20), "cpu", enable_memory_saver=False)
    return stock, JengaStatePool(buffer, 1, shape)


def token_allocators(**kinds: int) -> tuple[Any, Any]:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator

    parent = BaseTokenToKVPoolAllocator.__init__
    stock = type("Stock", (), {})()
    parent(stock, 16, 1, torch.float32, "cpu", None, False)
    return stock, build_pools(Shape(**kinds), Settings()).allocator


def window_allocators() -> tuple[Any, Any]:
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    stock = SWATokenToKVPoolAllocator(
        16, 16, 1, torch.float32, "cpu", window_pools()[0], need_sort=False
    )
    return stock, build_pools(Shape(window_k=2), Settings()).allocator


PAIRS = {
    "SWAKVPool": [window_pools],
    "MambaPool": [state_pools],
    "BaseTokenToKVPoolAllocator": [token_allocators, lambda: token_allocators(state_k=2)],
    "SWATokenToKVPoolAllocator": [window_allocators],
}
CASES = [(parent, build) for parent, builds in PAIRS.items() for build in builds]


def answered_by_a_class(obj: Any, ours: bool) -> set[str]:
    """Names that need not be set: a property, perhaps a cached one, answers them."""
    classes = [
        cls for cls in type(obj).__mro__ if cls.__module__.startswith("sglang_jenga") or not ours
    ]
    return set().union(*(vars(cls) for cls in classes))


@pytest.mark.parametrize(("parent", "build"), CASES)
def test_ours_has_what_the_parents_constructor_sets(parent: str, build: Any):
    stock, ours = build()
    expected = set(vars(stock)) - answered_by_a_class(stock, ours=False)

    found = set(vars(ours)) | answered_by_a_class(ours, ours=True)

    assert expected - found == set(ABSENT.get(parent, {}))


def subclasses_in(module: str, source: str) -> Iterator[Subclass]:
    """Classes of a module that extend one of SGLang's, ``why`` left empty."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.")
        for alias in node.names
    }
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in imported:
                own = [item for item in node.body if getattr(item, "name", "") == "__init__"]
                calls = "super().__init__(" in "".join(map(ast.unparse, own))
                yield Subclass(imported[base.id], f"{module}:{node.name}", "", not own or calls)


def test_the_table_names_every_subclass_of_a_class_of_sglang():
    found = set()
    for path in (ROOT / "sglang_jenga").rglob("*.py"):
        if "testing" not in path.parts:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found |= set(subclasses_in(module, path.read_text()))

    assert found == {row._replace(why="") for row in SUBCLASSES}


def test_every_parent_whose_constructor_is_skipped_is_compared():
    """Abstract parents without a constructor, or with an empty one, have nothing to compare."""
    skipped = {row.target for row in SUBCLASSES if not row.constructs}
    classes = [pkgutil.resolve_name(target) for target in skipped]

    constructs = [
        cls for cls in classes if "__init__" in vars(cls) and cls.__init__.__code__.co_names
    ]
    assert {cls.__name__ for cls in constructs} == set(PAIRS)

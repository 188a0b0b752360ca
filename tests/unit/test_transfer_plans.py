"""Servers that send each other pages come to one layout, though their pools differ in size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_jenga.boot import geometry
from sglang_jenga.memory.layout import layout_name
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.planner import plan_pool

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STATES = ("falcon-h1-7b", "nemotron-h-8b", "qwen3-next-80b-a3b")
GIB = 1 << 30


def layouts(model: str, page_size: int, sizes: range) -> set[str]:
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    groups = read_geometry(config, page_size=page_size).groups
    return {layout_name(plan_pool(groups, geometry._planned_bytes(size)), 1) for size in sizes}


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("model", STATES)
def test_of_a_model_with_states_pages_lie_alike_in_large_pools(monkeypatch, model: str, mode: str):
    monkeypatch.setattr(geometry, "get_disagg", lambda: SimpleNamespace(disaggregation_mode=mode))

    assert len(layouts(model, 16, range(20 * GIB, 72 * GIB, 4 * GIB + (4 << 20)))) == 1


def test_a_server_by_itself_is_planned_by_its_own_bytes(monkeypatch):
    """Then paddings follow the pool, for the best cut."""
    monkeypatch.setattr(geometry, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null"))

    assert len(layouts("falcon-h1-7b", 16, range(40 * GIB, 42 * GIB, 256 << 20))) > 1

"""Rows of the table of models that say what a server cannot carry: plan and server say so alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_jenga.layers import registry
from sglang_jenga.plan import layer_lists, layer_rules
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.model_row import ModelRow
from sglang_jenga.testing.launcher import write_model
from tests.boot.lines import SERVE

ARCHITECTURE = "Gemma3ForCausalLM"
BUILT_IN = ("full", "window", "chunked", "state", "cross")
PLACES = "and a list is of full, window, state, cross: the type of a window is what `sliding` says"
# A row as code, since two processes have to make it.
ROWS = {
    "ModelRow(layers=lambda read: [('full',), ('block_window',)] * 2)": (
        f"its row in the table of models lists layers of ['block_window'], {PLACES}"
    ),
    "ModelRow(layers=lambda read: [('latent',)] * 4)": (
        f"its row in the table of models lists layers of ['latent'], {PLACES}"
    ),
    "ModelRow(layers=layer_lists.by_layer_types(), sliding='no_such_type')": (
        "unknown layer type 'no_such_type', known are full, window, chunked, state, cross"
    ),
    "ModelRow(layers=layer_lists.by_layer_types(), sliding='state')": (
        "a window cannot be of the layer type 'state', only of window, chunked"
    ),
}
SET = """
from sglang_jenga.plan import layer_lists, layer_rules
from sglang_jenga.plan.model_row import ModelRow
layer_rules.kept = layer_rules.MODELS[{name!r}]
layer_rules.MODELS[{name!r}] = {row}
answer = {{}}
"""
RESTORE = """
from sglang_jenga.plan import layer_rules
layer_rules.MODELS[{name!r}] = layer_rules.kept
answer = {{}}
"""


@pytest.fixture
def model(tmp_path) -> str:
    types = ["sliding_attention", "full_attention"] * 2
    return write_model(tmp_path, ARCHITECTURE, "gemma3_text", sliding_window=32, layer_types=types)


@pytest.mark.parametrize(("row", "why"), ROWS.items(), ids=range(len(ROWS)))
def test_a_row_that_no_server_can_carry_is_refused_by_plan_and_server(
    launcher, monkeypatch, model, row, why
):
    config = json.loads(Path(model, "config.json").read_text())
    built_in = {name: kind for name, kind in registry._KINDS.items() if name in BUILT_IN}
    monkeypatch.setattr(registry, "_KINDS", built_in)
    made = eval(row, {"ModelRow": ModelRow, "layer_lists": layer_lists})
    monkeypatch.setitem(layer_rules.MODELS, ARCHITECTURE, made)
    planned = read_geometry(config)

    launcher.run(SET.format(name=ARCHITECTURE, row=row))
    try:
        outcome = launcher.command_line("--model-path", model, "--memory-backend", "jenga")
    finally:
        launcher.run(RESTORE.format(name=ARCHITECTURE))

    assert outcome[:2] == ("SystemExit", f"{SERVE}{ARCHITECTURE}: {why}; drop --memory-backend")
    assert f"sglang-jenga: {planned.refused}" == outcome.text
    assert planned.groups == ()

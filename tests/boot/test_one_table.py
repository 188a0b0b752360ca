"""The planner and the server read a config alike: a tiny one for every row of the table."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from sglang_jenga.plan import layer_rules
from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.plan.model_row import ModelRow
from sglang_jenga.testing.launcher import write_model
from sglang_jenga.testing.server_reading import group_fields
from tests.boot.model_entries import ARGUMENTS, ENTRIES

WITHOUT_A_ROW = {
    "LlamaForCausalLM": ("llama", {}),
    "Qwen2ForCausalLM": ("qwen2", {"sliding_window": 32, "use_sliding_window": True}),
    "MistralForCausalLM": ("mistral", {"sliding_window": 32}),
    "InternVLChatModel": (
        "internvl_chat",
        {
            "llm_config": {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "vocab_size": 256,
                "torch_dtype": "bfloat16",
            },
            "vision_config": {"architectures": ["InternVisionModel"]},
        },
    ),
    "ChatGLMModel": (
        "chatglm",
        {
            "num_layers": 4,
            "kv_channels": 16,
            "multi_query_attention": True,
            "multi_query_group_num": 1,
            "num_key_value_heads": None,
            "head_dim": None,
        },
    ),
    "Qwen2_5OmniModel": (
        "qwen2_5_omni",
        {
            "thinker_config": {
                "text_config": {
                    "hidden_size": 64,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 1,
                },
                "torch_dtype": "bfloat16",
            }
        },
    ),
}


def as_server(launcher, path: str, arguments: dict) -> dict:
    return launcher.run(
        "from sglang_jenga.testing.server_reading import read_as_server\n"
        f"answer = read_as_server({path!r}, **{arguments!r})"
    )


def test_every_row_has_an_entry():
    assert ENTRIES.keys() == layer_rules.MODELS.keys()


@pytest.mark.parametrize("architecture", [*ENTRIES, *WITHOUT_A_ROW])
def test_plan_and_server_agree_on_groups_bytes_and_verdict(launcher, tmp_path, architecture):
    model_type, fields = (ENTRIES | WITHOUT_A_ROW)[architecture]
    path = write_model(tmp_path, architecture, model_type, **fields)

    server = as_server(launcher, path, ARGUMENTS.get(architecture, {}))
    plan = read_geometry(json.loads((tmp_path / "config.json").read_text()))

    assert [plan.refused] == (server["refused"] or [""])
    if not plan.refused:
        assert [group_fields(group) for group in plan.groups] == server["groups"]
        assert (plan.stock.window is not None) == server["stock_stores_windows"]


@pytest.mark.parametrize(
    ("architecture", "tp", "why"),
    [
        ("LlamaForCausalLM", 3, "3 ranks cannot share its 4 query heads"),
        ("MiMoV2FlashForCausalLM", 4, None),
        ("Mamba2ForCausalLM", 16, "16 ranks cannot share its 8 state heads"),
    ],
)
def test_plan_and_server_refuse_the_same_numbers_of_ranks(
    launcher, tmp_path, architecture, tp, why
):
    model_type, fields = (ENTRIES | WITHOUT_A_ROW)[architecture]
    path = write_model(tmp_path, architecture, model_type, **fields)

    server = as_server(launcher, path, {"tp": tp})
    plan = read_geometry(json.loads((tmp_path / "config.json").read_text()), tp=tp)

    assert [plan.refused] == (server["refused"] or [""])
    assert plan.refused == (f"--tp {tp} does not fit {architecture}: {why}" if why else "")


def test_states_are_tracked_where_sglang_tracks_them():
    names = _names_in("arg_groups/overrides.py", "_MAMBA_EXTRA_BUFFER_ARCHS")
    known = {name for name, row in layer_rules.MODELS.items() if row.state and not row.refused}

    assert {name for name in known if layer_rules.MODELS[name].tracks} == known & names


def _names_in(path: str, variable: str) -> set[str]:
    """The names of a set in SGLang's source, which importing it would cost a process."""
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    for node in ast.walk(ast.parse((root / "srt" / path).read_text())):
        if isinstance(node, ast.Assign) and node.targets[0].id == variable:
            return set(ast.literal_eval(node.value.args[0]))
    raise AssertionError(f"no {variable} in {path}")


def test_a_row_is_added_once(monkeypatch):
    monkeypatch.setattr(layer_rules, "MODELS", dict(layer_rules.MODELS))
    row = ModelRow(note="mine")

    layer_rules.register_model("MyForCausalLM", row)

    assert layer_rules.row_of(["MyForCausalLM"]) is row
    with pytest.raises(ValueError, match="has a row for MyForCausalLM already"):
        layer_rules.register_model("MyForCausalLM", row)

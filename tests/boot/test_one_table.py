"""The planner and the server read a config alike: a tiny one for every row of the table."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from sglang_jenga.boot import own_models
from sglang_jenga.plan import layer_rules
from sglang_jenga.plan.hf_config import ConfigLayers, read_geometry
from sglang_jenga.plan.model_row import ModelRow
from sglang_jenga.plan.state_sizes import SLOT_BYTES
from sglang_jenga.testing.launcher import write_model
from sglang_jenga.testing.server_reading import group_fields
from tests.boot.model_entries import ARGUMENTS, ENTRIES, TWO_ROPES, Entry

WITHOUT_A_ROW = {
    "LlamaForCausalLM": ("llama", {}),
    "Qwen2ForCausalLM": ("qwen2", {"sliding_window": 32, "use_sliding_window": True}),
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

TEXT_OF_WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention"] * 4}
WINDOWS_ALONE = {
    "BeamForCausalLM": ("beam", TEXT_OF_WINDOWS),  # which stock has a pool for
    "Gemma3ForCausalLM": ("gemma3_text", {**TEXT_OF_WINDOWS, "rope_parameters": TWO_ROPES}),
    "MinistralForCausalLM": ("ministral", TEXT_OF_WINDOWS),
}


def as_server(launcher, path: str, arguments: dict) -> dict:
    return launcher.run(
        "from sglang_jenga.testing.server_reading import read_as_server\n"
        f"answer = read_as_server({path!r}, **{arguments!r})"
    )


def test_every_row_has_an_entry():
    assert ENTRIES.keys() == layer_rules.MODELS.keys()


def agreed(launcher, folder: Path, architecture: str, entry: Entry, **arguments) -> ConfigLayers:
    """What a plan says of a config, once the server has said the same."""
    model_type, fields = entry
    path = write_model(folder, architecture, model_type, **fields)

    server = as_server(launcher, path, arguments)
    truly = arguments.get("true_windows", False)
    plan = read_geometry(json.loads((folder / "config.json").read_text()), true_windows=truly)

    assert [plan.refused] == (server["refused"] or [""])
    if not plan.refused:
        assert [group_fields(group) for group in plan.groups] == server["groups"]
        assert (plan.stock.window is not None) == server["stock_stores_windows"]
    return plan


@pytest.mark.parametrize("architecture", [*ENTRIES, *WITHOUT_A_ROW])
def test_plan_and_server_agree_on_groups_bytes_and_verdict(launcher, tmp_path, architecture):
    entry = (ENTRIES | WITHOUT_A_ROW)[architecture]
    agreed(launcher, tmp_path, architecture, entry, **ARGUMENTS.get(architecture, {}))


@pytest.mark.parametrize("architecture", WINDOWS_ALONE)
def test_of_windows_alone_both_have_a_full_group_without_layers(launcher, tmp_path, architecture):
    plan = agreed(launcher, tmp_path, architecture, WINDOWS_ALONE[architecture])

    assert [group.layer_ids for group in plan.groups] == [(), (0, 1, 2, 3)]
    assert plan.groups[0].entry_bytes == SLOT_BYTES


ONLY_FOR = "it is for MinistralForCausalLM and MistralForCausalLM alone"


@pytest.mark.parametrize(
    ("architecture", "entry", "groups"),
    [
        ("MistralForCausalLM", ENTRIES["MistralForCausalLM"], [("full", 0), ("window(32)", 4)]),
        # What a config leaves out is Transformers' default.
        ("MistralForCausalLM", ("mistral", {}), [("full", 0), ("window(4096)", 4)]),
        ("MinistralForCausalLM", ENTRIES["MinistralForCausalLM"], [("full", 1), ("window(32)", 3)]),
        ("MinistralForCausalLM", WINDOWS_ALONE["MinistralForCausalLM"], None),
        ("MistralForCausalLM", ("mistral", {"sliding_window": None}), "its config gives no layer"),
        ("LlamaForCausalLM", ("llama", {}), ONLY_FOR),
        ("Gemma3ForCausalLM", ENTRIES["Gemma3ForCausalLM"], ONLY_FOR),
    ],
)
def test_plan_and_server_agree_on_true_windows(launcher, tmp_path, architecture, entry, groups):
    plan = agreed(launcher, tmp_path, architecture, entry, true_windows=True)

    if isinstance(groups, str):
        assert plan.refused.startswith(
            f"--jenga-true-windows does not fit {architecture}: {groups}"
        )
        assert plan.refused.endswith("; drop --jenga-true-windows")
    elif groups is not None:
        assert [(group.label, len(group.layer_ids)) for group in plan.groups] == groups


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


def test_a_server_on_gpus_refuses_such_a_number_before_sglang_asserts_it(launcher, tmp_path):
    path = write_model(tmp_path, "LlamaForCausalLM", "llama")

    answer = launcher.run(
        f"""
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.runtime_context import override_platform

def end_of(tp):
    record = Engine.server_args_class(
        model_path={path!r}, device="cpu", tp_size=tp, memory_backend="jenga"
    )
    try:
        with override_platform(is_cuda=True):
            record.resolve_once()
    except Exception as error:
        return str(error)

answer = {{"2": end_of(2), "3": end_of(3)}}
"""
    )

    assert (
        answer["3"]
        == "--tp 3 does not fit LlamaForCausalLM: 3 ranks cannot share its 4 query heads"
    )
    assert answer["2"] is None or "ranks cannot share" not in answer["2"]


def test_states_are_tracked_where_sglang_tracks_them():
    tree = _source("arg_groups/overrides.py")
    names = next(
        set(ast.literal_eval(node.value.args[0]))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and node.targets[0].id == "_MAMBA_EXTRA_BUFFER_ARCHS"
    )
    known = {name for name, row in layer_rules.MODELS.items() if row.state and not row.refused}

    names.add(own_models.ARCHITECTURE)  # our model code tracks them
    assert {name for name in known if layer_rules.MODELS[name].tracks} == known & names


# Draft models, which are refused with their flag.
DRAFTS = ("MTP", "NextN", "Eagle", "DSpark")
# Named where SGLang sorts models out, and full attention all the same.
FULL = {
    "MistralModel",
    "MixtralForCausalLM",
    "MistralForCausalLM",
    "BaichuanForCausalLM",
    "GlmImageForConditionalGeneration",
}
SORTED_OUT = {
    "is_hybrid_swa_model",
    "get_hybrid_layer_ids",
    "_derive_model_shapes",
    "is_encoder_decoder_model",
    "is_deepseek_dsa",
    "is_deepseek_v4",
    "is_qwen4_exp",
    "is_minimax_sparse",
}
LISTS = {"SWA_SINK_ARCHS", "MIMO_V2_MODEL_ARCHS", "PURE_MAMBA1_ARCHITECTURES"}


def test_every_model_that_sglang_stores_its_own_way_has_a_row():
    tree = _source("configs/model_config.py")
    constants = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in LISTS
    ]
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in SORTED_OUT
    ]
    assert {function.name for function in functions} == SORTED_OUT
    assert len(constants) == len(LISTS)
    named = {
        node.value
        for part in (*functions, *constants)
        for node in ast.walk(part)
        if isinstance(node, ast.Constant)
        and re.fullmatch(r"[A-Z]\w*(For[A-Z]\w+|Model)", str(node.value))
    }
    targets = {name for name in named if not any(word in name for word in DRAFTS)}

    assert targets - layer_rules.MODELS.keys() - FULL == set()


def _source(path: str) -> ast.Module:
    """A module of SGLang's, which importing it would cost a process."""
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    return ast.parse((root / "srt" / path).read_text())


def test_a_row_is_added_once(monkeypatch):
    monkeypatch.setattr(layer_rules, "MODELS", dict(layer_rules.MODELS))
    row = ModelRow(note="mine")

    layer_rules.register_model("MyForCausalLM", row)

    assert layer_rules.row_of(["MyForCausalLM"]) is row
    with pytest.raises(ValueError, match="has a row for MyForCausalLM already"):
        layer_rules.register_model("MyForCausalLM", row)

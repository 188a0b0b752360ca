"""Small configs cut from public models whose meaning is easy to miss, and configs that are broken.

Requests that fit at 1,024, 8,192 and 32,768 tokens in 40 GiB are those of the groups that a server
builds; stock's are SGLang's own arithmetic.
"""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_jenga.plan.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
HARD = CONFIGS / "hard"
JUNK = [
    None, True, 0, -1, 7, 10**30, 0.5, float("nan"), "", "4", "fp8", [], [None], [0], ["x"], [[]],
    [{"a": 1}], {}, {"a": {}}, {"attention": 3},
]  # fmt: skip

# file: what it is about, groups, requests here, requests of stock
SERVED = {
    "gemma3n_stored_full": ("70 KiB a token", {"full": 35}, (585, 73, 18), (585, 73, 18)),
    "exaone_moe_stored_full": ("windows stored full", {"full": 48}, (213, 26, 6), (213, 26, 6)),
    "afmoe_stored_full": ("windows stored full", {"full": 56}, (731, 91, 22), (731, 91, 22)),
    "modelopt_fp8_kv": (
        "the checkpoint asks for FP8 KV",
        {"full": 10, "window(1024)": 50},
        (93, 56, 24),
        (91, 14, 3),
    ),
    "hf_quant_fp8_kv": ("a file beside it asks for FP8", {"full": 80}, (255, 31, 7), (255, 31, 7)),
    "qwen35_tracking_states": (
        "states are tracked inside prompts",
        {"full": 16, "state": 48},
        (113, 50, 17),
        (26, 26, 10),
    ),
    "gemma4_e4b_shared_layers": (
        "layers that share KV have rows too",
        {"full": 7, "window(512)": 35},
        (650, 158, 43),
        (487, 60, 15),
    ),
    "step35_attention_groups": (
        "KV heads are called attention groups",
        {"full": 12, "window(513)": 33},
        (358, 90, 25),
        (266, 33, 8),
    ),
    "chatglm_query_groups": (
        "KV heads are called query groups",
        {"full": 40},
        (1023, 127, 31),
        (1023, 127, 31),
    ),
    "llama4_is_hybrid": (
        "chunks are windows to stock",
        {"full": 12, "window(8193)": 36},
        (213, 26, 15),
        (200, 25, 7),
    ),
    "mimo_v2_stock": (
        "stock has a pool for windows",
        {"full": 8, "window(129)": 40},
        (906, 221, 61),
        (227, 28, 7),
    ),
    "falcon_mamba_served": (
        "states alone",
        {"full": 0, "state": 64},
        (1165, 1151, 1104),
        (184, 184, 184),
    ),
    "jet_nemotron_served": (
        "three kinds of layer",
        {"full": 1, "window(1153)": 1, "state": 2},
        (10949, 3769, 1174),
        (3716, 1347, 336),
    ),
    "internvl_llm_config": ("a section called llm_config", {"full": 36}, (1137, 142, 35), None),
    "mllama_90b_served": (
        "an image of 6404 tokens beside the text",
        {"full": 80, "cross": 20},
        (49, 13, 3),
        (14, 7, 2),
    ),
    "phi4_tp4": ("one rank", {"full": 40}, (204, 25, 6), (204, 25, 6)),
}
REFUSED = {
    "deepseek_v4_refused": ((), "it caches more per token than K and V"),
    "phi4_tp4": (("--tp", "4"), "4 ranks cannot share its 10 KV heads"),
}
BROKEN = {
    "falcon_h1_no_d_ssm": "24 heads of mamba_d_head=64 do not make up the 1024 channels",
    "head_dim_nan": "head_dim must be a whole number above 0, got nan",
    "trace_architectures_null_inside": "architectures must be a list of texts, got [None]",
    "trace_kv_heads_list": "num_key_value_heads must be a whole number above 0, got [4, 4, 4, 4]",
    "trace_layer_types_objects": "layer_types must be a list of texts, got [{'type': 'full'}",
    "trace_layers_string": "num_hidden_layers must be a whole number from 1 to 1,000, got '4'",
}


def path_of(name):
    path = HARD / name
    return str(path if path.is_dir() else path.with_suffix(".json"))


def test_every_hard_config_is_in_a_table():
    assert {path.stem for path in HARD.iterdir()} == {*SERVED, *REFUSED, *BROKEN}


@pytest.mark.parametrize("name", SERVED)
def test_a_plan_says_what_a_server_holds(name, capsys):
    _, groups, here, stock = SERVED[name]

    assert main(["plan", path_of(name), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)

    assert {group["label"]: len(group["layer_ids"]) for group in plan["groups"]} == groups
    assert tuple(row["requests"] for row in plan["capacity"]) == here
    assert tuple(row["stock"] for row in plan["capacity"]) == (stock or here)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_server_refuses_has_no_capacity(name, capsys):
    flags, why = REFUSED[name]

    assert main(["plan", path_of(name), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert len(lines) == 2
    assert lines[1].startswith("served: no, --") and why in lines[1]


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line_and_exit_2(name, capsys):
    assert main(["plan", path_of(name)]) == 2
    out, err = capsys.readouterr()

    assert out == ""
    assert err.count("\n") == 1 and BROKEN[name] in err


def sections(config):
    """The config and every object inside it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from sections(value)


def configs():
    return sorted([*CONFIGS.glob("*.json"), *HARD.glob("*.json")])


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=400)
def test_no_field_of_a_wrong_type_is_a_trace(tmp_path_factory, data):
    config = json.loads(data.draw(st.sampled_from(configs())).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        section = data.draw(st.sampled_from([part for part in sections(config) if part]))
        junk = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
        section[data.draw(st.sampled_from(sorted(section)))] = junk
    path = tmp_path_factory.getbasetemp() / "junk.json"
    path.write_text(json.dumps(config))

    assert main(["plan", str(path)]) in (0, 2)

"""Configs that leave to a config class, or to SGLang, what others say: read by both alike.

They are cut from public models and from what their config classes take (short_configs.json).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_jenga.plan.hf_config import read_geometry
from sglang_jenga.testing.server_reading import group_fields

CONFIGS = json.loads(Path(__file__).with_name("short_configs.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_plan_and_server_read_a_short_config_alike(launcher, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))

    server = launcher.run(
        "from sglang_jenga.testing.server_reading import read_as_server\n"
        f"answer = read_as_server({str(tmp_path)!r})"
    )
    plan = read_geometry(CONFIGS[name])

    assert [plan.refused] == (server["refused"] or [""])
    if not plan.refused:
        assert [group_fields(group) for group in plan.groups] == server["groups"]
        assert plan.context_tokens == server["context"]


NO_CODE = ("bamba", "zamba2", "rwkv", "t5", "bart", "falcon7b")


@pytest.mark.parametrize("name", NO_CODE)
def test_a_server_refuses_what_sglang_has_no_code_for_before_it_starts(launcher, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))

    outcome = launcher.command_line("--model-path", str(tmp_path), "--memory-backend", "jenga")

    assert outcome.end == "SystemExit"
    assert outcome.text == (
        "sglang-jenga: --memory-backend jenga does not serve "
        f"{CONFIGS[name]['architectures'][0]}: SGLang 0.5.23 has no code for it; "
        "drop --memory-backend"
    )


EMPTY = {
    "no window layer": ("gptoss_allfull", {}, None),
    "no chunk": ("llama4_null_chunk", {}, None),
    "windows without a width": ("gptoss_null", {}, "no width of theirs (sliding_window)"),
    "too short a list": ("gemma3_lt_odd", {}, "layer_types names 1 layers of 6"),
    "no state layer": ("qwen35_35b", {"full_attention_interval": 1}, "no layer to them"),
}


@pytest.mark.parametrize("case", EMPTY)
def test_layers_that_a_config_does_not_have_are_no_trace(launcher, tmp_path, case):
    name, change, why = EMPTY[case]
    config = json.loads(json.dumps(CONFIGS[name]))
    config.get("text_config", config).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--memory-backend", "jenga", "--max-total-tokens", "500"]
    if name.startswith("llama4"):
        flags += ["--attention-backend", "triton"]

    if case == "too short a list":  # of a file Transformers asks for as many as there are layers
        flags += ["--json-model-override-args", '{"layer_types": ["full_attention"]}']

    outcome = launcher.command_line("--model-path", str(tmp_path), *flags)

    if why is None:
        assert outcome.end == "resolved", outcome
        assert not outcome.fields["hybrid"]
    else:
        assert outcome.end == "SystemExit" and outcome.text.count("\n") == 0, outcome
        assert outcome.text.startswith("sglang-jenga: --memory-backend jenga does not serve ")
        assert why in outcome.text and outcome.text.endswith("; drop --memory-backend")

"""What is there without the flag: Jamba, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_jenga.boot.hook_table import (
    CPU_RESOLUTION,
    CPU_SCHEDULER,
    ENGINE,
    FLAG,
    MODEL_CLASSES,
)
from sglang_jenga.testing.launcher import environment, write_model

FIELDS = {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 4}


@pytest.fixture
def jamba(tmp_path) -> str:
    return write_model(tmp_path, "JambaForCausalLM", "jamba", **FIELDS)


def test_without_the_flag_jamba_is_a_model_with_states(launcher, jamba):
    answer = launcher.run(
        f"""
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.runtime_context import create_context, use_context
from sglang.srt.server_args import ServerArgs

record = ServerArgs(model_path={jamba!r}, device="cpu", disable_overlap_schedule=True)
record.resolve_once()
config = mambaish_config(model_config_of(record))
with use_context(create_context(record, role="scheduler")):
    states = config.mamba2_cache_params
answer = {{
    "full": config.full_attention_layer_ids,
    "states": states.layers,
    "bytes": states.mamba_cache_per_req,
    "strategy": resolving_view(record).mamba_radix_cache_strategy,
    "tree": resolving_view(record).radix_cache_backend,
}}
"""
    )

    assert answer == {
        "full": [2],
        "states": [0, 1, 3],
        "bytes": 3 * (128 * 3 * 2 + 128 * 16 * 4),
        "strategy": "no_buffer",
        "tree": None,
    }


@pytest.mark.parametrize("flag", ["default", "jenga"])
def test_with_overlap_its_states_are_tracked(launcher, jamba, flag):
    outcome = launcher.engine(model_path=jamba, memory_backend=flag, page_size=16)

    assert outcome.end == "resolved", outcome.text
    assert outcome.fields["backend"] == flag


def test_nothing_is_registered_where_another_package_brings_jamba(launcher):
    answer = launcher.run(
        """
from sglang.srt.configs import linear_attn_model_registry as registry
from sglang_jenga.boot import own_models

specs, known = registry._LINEAR_ATTN_MODEL_REGISTRY, own_models._ours
theirs = registry.LinearAttnModelSpec(dict, "theirs", ["JambaForCausalLM"])
kept, specs[:] = list(specs), [theirs]
try:
    own_models._ours = None
    own_models.register_config()
    answer = {"ours": own_models._ours, "theirs alone": specs == [theirs]}
finally:
    specs[:], own_models._ours = kept, known
"""
    )

    assert answer == {"ours": False, "theirs alone": True}


def test_a_sglang_with_a_jamba_of_its_own_keeps_it(launcher):
    answer = launcher.run(
        """
import importlib.util
from sglang.srt.configs import linear_attn_model_registry as registry
from sglang_jenga.boot import own_models

specs, known = registry._LINEAR_ATTN_MODEL_REGISTRY, own_models._ours
find, kept = importlib.util.find_spec, list(specs)
specs[:] = []
try:
    own_models._ours = None
    importlib.util.find_spec = lambda name: name == "sglang.srt.models.jamba" or find(name)
    own_models.register_config()
    answer = {"ours": own_models._ours, "specs": len(specs)}
finally:
    importlib.util.find_spec = find
    specs[:], own_models._ours = kept, known
"""
    )

    assert answer == {"ours": False, "specs": 0}


def test_a_lookup_that_sglang_has_changed_leaves_jamba_out_and_says_so(launcher):
    answer = launcher.run(
        """
import logging
from sglang_jenga.boot import hook_table, hooks, own_models

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
own_models._logger.addHandler(handler)
(row,) = rows = hook_table.MODEL_CLASSES
known = own_models._ours, own_models._looks_up
try:
    hook_table.MODEL_CLASSES = (row._replace(expected_signature="(something_else)"),)
    own_models._ours, own_models._looks_up = False, False
    own_models.await_lookup()
    of_another_package = list(said)
    own_models._ours = True
    own_models.await_lookup()
    answer = {"unasked": of_another_package, "said": said, "hooked": own_models._looks_up}
finally:
    hook_table.MODEL_CLASSES = rows
    own_models._ours, own_models._looks_up = known
    own_models._logger.removeHandler(handler)
"""
    )

    assert answer["unasked"] == []
    assert not answer["hooked"]
    (line,) = answer["said"]
    assert line.startswith("JambaForCausalLM is not available: ")
    assert "get_model_architecture" in line and "(something_else)" in line


SNAPSHOT = """
import json, sys
from sglang.srt.server_args import ServerArgs
from sglang.srt.plugins import load_plugins

load_plugins()
for path in sys.argv[1:]:
    record = ServerArgs(model_path=path, device="cpu", page_size=1, disable_overlap_schedule=True)
    record.resolve_once()

from sglang.srt.arg_groups import model_override_base
from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.configs.linear_attn_model_registry import _LINEAR_ATTN_MODEL_REGISTRY
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache import registry as trees
from sglang.srt.model_loader.utils import get_model_architecture
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import publish
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

publish(record, role="scheduler")
from sglang.srt.models.registry import ModelRegistry

try:
    get_model_architecture(model_config_of(record))
except Exception:
    pass  # without the plugin SGLang has no class for a Jamba

def size(module):
    return {
        name: sorted(map(str, value)) if isinstance(value, dict) else len(value)
        for name, value in vars(module).items()
        if isinstance(value, dict | list | set) and not name.startswith("__")
    }

print(json.dumps({
    "models": sorted(ModelRegistry.get_supported_archs()),
    "configs": sorted(CONFIG_MAPPING._extra_content),
    "states": [spec.arch_names for spec in _LINEAR_ATTN_MODEL_REGISTRY],
    "attention": sorted(ATTENTION_BACKENDS),
    "trees": size(trees),
    "overrides": size(model_override_base),
    "hooks": sorted(HookRegistry._patched),
}))
"""


def snapshot(*models: str, plugins: str) -> dict:
    """SGLang's registries in a scheduler without the flag that has looked up a model's class."""
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT, *models],
        env=environment(SGLANG_PLUGINS=plugins),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_without_the_flag_sglang_differs_by_jamba_alone(tmp_path: Path, jamba: str):
    llama = write_model(tmp_path / "llama", "LlamaForCausalLM", "llama")
    stock = snapshot(llama, plugins="none")
    ours = snapshot(llama, jamba, plugins="jenga")
    of_another_model = snapshot(llama, plugins="jenga")

    added = {
        name: [item for item in ours[name] if item not in stock[name]]
        for name in ("models", "configs", "states", "attention", "hooks")
    }
    # SGLang's Mamba-1 cannot be imported on a CPU without the operators of the CPU engine.
    inert = {row.target for row in (*FLAG, *ENGINE, *CPU_RESOLUTION, *CPU_SCHEDULER)}
    assert set(added.pop("hooks")) - inert == {row.target for row in MODEL_CLASSES}
    assert added == {
        "models": ["FalconMambaForCausalLM", "JambaForCausalLM", "MambaForCausalLM"],
        "configs": ["jamba"],
        "states": [["JambaForCausalLM"]],
        "attention": [],
    }
    for name in ("trees", "overrides"):
        assert ours[name] == stock[name]
    assert stock["hooks"] == []
    assert "JambaForCausalLM" not in of_another_model["models"]

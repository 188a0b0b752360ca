"""--memory-backend: every way to give it, and that SGLang is itself without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sglang_jenga.testing.launcher import environment, write_model

# Exaone-4 insists on a GPU's backend, the others do not mind one.
ON = ("--memory-backend", "jenga", "--attention-backend", "triton")
FULL = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 32}
WINDOW_FAMILIES = {
    # Gemma-2 counts layers and never looks at layer_types, so neither may we.
    "gemma2": (
        "Gemma2ForCausalLM",
        {"sliding_window": 32, "layer_types": ["full_attention"] * 4},
        [0, 2],
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**GEMMA3, "rope_parameters": GEMMA3_ROPE},
        [0, 1, 2],
    ),
    "olmo3": ("Olmo3ForCausalLM", SLIDING, [0, 2]),
    "exaone4": (
        "Exaone4ForCausalLM",
        {**GEMMA3, "sliding_window_pattern": "LLLG"},
        [0, 1, 2],
    ),
    "cohere2": ("Cohere2ForCausalLM", {**SLIDING, **FULL}, [0, 2]),
}


@pytest.fixture(params=WINDOW_FAMILIES)
def family(request, tmp_path):
    architecture, config, window_layers = WINDOW_FAMILIES[request.param]
    return write_model(tmp_path, architecture, request.param, **config), window_layers


def assert_on(outcome):
    assert outcome.end == "resolved", outcome.text
    assert outcome.fields["backend"] == outcome.fields["shown"] == "jenga"
    assert outcome.fields["radix_cache_backend"] == "jenga"


def assert_off(outcome):
    assert outcome.end == "resolved", outcome.text
    assert outcome.fields["backend"] == "default"
    assert outcome.fields["shown"] is None
    assert outcome.fields["radix_cache_backend"] is None


def test_without_the_flag_nothing_is_declared_or_shown(launcher, llama):
    assert_off(launcher.command_line("--model-path", llama))


def test_flag_travels_with_the_pickled_record(launcher, llama):
    assert_on(launcher.command_line("--model-path", llama, "--memory-backend", "jenga"))


def test_yaml_config_takes_the_flag(launcher, llama, tmp_path):
    config = tmp_path / "server.yaml"
    config.write_text(f"model-path: {llama}\nmemory-backend: jenga\n")

    assert_on(launcher.command_line("--config", str(config)))


def test_environment_turns_it_on(launcher, llama):
    assert_on(launcher.command_line("--model-path", llama, SGLANG_MEMORY_BACKEND="jenga"))


def test_flag_wins_over_the_environment(launcher, llama):
    argv = ("--model-path", llama, "--memory-backend", "default")

    assert_off(launcher.command_line(*argv, SGLANG_MEMORY_BACKEND="jenga"))


def test_engine_takes_it_as_an_argument(launcher, llama):
    assert_on(launcher.engine(model_path=llama, memory_backend="jenga"))


def test_engine_argument_wins_over_the_environment(launcher, llama):
    env = {"SGLANG_MEMORY_BACKEND": "jenga"}

    assert_off(launcher.engine(env, model_path=llama, memory_backend="default"))


def test_engine_with_a_finished_record_listens_to_the_environment(launcher, llama):
    assert_on(launcher.record({"SGLANG_MEMORY_BACKEND": "jenga"}, model_path=llama))


def test_record_built_after_a_jenga_one_is_plain_again(launcher, family):
    """One process may build several Engines, and SGLang's model questions name no record."""
    path, _ = family
    model = {"model_path": path, "attention_backend": "triton"}
    assert launcher.engine(memory_backend="jenga", **model).fields["hybrid"]

    plain = launcher.engine(**model)

    assert_off(plain)
    assert not plain.fields["hybrid"]


def test_window_families_become_hybrid_by_the_rule_of_their_model_code(launcher, family):
    path, window_layers = family

    fields = launcher.command_line("--model-path", path, *ON).fields

    assert fields["hybrid"]
    assert fields["window_layers"] == window_layers
    assert sorted(fields["window_layers"] + fields["full_layers"]) == [0, 1, 2, 3]


def test_user_may_still_disable_hybrid_memory(launcher, family):
    path, _ = family

    outcome = launcher.command_line("--model-path", path, "--disable-hybrid-swa-memory", *ON)

    assert_on(outcome)
    assert not outcome.fields["hybrid"]


def test_both_parts_of_gemma3_with_images_are_read_from_its_text_config(launcher, tmp_path):
    text = {"model_type": "gemma3_text", "num_hidden_layers": 4, **GEMMA3}
    path = write_model(
        tmp_path,
        "Gemma3ForConditionalGeneration",
        "gemma3",
        text_config={**text, "rope_parameters": GEMMA3_ROPE},
        vision_config={"model_type": "siglip_vision_model"},
    )

    outcome = launcher.command_line("--model-path", path, "--memory-backend", "jenga")

    assert outcome.fields["window_layers"] == [0, 1, 2], outcome.text


def test_model_without_window_layers_stays_plain(launcher, tmp_path):
    path = write_model(tmp_path, "Olmo2ForCausalLM", "olmo2")

    outcome = launcher.command_line("--model-path", path, "--memory-backend", "jenga")

    assert_on(outcome)
    assert not outcome.fields["hybrid"]


WINDOW_NUMBERS = """
from types import SimpleNamespace
from sglang.srt.model_executor.model_runner_components import load_model_utils
from sglang.srt.models import commandr, exaone4, gemma2, gemma3_causal, olmo2

hf = SimpleNamespace(sliding_window=32)
config = SimpleNamespace(is_hybrid_swa=True, sliding_window_size=32, attention_chunk_size=None)

def numbers(module, architecture):
    kind = getattr(module, architecture + "ForCausalLM")
    model = kind.__new__(kind)
    object.__setattr__(model, "config", hf)
    of_layers = getattr(module, "get_attention_sliding_window_size", lambda hf: hf.sliding_window)
    return [load_model_utils.resolve_sliding_window_size(model, config), of_layers(hf)]

answer = {
    "Gemma2": numbers(gemma2, "Gemma2"),
    "Gemma3": numbers(gemma3_causal, "Gemma3"),
    "Olmo2": numbers(olmo2, "Olmo2"),
    "Exaone4": numbers(exaone4, "Exaone4"),
    "Cohere2": numbers(commandr, "Cohere2"),
}
"""


def test_window_number_of_the_pool_is_the_one_of_the_attention_layers(launcher):
    """Pages must live as long as a layer looks back; Cohere-2 counts one token more."""
    assert launcher.run(WINDOW_NUMBERS) == {
        "Gemma2": [31, 31],
        "Gemma3": [31, 31],
        "Olmo2": [31, 31],
        "Exaone4": [31, 31],
        "Cohere2": [32, 32],
    }


@pytest.mark.slow
def test_help_of_launch_server_shows_the_flag():
    done = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "--memory-backend {default,jenga}" in done.stdout


WITH_WINDOW = {"sliding_window": 32}
TRULY = "--jenga-true-windows"


@pytest.fixture
def mistral(tmp_path):
    return write_model(tmp_path, "MistralForCausalLM", "mistral", **WITH_WINDOW)


def test_true_windows_turn_every_layer_of_mistral_into_a_window(launcher, mistral):
    outcome = launcher.command_line("--model-path", mistral, *ON, TRULY)

    assert_on(outcome)
    assert outcome.fields["window_layers"] == [0, 1, 2, 3]
    assert outcome.fields["full_layers"] == []
    assert launcher.warnings("--model-path", mistral, *ON, TRULY) == []


def test_engine_takes_true_windows_as_an_argument_and_the_next_one_is_plain_again(
    launcher, mistral
):
    model = {"model_path": mistral, "memory_backend": "jenga", "attention_backend": "triton"}

    assert launcher.engine(**model, jenga_true_windows=True).fields["hybrid"]
    assert not launcher.engine(**model).fields["hybrid"]


def test_true_windows_alone_change_nothing_and_are_told(launcher, mistral):
    argv = ("--model-path", mistral, "--attention-backend", "triton", TRULY)
    outcome = launcher.command_line(*argv)

    assert_off(outcome)
    assert not outcome.fields["hybrid"]
    assert launcher.warnings(*argv) == [f"{TRULY} does nothing without --memory-backend jenga"]


def test_true_windows_are_refused_where_they_would_be_stored_in_full(launcher, mistral):
    outcome = launcher.command_line(
        "--model-path", mistral, *ON, TRULY, "--disable-hybrid-swa-memory"
    )

    assert outcome[:2] == (
        "SystemExit",
        f"sglang-jenga: {TRULY} does not work with --disable-hybrid-swa-memory: the windows would "
        f"be kept to and stored in full; drop --disable-hybrid-swa-memory or {TRULY}",
    )


def test_true_windows_are_refused_where_they_mean_nothing(launcher, llama):
    outcome = launcher.command_line("--model-path", llama, *ON, TRULY)

    assert outcome[:2] == (
        "SystemExit",
        f"sglang-jenga: {TRULY} does not fit LlamaForCausalLM: "
        f"it is for MinistralForCausalLM and MistralForCausalLM alone; drop {TRULY}",
    )

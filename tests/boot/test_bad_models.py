"""Models that --memory-backend jenga does not serve, or not in every way: one line."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest

from sglang_jenga.boot import model_rules
from sglang_jenga.testing.launcher import write_model
from tests.boot.lines import SERVE, WITH
from tests.boot.model_entries import ENTRIES, JET

MLLAMA = "MllamaForConditionalGeneration"
MLA = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
BAD_MODELS = [
    ("DeepseekV2ForCausalLM", "deepseek_v2", MLA, "MLA layers are not carried yet"),
    (
        "DeepseekV32ForCausalLM",
        "deepseek_v3",
        {**MLA, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 2},
        "it caches more per token than K and V",
    ),
    (
        "WhisperForConditionalGeneration",
        "whisper",
        {"d_model": 64, "decoder_attention_heads": 4, "encoder_attention_heads": 4},
        "cross-attention is not carried yet",
    ),
    (
        "JetNemotronForCausalLM",
        "jet_nemotron",
        JET | {"layer_types": ["jet", "swa", "swa", "jet"]},
        "all its attention layers are window layers, and beside states that is not carried yet",
    ),
    (
        "UnlimitedOCRForCausalLM",
        "llama",
        {"sliding_window_size": 32},
        "its windows begin behind the prompt, all of which its code goes on reading",
    ),
]


@pytest.mark.parametrize(("architecture", "model_type", "config", "why"), BAD_MODELS)
def test_model_is_refused_in_one_line(launcher, tmp_path, architecture, model_type, config, why):
    path = write_model(tmp_path, architecture, model_type, **config)

    outcome = launcher.command_line("--model-path", path, "--memory-backend", "jenga")

    assert outcome[:2] == ("SystemExit", f"{SERVE}{architecture}: {why}; drop --memory-backend")


ONE_TOKEN = "without tracking, a cached state is that of one very token"
NOT_TRACKED = "SGLang tracks no states inside prompts of Lfm2ForCausalLM"
TRACKED = "states are tracked every 256 tokens, and that must be whole pages"
QWEN = {"full_attention_interval": 2}
LAYERS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {"mamba_chunk_size": 96},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2, **QWEN},
}
BAD_STATE_FLAGS = [
    ("lfm2", "--mamba-radix-cache-strategy extra_buffer", (), NOT_TRACKED),
    ("lfm2", "--mamba-radix-cache-strategy extra_buffer_lazy", (), NOT_TRACKED),
    ("lfm2", "--page-size 16", (), ONE_TOKEN),
    ("falcon_h1", "--page-size 16", ("--mamba-radix-cache-strategy", "no_buffer"), ONE_TOKEN),
    ("qwen3_next", "--page-size 7", (), TRACKED),
    ("qwen3_next", "--page-size 48", (), TRACKED),
    ("qwen3_next", "--page-size 512", (), TRACKED),
    (
        "falcon_h1",
        "--page-size 64",
        (),
        "its state kernels take 96 tokens at once, and one must divide the other",
    ),
]


@pytest.mark.parametrize(("model_type", "flag", "beside", "why"), BAD_STATE_FLAGS)
def test_way_of_caching_states_is_refused_in_one_line(
    launcher, tmp_path, model_type, flag, beside, why
):
    architecture = {
        "lfm2": "Lfm2ForCausalLM",
        "falcon_h1": "FalconH1ForCausalLM",
        "qwen3_next": "Qwen3NextForCausalLM",
    }[model_type]
    path = write_model(tmp_path, architecture, model_type, **LAYERS[model_type])

    outcome = launcher.command_line(
        "--model-path", path, "--memory-backend", "jenga", *flag.split(), *beside
    )

    name = flag.split()[0]
    assert outcome[:2] == ("SystemExit", f"{WITH}{flag}: {why}; drop {name} or --memory-backend")


BAD_WITH_ENCODER = [
    ("--page-size 16", "SGLang looks for a row's last page without its encoder's tokens; drop "),
    (
        "--attention-backend triton",
        "its kernels have no cross attention; use one of torch_native, ",
    ),
]


@pytest.mark.parametrize(("flag", "why"), BAD_WITH_ENCODER)
def test_what_a_model_with_an_encoder_cannot_do_is_refused_in_one_line(
    launcher, tmp_path, flag, why
):
    architecture, (model_type, config) = MLLAMA, ENTRIES[MLLAMA]
    path = write_model(tmp_path, architecture, model_type, **config)

    outcome = launcher.command_line(
        "--model-path", path, "--memory-backend", "jenga", *flag.split()
    )

    assert outcome.end == "SystemExit"
    assert outcome.text.startswith(f"{WITH}{flag}: {why}")
    assert "\n" not in outcome.text


def test_kernels_of_blackwell_without_cross_attention_are_refused_there():
    """SGLang's default on such cards, which it refuses itself on others."""
    model = SimpleNamespace(is_encoder_decoder=True, is_hybrid_swa=False)
    with mock.patch.object(model_rules, "has_state", return_value=False):
        (line,) = model_rules.backend_lines("trtllm_mha", "trtllm_mha", model, blackwell=True)

    assert "--attention-backend trtllm_mha: its kernels have no cross attention" in line
    assert "torch_native, flashinfer, fa3, fa4" in line


def test_a_model_with_an_encoder_is_taken(launcher, tmp_path):
    model_type, config = ENTRIES[MLLAMA]
    path = write_model(tmp_path, MLLAMA, model_type, **config)

    outcome = launcher.command_line(
        "--model-path", path, "--memory-backend", "jenga", "--attention-backend", "torch_native"
    )

    assert outcome.end == "resolved", outcome.text

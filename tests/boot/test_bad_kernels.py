"""Kernels that would misread jenga's memory are refused by the flag that names them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_jenga.boot import flag_rules, model_rules
from sglang_jenga.testing.launcher import TINY, write_model
from sglang_jenga.testing.tiny_models import write_tiny_model
from tests.boot.lines import WITH

BACKENDS = "torch_native, triton, flashinfer, fa3, fa4, trtllm_mha"


@pytest.mark.parametrize(
    "flag", ["--attention-backend", "--prefill-attention-backend", "--decode-attention-backend"]
)
def test_attention_backend_must_be_known_to_read_strided_kv(launcher, llama, flag):
    argv = ("--model-path", llama, "--memory-backend", "jenga", flag, "flex_attention")

    outcome = launcher.command_line(*argv)

    assert outcome[:2] == (
        "SystemExit",
        f"{WITH}{flag} flex_attention: its kernels are not known to read strided KV; "
        f"use one of {BACKENDS} or drop --memory-backend",
    )


LLAMA4 = {
    "text_config": {
        **TINY,
        "model_type": "llama4_text",
        "attention_chunk_size": 32,
        "num_local_experts": 2,
        "intermediate_size_mlp": 128,
    },
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
}


@pytest.mark.parametrize(
    ("prefill", "decode", "refused"),
    [
        ("triton", "triton", "--attention-backend triton"),
        ("fa3", "triton", "--decode-attention-backend triton"),
        ("torch_native", "fa3", "--prefill-attention-backend torch_native"),
        ("fa3", "fa3", None),
        ("fa4", "fa3", None),
    ],
)
def test_chunked_attention_needs_backends_that_keep_to_the_chunks(
    launcher, tmp_path, prefill, decode, refused
):
    path = write_model(tmp_path, "Llama4ForConditionalGeneration", "llama4", **LLAMA4)
    argv = ("--prefill-attention-backend", prefill, "--decode-attention-backend", decode)

    outcome = launcher.command_line("--model-path", path, "--memory-backend", "jenga", *argv)

    if refused is None:
        assert outcome.end == "resolved", outcome.text
    else:
        assert outcome[:2] == (
            "SystemExit",
            f"{WITH}{refused}: its kernels read more than a chunked layer keeps; "
            "use one of fa3, fa4 or drop --memory-backend",
        )


APART = "its kernels take the states to lie side by side"


@pytest.fixture(scope="module")
def qwen3_next(tmp_path_factory):
    return str(write_tiny_model("qwen3_next", tmp_path_factory.mktemp("qwen3_next")))


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--mamba-backend flashinfer", APART),
        ("--linear-attn-backend cutedsl", APART),
        ("--linear-attn-backend flashinfer", APART),
        ("--linear-attn-decode-backend flashinfer", APART),
        ("--linear-attn-prefill-backend cutedsl", APART),
        ("--enable-mis", f"with recurrent states {APART}"),
    ],
)
def test_kernels_for_states_must_be_known_to_read_strided_ones(launcher, qwen3_next, flag, why):
    argv = ("--model-path", qwen3_next, "--memory-backend", "jenga", *flag.split())

    outcome = launcher.command_line(*argv)

    line = f"{WITH}{flag}: {why}; drop {flag.split()[0]} or --memory-backend"
    assert outcome[:2] == ("SystemExit", line)


@pytest.mark.parametrize(
    "flags",
    [
        "--linear-attn-prefill-backend flashinfer",
        "--linear-attn-prefill-backend flashkda",
        "--linear-attn-backend flashinfer --linear-attn-decode-backend triton",
        "--mamba-backend triton",
    ],
)
def test_kernels_that_read_strided_states_are_served(launcher, qwen3_next, flags):
    argv = ("--model-path", qwen3_next, "--memory-backend", "jenga", *flags.split())

    assert launcher.command_line(*argv).end == "resolved"


def test_flashinfer_decodes_on_strided_states_where_it_takes_them_in_place():
    config = SimpleNamespace(
        mamba_backend="triton",
        enable_mis=False,
        linear_attn_backend="triton",
        linear_attn_prefill_backend=None,
        linear_attn_decode_backend="flashinfer",
    )

    assert flag_rules.state_lines(config, blackwell=True) == []
    assert len(flag_rules.state_lines(config, blackwell=False)) == 1


def test_windows_beside_states_are_served_by_kernels_that_load_whole_blocks(launcher, tmp_path):
    path = str(write_tiny_model("jet_nemotron", tmp_path))
    argv = ("--model-path", path, "--memory-backend", "jenga", "--attention-backend")

    for backend in ("fa3", "fa4", "triton"):
        assert launcher.command_line(*argv, backend).end == "resolved"


COPIES = (
    "before Blackwell its prefills copy K and V in every layer where layers of several types share "
    "the pool"
)
TILES = "its kernels load more than the window, and states may lie there"


@pytest.mark.parametrize(
    ("windows", "states", "blackwell", "why"),
    [
        (False, False, False, None),  # K and V are halves of one buffer, as in stock
        (True, False, False, COPIES),
        (False, True, False, COPIES),
        (True, False, True, None),
        (False, True, True, None),
        (True, True, True, TILES),
    ],
)
def test_trtllm_serves_mixed_layers_on_blackwell(monkeypatch, windows, states, blackwell, why):
    model = SimpleNamespace(
        attention_chunk_size=None,
        is_encoder_decoder=False,
        is_hybrid_swa=windows,
        has_asymmetric_kv=False,
        hf_config=SimpleNamespace(architectures=["GptOssForCausalLM"]),
        hf_text_config=SimpleNamespace(),
    )
    monkeypatch.setattr(model_rules, "has_state", lambda model: states)

    lines = model_rules.backend_lines("trtllm_mha", "trtllm_mha", model, blackwell=blackwell)

    served = "torch_native, triton, flashinfer, fa3, fa4"
    line = "--memory-backend jenga does not work with --attention-backend trtllm_mha: "
    line += f"{why}; use one of {served} or drop "
    assert lines == ([line + "--memory-backend"] if why else [])

"""What --memory-backend jenga refuses: one line that says what, why and what to drop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_jenga.boot import flag_rules
from sglang_jenga.testing.launcher import TINY, environment, write_model
from sglang_jenga.testing.tiny_models import write_tiny_model

WITH = "sglang-jenga: --memory-backend jenga does not work with "
SERVE = "sglang-jenga: --memory-backend jenga does not serve "
HOST = "jenga pages have no host or remote copy"
SHARD = "one rank would hold only a part of a page's tokens"
SIDE = "its side tensor is sized by tokens, and jenga slot ids run over the whole pool"
SESSION = "a session keeps pages that no running request holds"
DTYPE = "entries with block scales are not laid out yet"
ORDER = "jenga evicts by its own balanced order"
BEHIND = "its kernels read the KV pool without the attention backend"
BYTES = "(with --max-total-tokens it gives the bytes of both)"

BAD_FLAGS = [
    ("--enable-unified-memory", "both would own the one buffer"),
    ("--enable-page-major-kv-layout", "jenga brings its own layout"),
    ("--radix-cache-backend other", "jenga brings its own radix trees"),
    ("--enable-hierarchical-cache", HOST),
    ("--hicache-storage-backend file", HOST),
    ("--enable-lmcache", HOST),
    ("--enable-flexkv", HOST),
    ("--enable-unified-cache-external-linker", HOST),
    ("--enable-hisparse", HOST),
    ("--disaggregation-mode prefill", "the transfer engines expect SGLang's own pools"),
    ("--disaggregation-mode decode", "the transfer engines expect SGLang's own pools"),
    ("--disaggregation-decode-retraction-backup host_pool", HOST),
    ("--disaggregation-decode-enable-offload-kvcache", HOST),
    ("--encoder-only", "an encoder has no KV cache, and loads no plugin"),
    ("--speculative-algorithm NGRAM", "the draft model's KV is not part of the pool yet"),
    ("--pp-size 2", "pipeline stages would plan different pools"),
    ("--dcp-size 2", SHARD),
    ("--attn-cp-size 2", SHARD),
    ("--enable-kv-cache-sharding", SHARD),
    ("--use-ray", "Ray workers load no plugin"),
    ("--enable-two-batch-overlap", "half batches do not see their requests' rows"),
    ("--enable-pdmux", "two streams would allocate at the same time"),
    ("--dllm-algorithm LowConfidence", "diffusion steps rewrite tokens that are already cached"),
    ("--enable-streaming-session", SESSION),
    ("--enable-session-radix-cache", SESSION),
    ("--kv-cache-dtype mxfp8", DTYPE),
    ("--kv-cache-dtype nvfp4", DTYPE),
    ("--kv-cache-dtype fp4_mx_block16", DTYPE),
    ("--prefill-only-disable-kv-cache", "there would be no KV cache to manage"),
    ("--enable-return-routed-experts", SIDE),
    ("--enable-return-indexer-topk", SIDE),
    ("--kv-canary log", SIDE),
    ("--enable-nvidia-megakernel", BEHIND),
    ("--enable-amd-monokernel", BEHIND),
    ("--enable-lean-attention", "its kernel is not known to read strided KV"),
    ("--enable-int8-mamba-checkpoint", "cached states stay in the format they run in"),
    ("--enable-linear-replayssm", "its ring buffers are not part of the pool"),
    ("--enable-linear-replayssm-spec", "its ring buffers are not part of the pool"),
    ("--mamba-full-memory-ratio 0.5", "jenga has no ratio of states to KV"),
    ("--max-mamba-cache-size 8", f"jenga has no separate pool of states to size {BYTES}"),
    ("--swa-full-tokens-ratio 0.5", f"jenga has no ratio of window to full KV {BYTES}"),
    ("--radix-eviction-policy tlru", ORDER),
    ("--radix-eviction-policy lfu", ORDER),
    ("--device xpu", "only CUDA and the CPU engine are known to work"),
]

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
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 32},
        "all its attention layers are window layers, and the pool needs a full one",
    ),
]
BACKENDS = "torch_native, triton, flashinfer, fa3, fa4, trtllm_mha"


def run_python(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *argv], env=environment(**env), capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("flag", "why"), BAD_FLAGS)
def test_combination_is_refused_in_one_line(launcher, llama, flag, why):
    argv = ("--model-path", llama, "--memory-backend", "jenga", *flag.split())

    outcome = launcher.command_line(*argv)

    name = flag.split()[0]
    line = f"{WITH}{flag}: {why}; drop {name} or --memory-backend"
    assert outcome[:2] == ("SystemExit", line)


def test_parameters_of_an_eviction_order_are_refused(launcher, llama):
    argv = ("--radix-eviction-policy-config", '{"protected_threshold": 4}')

    outcome = launcher.command_line("--model-path", llama, "--memory-backend", "jenga", *argv)

    line = f"{WITH}{argv[0]} {{'protected_threshold': 4}}: {ORDER}; drop {argv[0]} or"
    assert outcome[:2] == ("SystemExit", f"{line} --memory-backend")


@pytest.mark.parametrize(
    "flags", ["--max-mamba-cache-size 8", "--swa-full-tokens-ratio 0.5", "--speculative-algorithm"]
)
def test_flag_is_served_beside_the_one_that_gives_it_a_meaning(launcher, llama, flags):
    beside = ("--max-total-tokens", "500")
    if flags == "--speculative-algorithm":  # then it names a way to capture, and no draft
        flags, beside = f"{flags} EAGLE3", ("--enable-return-aux-hidden-states",)
    argv = ("--model-path", llama, "--memory-backend", "jenga")

    assert launcher.command_line(*argv, *flags.split()).end == "SystemExit"
    outcome = launcher.command_line(*argv, *flags.split(), *beside)

    assert outcome.end == "resolved", outcome.text


def test_two_reasons_are_two_lines(launcher, llama):
    flags = ("--pp-size", "2", "--enable-lmcache")

    outcome = launcher.command_line("--model-path", llama, "--memory-backend", "jenga", *flags)

    lines = outcome.text.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(WITH) for line in lines)


@pytest.mark.parametrize(("architecture", "model_type", "config", "why"), BAD_MODELS)
def test_model_is_refused_in_one_line(launcher, tmp_path, architecture, model_type, config, why):
    path = write_model(tmp_path, architecture, model_type, **config)

    outcome = launcher.command_line("--model-path", path, "--memory-backend", "jenga")

    assert outcome[:2] == ("SystemExit", f"{SERVE}{architecture}: {why}; drop --memory-backend")


ONE_TOKEN = "without tracking, a cached state is that of one very token"
NOT_TRACKED = "SGLang tracks no states inside prompts of Lfm2ForCausalLM"
BAD_STATE_FLAGS = [
    ("lfm2", "--mamba-radix-cache-strategy extra_buffer", (), NOT_TRACKED),
    ("lfm2", "--mamba-radix-cache-strategy extra_buffer_lazy", (), NOT_TRACKED),
    ("lfm2", "--page-size 16", (), ONE_TOKEN),
    ("falcon_h1", "--page-size 16", ("--mamba-radix-cache-strategy", "no_buffer"), ONE_TOKEN),
]


@pytest.mark.parametrize(("model_type", "flag", "beside", "why"), BAD_STATE_FLAGS)
def test_way_of_caching_states_is_refused_in_one_line(
    launcher, tmp_path, model_type, flag, beside, why
):
    architecture = {"lfm2": "Lfm2ForCausalLM", "falcon_h1": "FalconH1ForCausalLM"}[model_type]
    path = write_model(tmp_path, architecture, model_type)

    outcome = launcher.command_line(
        "--model-path", path, "--memory-backend", "jenga", *flag.split(), *beside
    )

    name = flag.split()[0]
    assert outcome[:2] == ("SystemExit", f"{WITH}{flag}: {why}; drop {name} or --memory-backend")


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
            f"{WITH}{refused}: its kernels read behind the chunks of local attention layers; "
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


@pytest.mark.parametrize("backend", ["fa3", "fa4"])
def test_windows_beside_states_need_kernels_that_keep_to_the_window(launcher, tmp_path, backend):
    path = str(write_tiny_model("jet_nemotron", tmp_path))
    argv = ("--model-path", path, "--memory-backend", "jenga", "--attention-backend")

    outcome = launcher.command_line(*argv, backend)

    assert outcome[:2] == (
        "SystemExit",
        f"{WITH}--attention-backend {backend}: its kernels load more than the window, and states "
        "may lie there; use one of torch_native, triton, flashinfer or drop --memory-backend",
    )
    assert launcher.command_line(*argv, "triton").end == "resolved"


def test_caller_of_an_engine_gets_a_value_error(launcher, llama):
    outcome = launcher.engine(model_path=llama, memory_backend="jenga", enable_lmcache=True)

    assert outcome.end == "Refused"  # a ValueError
    assert outcome.text.startswith("--memory-backend jenga does not work with --enable-lmcache")


def test_refused_combination_is_fine_without_the_flag(launcher, llama):
    outcome = launcher.command_line("--model-path", llama, "--enable-return-routed-experts")

    assert outcome.end == "resolved", outcome.text


@pytest.mark.parametrize(
    ("argv", "env", "source"),
    [
        (("--memory-backend", "jengo"), {}, "--memory-backend"),
        ((), {"SGLANG_MEMORY_BACKEND": "jengo"}, "SGLANG_MEMORY_BACKEND"),
    ],
)
def test_unknown_backend_is_one_line(launcher, llama, argv, env, source):
    outcome = launcher.command_line("--model-path", llama, *argv, **env)

    line = f"sglang-jenga: {source}: unknown memory backend 'jengo', expected default or jenga"
    assert outcome[:2] == ("SystemExit", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("-m", "sglang.launch_server", "--model-path"),
        ("-c", "from sglang.cli.main import main; main()", "serve"),
    ],
)
def test_real_launcher_stops_with_the_line_and_no_trace(llama, command):
    done = run_python(*command, llama, "--enable-lmcache", SGLANG_MEMORY_BACKEND="jenga")

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{WITH}--enable-lmcache: ")
    assert "Traceback" not in done.stderr


OTHER_VERSION = """
import runpy, sys, sglang.version
sglang.version.__version__ = "0.5.24"
sys.argv = ["launch_server", *sys.argv[1:]]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


@pytest.mark.slow
def test_other_sglang_version_stops_under_the_flag(llama):
    done = run_python("-c", OTHER_VERSION, "--model-path", llama, "--memory-backend", "jenga")

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "sglang-jenga: --memory-backend jenga cannot start: sglang-jenga 0.1.0 works with "
        "SGLang >=0.5.23,<0.5.24 only, and this is SGLang 0.5.24"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_other_sglang_version_only_warns_without_the_flag():
    done = run_python("-c", OTHER_VERSION, "--help")

    assert done.returncode == 0
    assert "works with SGLang >=0.5.23,<0.5.24 only" in done.stderr


CHILD = """
import base64, json, pickle, sys
server_args = pickle.loads(base64.b64decode(sys.stdin.read()))
import sglang.version
sglang.version.__version__ = json.loads(sys.argv[1]) or sglang.version.__version__
from sglang.srt.plugins import load_plugins
from sglang.srt import runtime_context
load_plugins()
print(server_args._jenga_refusal, flush=True)
runtime_context.publish(server_args, role="scheduler")
print("published")
from sglang.srt.mem_cache.registry import create_tree_cache
create_tree_cache(None)
"""


def run_child(launcher, llama, version: str | None = None, **env: str):
    """Receive a record as a scheduler process does."""
    record = launcher.engine(model_path=llama, memory_backend="jenga").fields["pickle"]
    return subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(version)],
        env=environment(**env),
        input=record,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_child_without_the_plugin_stops_at_the_unknown_radix_cache(launcher, llama):
    done = run_child(launcher, llama, SGLANG_PLUGINS="another")

    assert done.returncode == 1
    assert "--radix-cache-backend='jenga' is not registered" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_child_with_a_broken_plugin_stops_before_anything_is_built(launcher, llama):
    done = run_child(launcher, llama, version="0.5.24")

    assert done.returncode == 1
    (place,) = done.stdout.splitlines()  # not "published"
    assert Path(place).read_text().endswith("and this is SGLang 0.5.24")
    os.unlink(place)

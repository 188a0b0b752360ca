"""Flags that --memory-backend jenga refuses: one line that says what, why and what to drop."""

from __future__ import annotations

import pytest

from tests.boot.lines import WITH

HOST = "jenga pages have no host or remote copy"
SHARD = "one rank would hold only a part of a page's tokens"
SIDE = "its side tensor is sized by tokens, and jenga slot ids run over the whole pool"
SESSION = "a session keeps pages that no running request holds"
DTYPE = "entries with block scales are not laid out yet"
BACKUP = "a retracted request's KV waits in tensors on the host"
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
    ("--disaggregation-decode-retraction-backup host_pool", BACKUP),
    ("--disaggregation-decode-retraction-backup none", BACKUP),
    ("--disaggregation-decode-host-receive-threshold 0.5", HOST),
    ("--disaggregation-decode-enable-offload-kvcache", HOST),
    ("--encoder-only", "an encoder has no KV cache, and loads no plugin"),
    ("--speculative-algorithm NGRAM", "the draft model's KV is not part of the pool yet"),
    (
        "--pp-async-batch-depth 1",
        "the last stage would change the map of windows while a step reads it",
    ),
    ("--enable-dynamic-chunking", "it tries prompts out on the first stage alone"),
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
    ("--max-total-tokens -5", "it must be above 0"),
    ("--max-total-tokens 0", "it must be above 0"),
    ("--page-size 0", "it must be above 0"),
    ("--page-size -1", "it must be above 0"),
    ("--device xpu", "only CUDA and the CPU engine are known to work"),
]


ENGINES = "only Mooncake's part of SGLang is known to send whole small pages"
BAD_FOR_TRANSFERS = [
    ("--disaggregation-transfer-backend nixl", ENGINES),
    ("--disaggregation-transfer-backend mori", ENGINES),
    ("--disaggregation-transfer-backend fake", ENGINES),
    ("--enable-pd-role-switch", "a server keeps the side that it was started on"),
    ("--disaggregation-decode-enable-radix-cache", "jenga's decode servers keep no prefixes"),
    ("--disaggregation-enable-kv-checksum", "its checksums take the layers to lie apart"),
    (
        "--disaggregation-decode-allocation-policy prefill_complete",
        "pages are allocated before a prompt is computed",
    ),
]


@pytest.mark.parametrize(("flag", "why"), BAD_FOR_TRANSFERS)
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_what_two_servers_cannot_do_together_is_refused_in_one_line(
    launcher, llama, side, flag, why
):
    argv = ("--model-path", llama, "--memory-backend", "jenga", "--disaggregation-mode", side)

    outcome = launcher.command_line(*argv, *flag.split())

    name = flag.split()[0]
    line = f"{WITH}{flag}: {why}; drop {name} or --memory-backend"
    assert outcome[:2] == ("SystemExit", line)


def test_another_transfer_engine_is_no_matter_to_a_server_that_sends_nothing(launcher, llama):
    argv = ("--model-path", llama, "--memory-backend", "jenga")

    outcome = launcher.command_line(*argv, "--disaggregation-transfer-backend", "nixl")

    assert outcome.end == "resolved", outcome.text


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("engine", ["mooncake", "mooncake_tcp"])
def test_two_servers_are_served(launcher, llama, side, engine):
    argv = ("--model-path", llama, "--memory-backend", "jenga", "--disaggregation-mode", side)

    outcome = launcher.command_line(*argv, "--disaggregation-transfer-backend", engine)

    assert outcome.end == "resolved", outcome.text


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
    flags = ("--dcp-size", "2", "--enable-lmcache")

    outcome = launcher.command_line("--model-path", llama, "--memory-backend", "jenga", *flags)

    lines = outcome.text.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(WITH) for line in lines)


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

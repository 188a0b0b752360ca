"""What SGLang must be told to serve a tiny family on the CPU engine."""

from __future__ import annotations

from typing import Any

from sglang_jenga.testing.tiny_models import STATE_FAMILIES

# Gemma-4 must be asked for the AMX backend, which falls back to torch_native on this engine.
FAMILY_ARGUMENTS: dict[str, dict[str, Any]] = {"gemma4": {"attention_backend": "intel_amx"}}
# What stock needs to store every layer as full KV, because its CPU attention misreads windows.
FULL_KV: dict[str, dict[str, Any]] = {"gemma4": {"disable_hybrid_swa_memory": True}}
# Stock caches states in one way on a CPU. Its pool of states is cut at boot, ours from the same
# bytes: one state for this many tokens.
STOCK_STATES = {
    "mamba_radix_cache_strategy": "no_buffer",
    "disable_overlap_schedule": True,
    "max_mamba_cache_size": 400,
}
FULL_KV |= dict.fromkeys(STATE_FAMILIES, STOCK_STATES)
# SGLang keeps the convolutions' states in bfloat16 unless told otherwise, and then the answer
# depends on where a prompt is cut: in stock as well.
EXACT = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}

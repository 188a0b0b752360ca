"""Real models' layer mixes, and the small models that carry them through SGLang's server.

A geometry has the published config (``tests/configs/``: layer types, windows, heads, states) and
a config that SGLang serves with the same mix, in which one token's KV and one state take `scale`
times fewer bytes, in every layer group alike. Windows and lengths are the real ones. Parameter
counts are those of the model cards. The carrier is another family's code where SGLang's CPU engine
does not load the model's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.replay.clock import Weights
from benchmarks.replay.requests import VOCABULARY
from sglang_jenga.plan.hf_config import ConfigLayers, read_geometry
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.testing.tiny_mllama import write_processor

_CONFIGS = Path(__file__).resolve().parents[2] / "tests" / "configs"
CONTEXT_TOKENS = 1 << 18
HEAD_DIM = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Geometry:
    """`carrier` is the written config, `server` what its server must be told; `ratio` names the
    flag that sets stock's fixed split of the pool, if it has one. `gpus`: the fewest of 80 GB."""

    name: str
    published: dict[str, Any]
    weights: Weights
    stock: str
    carrier: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    ratio: str | None = None
    gpus: int = 1

    @property
    def has_states(self) -> bool:
        return self.real.groups[-1].kind.name == "state"

    @property
    def has_mixed_chunks(self) -> bool:
        """Whether jenga puts decode steps into its chunks: neither dense nor with an encoder."""
        return len(self.real.groups) > 1 and not self.real.encoder

    @cached_property
    def real(self) -> ConfigLayers:
        """Layer groups with the real model's bytes."""
        return read_geometry(self.published)

    @cached_property
    def replayed(self) -> tuple[LayerGroup, ...]:
        """The same groups with the carrier's bytes."""
        return read_geometry(self._written()).groups

    @cached_property
    def scale(self) -> int:
        """Real bytes / replayed bytes, of every group. Raises ValueError if groups disagree."""
        pairs = list(zip(self.real.groups, self.replayed, strict=True))
        scales = {real.entry_bytes / ours.entry_bytes for real, ours in pairs}
        if len(scales) != 1 or any(
            (real.kind.name, real.window, len(real.layer_ids))
            != (ours.kind.name, ours.window, len(ours.layer_ids))
            for real, ours in pairs
        ):
            raise ValueError(f"{self.name}: the carrier's layer groups are not the model's")
        scale = scales.pop()
        assert scale == int(scale)
        return int(scale)

    def _written(self) -> dict[str, Any]:
        return {**_COMMON, **self.carrier}

    def write_model(self, folder: str | Path) -> Path:
        """Write config.json (weights are made up at load) to `folder` and return it.

        With an encoder also what SGLang's tokenizer process loads to read images.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.real.encoder:
            write_processor(folder, self.carrier["vision_config"]["image_size"])
        (folder / "config.json").write_text(json.dumps(self._written(), indent=1))
        return folder


def _published(name: str) -> dict[str, Any]:
    return json.loads((_CONFIGS / f"{name}.json").read_text())


def layer_types(pattern: str) -> list[str]:
    names = {"w": "sliding_attention", "f": "full_attention"}
    return [names[char] for char in pattern]


def windows(layer_types: list[str], window: int) -> dict[str, Any]:
    return {
        "layer_types": layer_types,
        "num_hidden_layers": len(layer_types),
        "sliding_window": window,
    }


_FULL_STORAGE = "every layer stored for every token"
_STATE_RATIO = "mamba_full_memory_ratio"

_ALL = (
    Geometry(
        "gemma-2-9b",
        _published("gemma-2-9b"),
        Weights(18.48e9, 9.24e9, 16 * 256),
        _FULL_STORAGE,
        {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **_GEMMA,
            "query_pre_attn_scalar": HEAD_DIM,
            **windows(layer_types("wf" * 21), 4096),
        },
    ),
    Geometry(
        "gemma-3-27b",
        _published("gemma-3-27b"),
        Weights(54.0e9, 27.0e9, 32 * 128),
        _FULL_STORAGE,
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **_GEMMA,
            "query_pre_attn_scalar": HEAD_DIM,
            **windows(layer_types("wwwwwf" * 10 + "ww"), 1024),
        },
    ),
    # The card: 20.91 B parameters, 19.12 B of them experts in 4.25 bits, 3.61 B active; 32 experts,
    # 4 per token. On Gemma-4's code, hybrid in stock as gpt-oss is.
    Geometry(
        "gpt-oss-20b",
        _published("gpt-oss-20b"),
        Weights(3.58e9, 3.61e9, 64 * 64, 10.16e9, 32, 4),
        "a window pool of 0.8 tokens per token of the full one",
        {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            **_GEMMA,
            "global_head_dim": HEAD_DIM,
            "swa_head_dim": HEAD_DIM,
            "num_global_key_value_heads": 1,
            "swa_num_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            **windows(layer_types("wf" * 12), 128),
        },
        {"attention_backend": "intel_amx"},
        "swa_full_tokens_ratio",
    ),
    # On Gemma-3's code, which stock stores the same way. SGLang's layers see one token more of
    # Ministral's windows than the config says.
    Geometry(
        "ministral-8b",
        _published("ministral-8b"),
        Weights(16.04e9, 8.02e9, 32 * 128),
        _FULL_STORAGE,
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **_GEMMA,
            "query_pre_attn_scalar": HEAD_DIM,
            **windows(layer_types("fwww" * 9), 32769),
        },
    ),
    # FP8 weights, as published in Qwen3-Next-80B-A3B-Instruct-FP8; 512 experts, 10 per token.
    Geometry(
        "qwen3-next-80b",
        _published("qwen3-next-80b-a3b"),
        Weights(2.7e9, 3.0e9, 16 * 256, 77.3e9, 512, 10),
        "states cut at boot, 0.9 bytes per byte of KV",
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "num_hidden_layers": 48,
            "full_attention_interval": 4,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 110,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "rope_theta": 10000.0,
            "rope_parameters": _ROPE | {"partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
        },
        ratio=_STATE_RATIO,
        gpus=2,
    ),
    Geometry(
        "falcon-h1-7b",
        _published("falcon-h1-7b"),
        Weights(15.18e9, 7.59e9, 12 * 128),
        "states cut at boot, 0.9 bytes per byte of KV",
        {
            "architectures": ["FalconH1ForCausalLM"],
            "model_type": "falcon_h1",
            "num_hidden_layers": 44,
            "mamba_d_ssm": 440,
            "mamba_n_heads": 8,
            "mamba_d_head": 55,
            "mamba_n_groups": 2,
            "mamba_d_state": 54,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 16,
            "rope_parameters": _ROPE,
        },
        ratio=_STATE_RATIO,
    ),
    Geometry(
        "nemotron-h-8b",
        _published("nemotron-h-8b"),
        Weights(16.2e9, 8.1e9, 32 * 128),
        "states cut at boot, 0.9 bytes per byte of KV",
        {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "num_hidden_layers": 52,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            "attention_head_dim": HEAD_DIM,
            "mamba_num_heads": 8,
            "mamba_head_dim": 58,
            "n_groups": 4,
            "ssm_state_size": 16,
            "conv_kernel": 4,
            "chunk_size": 16,
            "mlp_hidden_act": "relu2",
        },
        ratio=_STATE_RATIO,
    ),
    # 16 experts, 2 per token.
    Geometry(
        "jamba-1.5-mini",
        _published("jamba-1.5-mini"),
        Weights(12.0e9, 12.0e9, 32 * 128, 92.0e9, 16, 2),
        "states cut at boot, 0.9 bytes per byte of KV",
        {
            "architectures": ["JambaForCausalLM"],
            "model_type": "jamba",
            "num_hidden_layers": 32,
            "num_attention_heads": 2,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 4,
            "mamba_dt_rank": 8,
        },
        ratio=_STATE_RATIO,
        gpus=2,
    ),
    Geometry(
        "llama-3.1-8b",
        _published("llama-3.1-8b"),
        Weights(16.06e9, 8.03e9, 32 * 128),
        "every layer stored for every token: the dense control",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 32,
        },
    ),
    # The encoder: 0.89 B parameters with its projector, 40 layers of 1,280. For each of an image's
    # 6,404 tokens 2 FLOPs per parameter of these layers (0.79 B), of the projector (0.03 B) and of
    # the cross-attention layers' K and V (0.07 B), and 4 x 6,404 x 1,280 per layer for attention.
    Geometry(
        "llama-3.2-11b-vision",
        _published("llama-3.2-11b-vision"),
        Weights(19.55e9, 9.78e9, 32 * 128, encoder_bytes=1.79e9, encoder_flops=1.78e9 + 1.31e9),
        "every layer stored for every token, image or text",
        {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": "mllama",
            "image_token_index": VOCABULARY - 1,
            "text_config": {
                **_COMMON,
                "model_type": "mllama_text_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 40,
                "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
                "rope_parameters": _ROPE,
            },
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_size": 16,
                "attention_heads": 2,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "intermediate_size": 16,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
                "image_size": 560,
                "patch_size": 14,
                "max_num_tiles": 4,
            },
        },
    ),
)
GEOMETRIES: dict[str, Geometry] = {geometry.name: geometry for geometry in _ALL}

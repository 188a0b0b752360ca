"""What tiny models there are: per family the config that differs, and how its weights are drawn.

A family is one of transformers' or SGLang's model types, cut down to a few layers of width 64.
Plain data: `tiny_models` turns a family into files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_jenga.testing import tiny_jet

VOCAB_SIZE = 512
HEAD_DIM = 16
WINDOW_TYPES = frozenset({"sliding_attention", "swa"})


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from the common tiny config.

    `layer_types` is the pattern that the layers repeat, empty if all are alike or `config` lists
    them; `window_key` says where in the config the length of a window stands.
    `sharpness` is the standard deviation of the attention scores, the knob of sensitivity.
    `written` goes into config.json as it is. `has_attention` is False if states are all there is.
    `shapes` gives the weights of a model type that transformers does not have, from its config.
    """

    model_type: str
    layer_types: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    window_key: tuple[str, ...] = ("sliding_window",)
    sharpness: float = 2.0
    score_scale: float = HEAD_DIM**-0.5
    embedding_scale: float = 1.0
    norm_adds_one: bool = False
    has_state: bool = False
    has_attention: bool = True
    written: dict = field(default_factory=dict)
    shapes: Callable[[dict], dict[str, tuple[int, ...]]] | None = None

    @property
    def has_window(self) -> bool:
        return not WINDOW_TYPES.isdisjoint(self.layer_types)


_GEMMA = {
    # SGLang reads the first name, transformers the second.
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": HEAD_DIM,
    "tie_word_embeddings": True,
}
_GEMMA_SCALE = 64**0.5
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _windows(run: int) -> tuple[str, ...]:
    """So many window layers before each full layer."""
    return ("sliding_attention",) * run + ("full_attention",)


_GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
}
_QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_MAMBA_1 = {"state_size": HEAD_DIM, "time_step_rank": 8, "tie_word_embeddings": True}
_STATES_ONLY = {"has_state": True, "has_attention": False}

BY_NAME: dict[str, Family] = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral", config={"sliding_window": None}),  # SGLang ignores one
    "gemma2": Family(
        "gemma2", _windows(1), _GEMMA, embedding_scale=_GEMMA_SCALE, norm_adds_one=True
    ),
    "gemma3_text": Family(
        "gemma3_text", _windows(5), _GEMMA, embedding_scale=_GEMMA_SCALE, norm_adds_one=True
    ),
    "olmo2": Family("olmo2"),
    # transformers' default rope differs between its config and SGLang's.
    "olmo3": Family("olmo3", _windows(3), {"rope_parameters": dict.fromkeys(_windows(1), _ROPE)}),
    # SGLang reads the pattern where transformers reads layer_types.
    "exaone4": Family("exaone4", _windows(3), {"sliding_window_pattern": "LLLG"}),
    # SGLang's layers see `window` tokens besides the current one here, one more than elsewhere.
    "cohere2": Family("cohere2", _windows(3), {"logit_scale": 1.0, "tie_word_embeddings": True}),
    # Run by SGLang's Transformers fallback. Its layers see `window` tokens besides the current one.
    "ministral": Family("ministral", _windows(3)),
    # The same with windows alone: no layer of full attention.
    "ministral_windows": Family("ministral", ("sliding_attention",)),
    "gpt_oss": Family(
        "gpt_oss",
        _windows(1),
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE},
    ),
    "gemma4": Family(
        "gemma4_text",
        _windows(5),
        _GEMMA
        | {
            "global_head_dim": HEAD_DIM,
            "swa_head_dim": HEAD_DIM,
            "swa_num_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        embedding_scale=_GEMMA_SCALE,
        score_scale=1.0,
    ),
    # Three GDN layers before each full one; a mixture of experts behind every layer.
    "qwen3_next": Family(
        "qwen3_next",
        config=_GDN | _QWEN_EXPERTS | {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.25}},
        # SGLang reads these where transformers reads layer_types and rope_parameters.
        written={"full_attention_interval": 4, "rope_theta": 10000.0},
        norm_adds_one=True,
        has_state=True,
    ),
    # As Qwen3-Next, with one projection per part, and with experts or without.
    "qwen3_5": Family(
        "qwen3_5_text",
        config=_GDN | {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.25}},
        written={"full_attention_interval": 4},
        norm_adds_one=True,
        has_state=True,
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe_text",
        config=_GDN | _QWEN_EXPERTS | {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.25}},
        written={"full_attention_interval": 4},
        norm_adds_one=True,
        has_state=True,
    ),
    "lfm2": Family(
        "lfm2",
        config={
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": True,
            "rope_parameters": _ROPE,
        },
        has_state=True,
    ),
    # Attention and Mamba-2 side by side in every layer.
    "falcon_h1": Family(
        "falcon_h1",
        config={
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": HEAD_DIM,
            "mamba_n_groups": 1,
            "mamba_d_state": HEAD_DIM,
            "mamba_chunk_size": 16,
            "rope_parameters": _ROPE,
        },
        has_state=True,
    ),
    "granite_hybrid": Family(
        "granitemoehybrid",
        config={
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": HEAD_DIM,
            "mamba_n_groups": 1,
            "mamba_d_state": HEAD_DIM,
            "mamba_chunk_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "position_embedding_type": "rope",
            "rope_parameters": _ROPE,
            "attention_multiplier": HEAD_DIM**-0.5,
        },
        has_state=True,
    ),
    # Mamba-1 with one layer of attention, and a mixture of experts behind every other one.
    "jamba": Family(
        "jamba",
        config={
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": HEAD_DIM,
            "mamba_dt_rank": 8,
        },
        has_state=True,
    ),
    # States only: Mamba-1 without and with norms of its step, B and C, and Mamba-2.
    "mamba": Family("mamba", config=_MAMBA_1, **_STATES_ONLY),
    "falcon_mamba": Family(
        "falcon_mamba", config=_MAMBA_1 | {"tie_word_embeddings": False}, **_STATES_ONLY
    ),
    "mamba2": Family(
        "mamba2",
        config={
            "num_heads": 8,
            "head_dim": HEAD_DIM,
            "n_groups": 1,  # transformers norms all groups together, SGLang each by itself
            "state_size": HEAD_DIM,
            "chunk_size": 16,
        },
        # As the real checkpoints have them; transformers writes neither.
        written={"intermediate_size": 128, "rms_norm": True},
        **_STATES_ONLY,
    ),
    # Mamba-2, attention and feed-forward in layers of their own. Not experts: those have one
    # matrix before a squared ReLU, which SGLang does not compute on a CPU.
    "nemotron_h": Family(
        "nemotron_h",
        config={
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": HEAD_DIM,
            "ssm_state_size": HEAD_DIM,
            "n_groups": 2,
            "chunk_size": 16,
        },
        # SGLang reads other names, and other values, than transformers.
        written={
            "layers_block_type": ["mamba", "mlp", "attention", "mamba"],
            "mamba_n_groups": 2,
            "mamba_chunk_size": 16,
        },
        has_state=True,
    ),
    # States, windows and full attention, each in layers of its own. SGLang's window layers see
    # `window` tokens besides the current one.
    "jet_nemotron": Family(
        "jet_nemotron",
        ("jet", "swa", "attn"),
        tiny_jet.CONFIG | {"rope_theta": 10000.0},
        window_key=("efficient_attention_config", "swa", "window_size"),
        has_state=True,
        shapes=tiny_jet.shapes,
    ),
}
FAMILIES = tuple(BY_NAME)
STATE_FAMILIES = tuple(name for name, family in BY_NAME.items() if family.has_state)
WINDOW_FAMILIES = tuple(name for name, family in BY_NAME.items() if family.has_window)
# Stock SGLang does not serve the others with torch_native: attention sinks, a list of backends.
CPU_FAMILIES = tuple(name for name in FAMILIES if name not in ("gpt_oss", "exaone4"))

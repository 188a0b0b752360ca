"""Layer groups of a model, read from its Hugging Face config.json without loading anything.

Also states how stock SGLang 0.5.23 would store the same model, so that both can be compared. A
config is a plain dict here; nothing of transformers, torch or SGLang is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_jenga.layers.registry import kind_of
from sglang_jenga.layers.state import State
from sglang_jenga.plan.spec import LayerGroup
from sglang_jenga.plan.stock import StockLayout

KV_ITEMSIZE = {
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "float16", "half"), 2),
    **dict.fromkeys(("fp32", "float32", "float"), 4),
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), 1),
}
CONV_ITEMSIZE = 2  # SGLANG_MAMBA_CONV_DTYPE: bfloat16 unless set
SSM_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

KIND_OF_LAYER_TYPE = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "short_conv": "state",
    "mlp": "none",
    "moe": "none",
}
KIND_OF_PATTERN = {"M": "state", "*": "full", "-": "none", "E": "none"}

# transformers fills these in when a checkpoint leaves them out; multimodal Gemma ones do.
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
DEFAULTS = {
    "Gemma2": {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 2},
    "Gemma3": {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 6},
    "Gemma4": {**_GEMMA, "sliding_window": 512, "sliding_window_pattern": 6},
    "Olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "Exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "Cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "GptOss": {"sliding_window": 128, "sliding_window_pattern": 2, "head_dim": 64},
    "Qwen3Next": {"full_attention_interval": 4, "head_dim": 256},
    "Lfm2": {"conv_L_cache": 3},
    "Mllama": {"cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]},
}

STOCK_HYBRID_WINDOW = ("GptOss", "Gemma4", "Mellum", "Laguna", "GraniteSWA", "GraniteMoeSWA")
RUNS_WINDOW_AS_FULL = ("Ministral", "Mistral", "Llama", "Qwen2", "Qwen3")
STATE_TRACKING_BUFFERS = ("Qwen3Next", "FalconH1", "NemotronH", "GraniteMoeHybrid")


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """What a model asks of one rank's pool.

    ``cross_tokens`` is the most encoder tokens one image makes (0 = no cross layers). ``states`` is
    the number of state slots SGLang pins per running request with its default radix strategy (0 =
    no state layers). ``runs_window_as_full``: the plan has a window group, but SGLang's model code
    reads those layers as full attention, so a server cannot use the plan yet.
    """

    architecture: str
    groups: tuple[LayerGroup, ...]
    stock: StockLayout
    context_tokens: int | None = None
    states: int = 0
    runs_window_as_full: bool = False
    notes: tuple[str, ...] = ()


def read_geometry(
    config: Mapping[str, Any], *, page_size: int = 1, tp: int = 1, dtype: str = "auto"
) -> ModelGeometry:
    """Read the layer groups of one of `tp` ranks.

    Args:
        config: the parsed config.json; a nested ``text_config`` is looked into.
        page_size: SGLang's tokens per page, the tokens per small page of every KV group.
        dtype: ``--kv-cache-dtype``; ``auto`` follows the checkpoint's dtype.

    Raises:
        ValueError: MLA, an unknown dtype or layer type, a missing field, a bad number.
    """
    if page_size <= 0 or tp <= 0:
        raise ValueError(f"page_size and tp must be positive, got {page_size} and {tp}")
    architecture = (config.get("architectures") or ["unknown"])[0]
    text = _text_config(config, architecture)
    if text.get("kv_lora_rank"):
        raise ValueError(
            f"{architecture} stores MLA latents (kv_lora_rank={text['kv_lora_rank']}); only models "
            "with K and V heads are planned"
        )
    kinds = _layer_kinds(text, architecture)
    if any("cross" in of_layer for of_layer in kinds):
        raise ValueError(f"{architecture}: cross-attention layers are not served yet")
    rows = _row_bytes(text, architecture, tp, _kv_itemsize(text, dtype))
    window = text.get("sliding_window") or text.get("sliding_window_size")

    groups = []
    for kind in ("full", "window", "cross"):
        layer_ids = tuple(i for i, of_layer in enumerate(kinds) if kind in of_layer)
        if layer_ids:
            entry_bytes = len(layer_ids) * rows[kind]
            of_type = kind_of(kind, window) if kind == "window" else kind_of(kind)
            groups.append(LayerGroup(of_type, layer_ids, entry_bytes, page_size))
    state_ids = tuple(i for i, of_layer in enumerate(kinds) if "state" in of_layer)
    if state_ids:
        entry_bytes = len(state_ids) * _state_bytes(text, architecture, tp)
        groups.append(LayerGroup(State(), state_ids, entry_bytes))
    if not groups:
        raise ValueError(f"{architecture}: no layer of this config keeps KV or state")

    states = (3 if architecture.startswith(STATE_TRACKING_BUFFERS) else 1) if state_ids else 0
    as_full = architecture.startswith(RUNS_WINDOW_AS_FULL) and any("window" in k for k in kinds)
    return ModelGeometry(
        architecture,
        tuple(groups),
        _stock_layout(text, architecture, kinds, rows, groups, page_size, states),
        text.get("max_position_embeddings"),
        states,
        as_full,
        _notes(architecture, as_full),
    )


def _text_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    defaults = next((DEFAULTS[name] for name in DEFAULTS if architecture.startswith(name)), {})
    own = {**config, **(config.get("text_config") or {})}
    # A null field means "absent" in transformers, except for the window, where it means "none".
    given = {k: v for k, v in own.items() if v is not None or k == "sliding_window"}
    return {**defaults, **given}


def _need(text: Mapping[str, Any], key: str) -> Any:
    if text.get(key) is None:
        raise ValueError(f"config.json lacks {key}")
    return text[key]


def _kv_itemsize(text: Mapping[str, Any], dtype: str) -> int:
    if dtype == "auto":
        stored = text.get("dtype") or text.get("torch_dtype") or "bfloat16"
        # SGLang runs float32 checkpoints in 16 bits unless told otherwise.
        dtype = "bfloat16" if stored == "float32" else stored
    if dtype not in KV_ITEMSIZE:
        raise ValueError(
            f"kv cache dtype must be auto or one of {sorted(KV_ITEMSIZE)}, got {dtype!r}"
        )
    return KV_ITEMSIZE[dtype]


def _layer_kinds(text: Mapping[str, Any], architecture: str) -> list[tuple[str, ...]]:
    """Return what each layer stores: some of full, window, state, cross."""
    if architecture.startswith("FalconH1"):
        return [("full", "state")] * _need(text, "num_hidden_layers")
    if "hybrid_override_pattern" in text:
        pattern = text["hybrid_override_pattern"]
        if not set(pattern) <= set(KIND_OF_PATTERN):
            raise ValueError(
                f"hybrid_override_pattern must be of {''.join(KIND_OF_PATTERN)}, got {pattern!r}"
            )
        return [(KIND_OF_PATTERN[char],) for char in pattern]
    kinds = [(kind,) for kind in _simple_kinds(text, architecture)]
    shared = text.get("num_kv_shared_layers", 0)
    # The last layers read the KV of an earlier layer of their type and store none (Gemma-3n, -4).
    return kinds[: len(kinds) - shared] + [("none",)] * shared


def _simple_kinds(text: Mapping[str, Any], architecture: str) -> list[str]:
    types = text.get("layer_types") or text.get("layers_block_type")
    num_layers = len(types) if types else _need(text, "num_hidden_layers")
    layers = range(num_layers)
    if architecture.startswith("Mllama"):
        return ["cross" if i in text["cross_attention_layers"] else "full" for i in layers]
    if "full_attn_idxs" in text and not types:
        return ["full" if i in text["full_attn_idxs"] else "state" for i in layers]
    if "attn_layer_period" in text:
        period, offset = text["attn_layer_period"], _need(text, "attn_layer_offset")
        return ["full" if i % period == offset else "state" for i in layers]
    if not types and "full_attention_interval" in text:
        return ["state" if (i + 1) % text["full_attention_interval"] else "full" for i in layers]
    if types:
        unknown = sorted(set(types) - set(KIND_OF_LAYER_TYPE))
        if unknown:
            raise ValueError(f"layer_types must be of {sorted(KIND_OF_LAYER_TYPE)}, got {unknown}")
        kinds = [KIND_OF_LAYER_TYPE[name] for name in types]
    elif "hybrid_layer_pattern" in text:
        kinds = ["window" if flag else "full" for flag in text["hybrid_layer_pattern"]]
    else:
        pattern = text.get("sliding_window_pattern", 1)
        pattern = len(pattern) if isinstance(pattern, str) else pattern or 1
        kinds = ["window" if (i + 1) % pattern else "full" for i in layers]
    if architecture.startswith("Gemma4"):
        kinds[-1] = "full"
    windowed = text.get("sliding_window") or text.get("sliding_window_size")
    if not windowed or text.get("use_sliding_window") is False:
        return ["full" if kind == "window" else kind for kind in kinds]
    return kinds


def _row_bytes(
    text: Mapping[str, Any], architecture: str, tp: int, itemsize: int
) -> dict[str, int]:
    """Return one token's K and V bytes in one layer of each kind, on one rank."""
    heads = _need(text, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text.get("attention_head_dim")
    head_dim = head_dim or _need(text, "hidden_size") // heads
    window_heads = text.get("swa_num_key_value_heads") or kv_heads
    window_dim = text.get("swa_head_dim") or head_dim
    if architecture.startswith("Gemma4"):
        # These configs state the window layers' shape and override it for the full ones.
        window_heads, window_dim = kv_heads, head_dim
        head_dim = text.get("global_head_dim") or 512
        if text.get("attention_k_eq_v"):
            kv_heads = text.get("num_global_key_value_heads") or kv_heads
    v_dim = text.get("v_head_dim") or head_dim
    window_v_dim = text.get("swa_v_head_dim") or window_dim
    full = max(1, kv_heads // tp) * (head_dim + v_dim) * itemsize
    window = max(1, window_heads // tp) * (window_dim + window_v_dim) * itemsize
    return {"full": full, "window": window, "cross": full, "none": 0}


def _state_bytes(text: Mapping[str, Any], architecture: str, tp: int) -> int:
    """Return one request's conv and SSM state in one layer, on one rank (mamba_utils.py)."""
    ssm_itemsize = SSM_ITEMSIZE.get(text.get("mamba_ssm_dtype", "float32"), 4)
    if "linear_num_value_heads" in text:
        heads, head_dim = text["linear_num_value_heads"], _need(text, "linear_value_head_dim")
        num_groups, state = _need(text, "linear_num_key_heads"), _need(text, "linear_key_head_dim")
        kernel = text.get("linear_conv_kernel_dim", 4)
    elif "conv_L_cache" in text:
        return (
            _per_rank(_need(text, "hidden_size"), tp) * (text["conv_L_cache"] - 1) * CONV_ITEMSIZE
        )
    elif "mamba_num_heads" in text:
        heads, head_dim = text["mamba_num_heads"], _need(text, "mamba_head_dim")
        num_groups, state = text.get("n_groups", 8), text.get("ssm_state_size", 128)
        kernel = text.get("conv_kernel", 4)
    elif "mamba_n_heads" in text:
        inner = text.get("mamba_d_ssm") or text.get("mamba_expand", 2) * _need(text, "hidden_size")
        heads, head_dim = text["mamba_n_heads"], inner // text["mamba_n_heads"]
        num_groups, state = text.get("mamba_n_groups", 1), _need(text, "mamba_d_state")
        kernel = text.get("mamba_d_conv", 4)
    elif "mamba_d_state" in text:
        # Mamba-1: the convolution runs over the inner channels alone, the state is full rank.
        heads, head_dim, num_groups = text.get("mamba_expand", 2) * _need(text, "hidden_size"), 1, 0
        state, kernel = text["mamba_d_state"], text.get("mamba_d_conv", 4)
    else:
        raise ValueError(f"{architecture}: config.json has state layers but no known state sizes")
    if num_groups % tp:
        num_groups += tp - num_groups  # SGLang repeats groups so that every rank has its own
    conv_dim = _per_rank(heads * head_dim + 2 * num_groups * state, tp)
    ssm = _per_rank(heads, tp) * head_dim * state
    return conv_dim * (kernel - 1) * CONV_ITEMSIZE + ssm * ssm_itemsize


def _per_rank(value: int, tp: int) -> int:
    if value % tp:
        raise ValueError(f"tp must divide {value} state channels or heads, got {tp}")
    return value // tp


def _stock_layout(
    text: Mapping[str, Any],
    architecture: str,
    kinds: list[tuple[str, ...]],
    rows: Mapping[str, int],
    groups: list[LayerGroup],
    page_size: int,
    states: int,
) -> StockLayout:
    sizes = {group.kind.name: group for group in groups}
    counts = {kind: sum(kind in of_layer for of_layer in kinds) for kind in (*rows, "state")}
    if "state" in sizes:
        # MAMBA_CACHE_SIZE_MAX_RUNNING_REQUESTS_RATIO is 3, plus the tracking buffers (0 or 2).
        return StockLayout(
            counts["full"] * rows["full"],
            state_bytes=sizes["state"].entry_bytes,
            states_per_request=states + 2,
            page_size=page_size,
            summary=f"states get 0.9/1.9 of the bytes, {states + 2} slots per running request",
        )
    if architecture.startswith(STOCK_HYBRID_WINDOW) or text.get("is_hybrid_swa"):
        # Stock counts KV-shared layers too, by their layer type.
        all_kinds = _simple_kinds(text, architecture)
        num_window = all_kinds.count("window")
        if num_window:
            return StockLayout(
                (len(all_kinds) - num_window) * rows["full"],
                num_window * rows["window"],
                sizes["window"].window,
                page_size=page_size,
                summary="window pool holds 0.8 tokens per token of the full pool",
            )
    num_layers = sum(counts[kind] for kind in ("full", "window", "cross"))
    num_layers += text.get("num_kv_shared_layers", 0)
    return StockLayout(
        num_layers * rows["full"],
        page_size=page_size,
        summary=f"all {num_layers} attention layers stored for every token",
    )


def _notes(architecture: str, as_full: bool) -> tuple[str, ...]:
    notes = []
    if as_full:
        notes.append(
            f"SGLang 0.5.23 runs the window layers of {architecture} as full attention: the window "
            "group shows what its model code leaves unused"
        )
    if architecture.startswith("Jamba"):
        notes.append(
            "SGLang 0.5.23 has no Jamba: the stock figures are what its state split would hold"
        )
    if architecture.startswith("Mllama"):
        notes.append("one image of the largest size per request")
    return tuple(notes)

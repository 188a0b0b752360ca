"""The one table of models: which layers store what, how wide a window is, what is not served.

Read by `sglang-jenga plan` from a config.json and by the server from SGLang's own config object;
stdlib only. A model without a row is one whose layers are all stored in full. Another package adds
rows of its own with `register_model`.

Two numbers of SGLang describe a window: what a layer was built with
(``RadixAttention.sliding_window_size``), and what its runner gives pages back by. The table says
what layers see; where the runner keeps more, the row says so. Where it would keep less, tokens
would be wrong, and the server stops at boot (`sglang_jenga.boot.built_layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang_jenga.plan import encoder_tokens, head_shapes, state_sizes
from sglang_jenga.plan import layer_lists as lists
from sglang_jenga.plan.layer_lists import Read
from sglang_jenga.plan.model_row import ModelRow, Window

EXTRA_CACHE = "it caches more per token than K and V"
MLA = "MLA layers are not carried yet"
CROSS = "cross-attention is not carried yet"
ENCODER_PAGES = "SGLang looks for a row's last page without its encoder's tokens"
DIFFUSION = "diffusion steps rewrite tokens that are already cached"
UNTRIED_STATES = "its state kernels have not been tried on states that do not lie side by side"
KEPT_PROMPTS = "its windows begin behind the prompt, all of which its code goes on reading"
NO_WIDTH = "its config names window layers and no width of theirs (sliding_window)"
NO_CODE = "SGLang 0.5.23 has no code for it"
TRACK_INTERVAL = 256
"""SGLang's default of ``--mamba-track-interval``: after so many tokens it snapshots a state."""
CHUNK = 64
"""Tokens that SGLang's state kernels take at once, unless a config has a ``mamba_chunk_size``."""
PAGES_WITHOUT_TRACKING = "without tracking, a cached state is that of one very token"


def _mla(read: Read) -> str:
    return EXTRA_CACHE if read("index_topk") is not None else MLA


def _mla_if_latent(read: Read) -> str:
    return _mla(read) if read("kv_lora_rank") is not None else ""


def _mla_unless_switched_off(read: Read) -> str:
    return "" if read("use_mla") is False else MLA


def _needs_window(read: Read) -> str:
    return "" if read("sliding_window") else NO_WIDTH


def _windows(**options: Any) -> ModelRow:
    """A model that stock SGLang has a window pool for."""
    return ModelRow(stock_stores_windows=True, **{"layers": lists.by_layer_types(), **options})


_ONE_MORE = Window(beside=1)
_RUNNER_KEEPS_ONE_MORE = Window(kept=1)
_GEMMA3 = ModelRow(layers=lists.by_layer_types(5))
_GEMMA4 = _windows(
    layers=lists.by_layer_types(5, last=lists.FULL),
    heads=head_shapes.gemma4,
)
_STEP = _windows(window=_ONE_MORE)
_MIMO = _windows(
    layers=lists.by_flags,
    window=_ONE_MORE,
    note="K and V rows differ in width: served by triton, fa3 and fa4 attention",
)
_GRANITE = _windows(layers=lists.from_first(4), window=_RUNNER_KEEPS_ONE_MORE)
_JET_WINDOW = Window(fields=("efficient_attention_config.swa.window_size",), beside=1)
_JET = ModelRow(layers=lists.by_layer_types(), window=_JET_WINDOW, state=state_sizes.jet)
_QWEN = ModelRow(
    layers=lists.by_interval,
    state=state_sizes.gated_delta_rule,
    tracks=True,
)
_NEMOTRON_H = ModelRow(
    layers=lists.by_characters,
    state=state_sizes.nemotron_h,
    tracks=True,
    defaults={"head_dim": 128},
)
_LFM2 = ModelRow(layers=lists.by_full_ids, state=state_sizes.short_convolution)
_MAMBA_1 = ModelRow(layers=lists.every_layer("state"), state=state_sizes.mamba_1)
_STORED_FULL = "SGLang's code has windows for it, which are stored in full"
_REFUSED_MLA = ModelRow(layers=None, refused=_mla)
_REFUSED_STATES = ModelRow(layers=None, refused=UNTRIED_STATES)
_REFUSED_EXTRA = ModelRow(layers=None, refused=EXTRA_CACHE)
_REFUSED_CROSS = ModelRow(layers=None, refused=CROSS)

MODELS: dict[str, ModelRow] = {
    # Windows that stock SGLang stores in full.
    "Gemma2ForCausalLM": ModelRow(layers=lists.every_nth_full(2)),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Olmo2ForCausalLM": ModelRow(
        layers=lists.by_layer_types()
    ),  # Olmo-3 arrives under this name; Olmo-2 has no layer types
    "Olmo3ForCausalLM": ModelRow(layers=lists.by_layer_types(3)),
    "Exaone4ForCausalLM": ModelRow(layers=lists.by_pattern_length),
    "Cohere2ForCausalLM": ModelRow(layers=lists.by_layer_types(3), window=_ONE_MORE),
    # Run by SGLang's Transformers fallback, which keeps to layer_types.
    "MinistralForCausalLM": ModelRow(
        layers=lists.by_layer_types(),
        window=_ONE_MORE,
        note="its windows see one token more than Transformers' own, but with --jenga-true-windows",
        true_windows=ModelRow(layers=lists.by_layer_types()),
    ),
    # SGLang's code attends over everything, Transformers' over the window in every layer.
    "MistralForCausalLM": ModelRow(
        true_windows=ModelRow(
            layers=lists.every_layer("window"), window=Window(fields=("sliding_window",))
        )
    ),
    "JetNemotronForCausalLM": _JET,
    "JetVLMForConditionalGeneration": ModelRow(
        layers=lists.in_full(lists.by_layer_types()), state=state_sizes.jet, note=_STORED_FULL
    ),
    # Windows that stock SGLang has a pool for.
    "GptOssForCausalLM": _windows(
        layers=lists.by_layer_types(1),
        refused=_needs_window,  # SGLang's code computes with it
    ),
    **dict.fromkeys(
        (
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
        ),
        _GEMMA4,
    ),
    "GraniteSWAForCausalLM": _GRANITE,
    "GraniteMoeSWAForCausalLM": _GRANITE,
    "LagunaForCausalLM": _windows(window=_RUNNER_KEEPS_ONE_MORE),
    "MellumForCausalLM": _windows(),
    "MiMoV2ForCausalLM": _MIMO,
    "MiMoV2FlashForCausalLM": _MIMO,
    "Step3p5ForCausalLM": _STEP,
    "Step3p7ForConditionalGeneration": _STEP,
    "MuseGlimmerForCausalLM": _windows(),
    "MuseGlimmerForConditionalGeneration": _windows(),
    "MuseSparkForConditionalGeneration": _windows(kv_cache_dtype="fp8_e4m3"),
    "Spark2_5ForCausalLM": _windows(layers=lists.by_layer_types(3)),
    "BeamForCausalLM": _windows(layers=lists.by_layer_types(5, last_by_default=lists.FULL)),
    "IQuestQ1ForCausalLM": _windows(layers=lists.in_blocks, window=_RUNNER_KEEPS_ONE_MORE),
    "Llama4ForConditionalGeneration": _windows(
        layers=lists.every_nth_full(4, window="attention_chunk_size"),
        window=Window(fields=("attention_chunk_size",), beside=1),
        note="served by fa3 and fa4 attention, whose kernels keep to the chunks",
    ),
    # Windows that SGLang's code has and nobody stores as such yet.
    **dict.fromkeys(
        (
            "Gemma3nForCausalLM",
            "Gemma3nForConditionalGeneration",
            "ExaoneMoEForCausalLM",
            "ExaoneMoeForCausalLM",
            "AfmoeForCausalLM",
            "Cohere2MoeForCausalLM",
            "Cohere2VisionForConditionalGeneration",
        ),
        ModelRow(note=_STORED_FULL),
    ),
    # Layers that run several times.
    # SGLang counts them twice here, and so many buffers it makes.
    "IQuestLoopCoderForCausalLM": ModelRow(layers=lists.looped("loop_num", "loop_num")),
    "NanbeigeForCausalLM": ModelRow(layers=lists.looped("num_loops")),
    # States.
    **dict.fromkeys(
        (
            "Qwen3NextForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
            "InternS2PreviewForConditionalGeneration",
            "MiniCPMV4_6ForConditionalGeneration",
            "MiniCPMV4_7ForConditionalGeneration",
        ),
        _QWEN,
    ),
    "FalconH1ForCausalLM": ModelRow(
        layers=lists.every_layer("full", "state"), state=state_sizes.falcon_h1, tracks=True
    ),
    "NemotronHForCausalLM": _NEMOTRON_H,
    "NemotronHPuzzleForCausalLM": _NEMOTRON_H,
    "NemotronH_Omni_Reasoning_V3": _NEMOTRON_H,
    "NemotronH_Nano_Omni_Reasoning_V3": replace(_NEMOTRON_H, tracks=False),
    "NemotronH_Nano_VL_V2": replace(_NEMOTRON_H, tracks=False),
    "GraniteMoeHybridForCausalLM": ModelRow(
        layers=lists.states_unless_listed, state=state_sizes.granite, stateless=True, tracks=True
    ),
    "Lfm2ForCausalLM": _LFM2,
    "Lfm2MoeForCausalLM": _LFM2,
    "Lfm2VlForConditionalGeneration": _LFM2,
    "MambaForCausalLM": _MAMBA_1,
    "FalconMambaForCausalLM": _MAMBA_1,
    "Mamba2ForCausalLM": ModelRow(layers=lists.every_layer("state"), state=state_sizes.mamba_2),
    # SGLang has no code for it; ours is in `sglang_jenga.models`, with the flag and without it.
    "JambaForCausalLM": ModelRow(
        layers=lists.by_period,
        state=state_sizes.jamba,
        tracks=True,
        note="run by this project's model code: SGLang has none",
    ),
    # Cross attention.
    "MllamaForConditionalGeneration": ModelRow(
        layers=lists.by_cross_ids, encoder=encoder_tokens.mllama
    ),
    # Not served.
    "WhisperForConditionalGeneration": _REFUSED_CROSS,
    "MossVLForConditionalGeneration": _REFUSED_CROSS,
    "UnlimitedOCRForCausalLM": _windows(layers=None, refused=KEPT_PROMPTS),
    "PixtralForConditionalGeneration": ModelRow(refused=_mla_if_latent),
    "DeepseekVL2ForCausalLM": ModelRow(refused=_mla_unless_switched_off),
    "EmbeddingGemma2Model": _windows(
        window=_RUNNER_KEEPS_ONE_MORE,
        heads=head_shapes.gemma4,
        defaults={"num_global_key_value_heads": 1, "attention_k_eq_v": True},
    ),
    "DiffusionGemmaForBlockDiffusion": ModelRow(layers=None, refused=DIFFUSION),
    "InklingForConditionalGeneration": _REFUSED_STATES,
    "ZayaForCausalLM": _REFUSED_STATES,
    "MiniCPMSALAForCausalLM": _REFUSED_STATES,
    **dict.fromkeys(
        (
            "DeepseekV4ForCausalLM",
            "MiniMaxM3SparseForCausalLM",
            "MiniMaxM3SparseForConditionalGeneration",
            "Qwen4ExpForConditionalGeneration",
        ),
        _REFUSED_EXTRA,
    ),
    **dict.fromkeys(
        (
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "DeepseekV32ForCausalLM",
            "Glm4MoeLiteForCausalLM",
            "GlmMoeDsaForCausalLM",
            "Glm5NextForConditionalGeneration",
            "LongcatFlashForCausalLM",
            "HYV4ForCausalLM",
            "DotsVLMForCausalLM",
            "Dots3NoteForCausalLM",
            "MistralLarge3ForCausalLM",
            "KimiK25ForConditionalGeneration",
            "KimiVLForConditionalGeneration",
            "KimiLinearForCausalLM",
            "KimiK3LinearForCausalLM",
            "KimiK3ForConditionalGeneration",
            "GigaChat35ForCausalLM",
            "MiniCPM3ForCausalLM",
            "BailingMoeV2_5ForCausalLM",
            "BailingMoeV3ForCausalLM",
            "BailingMoeV3VLForConditionalGeneration",
            "SarvamMLAForCausalLM",
        ),
        _REFUSED_MLA,
    ),
}


_NO_ROW = ModelRow(layers=lists.as_stored_by_sglang, stock_stores_windows=True)


def register_model(architecture: str, row: ModelRow) -> None:
    """Add a row for an architecture, as config.json names it.

    Call it from the function that an entry point of the group ``sglang_jenga.layers`` names: the
    launcher, every scheduler and `sglang-jenga plan` call that before they read the table.

    Raises:
        ValueError: there is a row for this architecture already.
    """
    if architecture in MODELS:
        raise ValueError(f"the table of models has a row for {architecture} already")
    MODELS[architecture] = row


def row_of(architectures: Sequence[str], *, true_windows: bool = False) -> ModelRow:
    """Return the row of the first architecture that has one, or that of all other models;
    ``true_windows``: the one under --jenga-true-windows, where that means something."""
    row = next((MODELS[name] for name in architectures if name in MODELS), _NO_ROW)
    return row.true_windows if true_windows and row.true_windows is not None else row


def has_row(architectures: Sequence[str]) -> bool:
    return any(name in MODELS for name in architectures)


def refusal(architecture: str, why: str) -> str:
    """The sentence by which a server, and a plan, say that a model is not served."""
    return f"--memory-backend jenga does not serve {architecture}: {why}; drop --memory-backend"


def tracked_pages_refusal(page_size: int, interval: int, chunk: int) -> str:
    """The sentence for a page size that does not fit the places where SGLang snapshots states, or
    an empty text. SGLang asserts both."""
    if page_size <= 0 or interval <= 0 or chunk <= 0:
        return ""
    if interval % page_size:
        why = f"states are tracked every {interval} tokens, and that must be whole pages"
    elif max(page_size, chunk) % min(page_size, chunk):
        why = f"its state kernels take {chunk} tokens at once, and one must divide the other"
    else:
        return ""
    return flag_refusal("--page-size", why, value=page_size)


def flag_refusal(
    flag: str, why: str, *, value: Any = True, beside: str = "--memory-backend jenga"
) -> str:
    """The sentence for a flag that is not served ``beside`` another, or not with this model."""
    shown = "" if value is True else f" {value}"
    return f"{beside} does not work with {flag}{shown}: {why}; drop {flag} or {beside.split()[0]}"

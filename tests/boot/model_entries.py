"""A tiny config for every row of the table of models: architecture -> (model type, fields)."""

from __future__ import annotations

from typing import Any

from sglang_jenga.testing.launcher import OMITTED, TINY

Entry = tuple[str, dict[str, Any]]

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
TYPES = {
    "sliding_window": 32,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "full_attention_interval": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_scaling": None,
}
JET = {
    "layer_types": ["jet", "attn", "swa", "jet"],
    "efficient_attention_config": {
        "jet": {
            "mode": "chunk",
            "num_heads": 4,
            "head_dim": 16,
            "expand_v": 1.5,
            "norm_eps": "1e-5",
            "conv_size": 4,
            "dconv_generator_reduction": 4,
            "dconv_implementation": "triton",
        },
        "swa": {"window_size": 32},
    },
}
NEMOTRON = {
    "hybrid_override_pattern": "M-*M",
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "chunk_size": 16,
}
VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def inside(model_type: str, **fields: Any) -> dict[str, Any]:
    """A language model in a section of its own."""
    return {"text_config": {**TINY, "model_type": model_type, **fields}}


def alone(model_type: str, **fields: Any) -> dict[str, Any]:
    """The same, where the fields of a language model may not stand outside its section."""
    return {**dict.fromkeys(TINY, OMITTED), **inside(model_type, **fields)}


def _same(names: str, model_type: str, fields: dict[str, Any]) -> dict[str, Entry]:
    return dict.fromkeys(names.split(), (model_type, fields))


ENTRIES: dict[str, Entry] = {
    "Gemma2ForCausalLM": ("gemma2", TYPES),
    "Gemma3ForCausalLM": ("gemma3_text", {**TYPES, "rope_parameters": TWO_ROPES}),
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        inside("gemma3_text", **TYPES, rope_parameters=TWO_ROPES) | {"vision_config": VISION},
    ),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo3", TYPES),
    "Exaone4ForCausalLM": ("exaone4", {**TYPES, "sliding_window_pattern": "LLLG"}),
    "Cohere2ForCausalLM": ("cohere2", TYPES),
    "MinistralForCausalLM": ("ministral", TYPES),
    "MistralForCausalLM": ("mistral", {"sliding_window": 32}),
    "JetNemotronForCausalLM": ("jet_nemotron", JET),
    "JetVLMForConditionalGeneration": ("jet_vlm", inside("jet_nemotron", **JET)),
    "GptOssForCausalLM": ("gpt_oss", {**TYPES, "num_local_experts": 4}),
    # Text alone is read only where full layers have the shape of window layers.
    "Gemma4ForCausalLM": ("gemma4_text", {**TYPES, "global_head_dim": TINY["head_dim"]}),
    "Gemma4ForConditionalGeneration": (
        "gemma4",
        inside(
            "gemma4_text",
            **TYPES,
            global_head_dim=32,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            num_kv_shared_layers=2,
        ),
    ),
    "Gemma4UnifiedForConditionalGeneration": ("gemma4_unified", inside("gemma4_text", **TYPES)),
    "GraniteSWAForCausalLM": ("granite_swa", TYPES),
    "GraniteMoeSWAForCausalLM": ("granitemoe_swa", TYPES),
    "LagunaForCausalLM": ("laguna", TYPES),
    "MellumForCausalLM": ("mellum", TYPES),
    **_same(
        "MiMoV2ForCausalLM MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        {
            "hybrid_layer_pattern": [0, 1, 1, 0],
            "sliding_window_size": 32,
            "head_dim": 24,
            "v_head_dim": 16,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 24,
            "swa_v_head_dim": 16,
        },
    ),
    "Step3p5ForCausalLM": (
        "step3p5",
        {
            **TYPES,
            "num_attention_groups": 2,
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 4,
                "num_attention_groups": 2,
                "head_dim": 16,
            },
        },
    ),
    "Step3p7ForConditionalGeneration": (
        "step3p7",
        inside("step3p5", **TYPES, num_attention_groups=2),
    ),
    "MuseGlimmerForCausalLM": ("muse_glimmer", TYPES),
    "MuseGlimmerForConditionalGeneration": ("muse_glimmer", TYPES),
    "MuseSparkForConditionalGeneration": ("muse_spark", inside("muse_spark_text", **TYPES)),
    "Spark2_5ForCausalLM": ("spark2_5", TYPES),
    "BeamForCausalLM": ("beam", TYPES),
    "IQuestQ1ForCausalLM": (
        "iquest_q1",
        {
            "sliding_window": 32,
            "rotary_dim": 16,
            "moe_router_dtype": "fp32",
            "enable_lm_head_fp32": True,
            "first_layers_types": ["full_attention"],
            "hybrid_layers_types_block": ["sliding_attention"],
            "num_hybrid_layers_block": 2,
            "last_layers_types": ["full_attention"],
        },
    ),
    "Llama4ForConditionalGeneration": (
        "llama4",
        inside("llama4_text", attention_chunk_size=32) | {"vision_config": VISION},
    ),
    "EmbeddingGemma2Model": ("embedding_gemma2", inside("embedding_gemma2_text", **TYPES)),
    "Gemma3nForCausalLM": ("gemma3n_text", {**TYPES, "num_kv_shared_layers": 1}),
    "Gemma3nForConditionalGeneration": (
        "gemma3n",
        inside("gemma3n_text", **TYPES, num_kv_shared_layers=1),
    ),
    **_same("ExaoneMoEForCausalLM ExaoneMoeForCausalLM", "exaone_moe", TYPES),
    "AfmoeForCausalLM": ("afmoe", TYPES),
    "Cohere2MoeForCausalLM": ("cohere2_moe", TYPES),
    "Cohere2VisionForConditionalGeneration": ("cohere2_vision", inside("cohere2", **TYPES)),
    "IQuestLoopCoderForCausalLM": ("llama", {"loop_num": 2}),
    "NanbeigeForCausalLM": ("nanbeige", {"num_loops": 2}),
    "Qwen3NextForCausalLM": ("qwen3_next", GDN),
    "Qwen3_5ForCausalLM": ("qwen3_5_text", GDN),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", GDN),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", inside("qwen3_5_text", **GDN)),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", inside("qwen3_5_moe_text", **GDN)),
    "InternS2PreviewForConditionalGeneration": (
        "intern_s2_preview",
        inside("qwen3_5_moe_text", **GDN),
    ),
    "MiniCPMV4_6ForConditionalGeneration": ("minicpmv4_6", alone("qwen3_5_text", **GDN)),
    "MiniCPMV4_7ForConditionalGeneration": ("minicpmv4_7", alone("qwen3_5_text", **GDN)),
    "FalconH1ForCausalLM": ("falcon_h1", {**MAMBA_2, "mamba_d_ssm": 128}),
    "NemotronHForCausalLM": ("nemotron_h", NEMOTRON),
    "NemotronHPuzzleForCausalLM": (
        "nemotron_h_puzzle",
        {**NEMOTRON, "block_configs": [{"block_type": "mamba"}] * 4},
    ),
    **_same(
        "NemotronH_Omni_Reasoning_V3 NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2",
        "NemotronH_Nano_VL_V2",
        {"llm_config": {**TINY, **NEMOTRON, "model_type": "nemotron_h"}, "vision_config": VISION},
    ),
    "GraniteMoeHybridForCausalLM": (
        "granitemoehybrid",
        {**MAMBA_2, "layer_types": ["mamba", "attention", "mamba", "mamba"]},
    ),
    **_same(
        "Lfm2ForCausalLM",
        "lfm2",
        {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 3},
    ),
    **_same(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 3},
    ),
    "Lfm2VlForConditionalGeneration": (
        "lfm2_vl",
        inside("lfm2", layer_types=["conv", "conv", "full_attention", "conv"], conv_L_cache=3),
    ),
    "MambaForCausalLM": ("mamba", {"state_size": 16, "intermediate_size": 256}),
    "FalconMambaForCausalLM": ("falcon_mamba", {"state_size": 16, "intermediate_size": 256}),
    "Mamba2ForCausalLM": (
        "mamba2",
        {"num_heads": 8, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    ),
    "JambaForCausalLM": (
        "jamba",
        {"attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 16},
    ),
    "MllamaForConditionalGeneration": (
        "mllama",
        inside("mllama_text_model", cross_attention_layers=[1]),
    ),
    "WhisperForConditionalGeneration": (
        "whisper",
        {"d_model": 64, "decoder_attention_heads": 4, "encoder_attention_heads": 4},
    ),
    "MossVLForConditionalGeneration": ("llama", {}),
    "UnlimitedOCRForCausalLM": ("llama", {"sliding_window_size": 32}),
    "PixtralForConditionalGeneration": ("llama", MLA),
    "DeepseekVL2ForCausalLM": ("llama", MLA),
    "DiffusionGemmaForBlockDiffusion": ("llama", TYPES),
    **_same(
        "InklingForConditionalGeneration",
        "llama",
        {"local_layer_ids": [0, 1]},
    ),
    "ZayaForCausalLM": ("llama", {}),
    "MiniCPMSALAForCausalLM": ("llama", {}),
    "DeepseekV4ForCausalLM": (
        "llama",
        {"qk_rope_head_dim": 8, "sliding_window": 32, "index_head_dim": 8, "compress_ratios": [0]},
    ),
    **_same(
        "MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration "
        "Qwen4ExpForConditionalGeneration",
        "llama",
        {},
    ),
    **_same(
        "DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM Glm4MoeLiteForCausalLM "
        "GlmMoeDsaForCausalLM Glm5NextForConditionalGeneration LongcatFlashForCausalLM "
        "HYV4ForCausalLM DotsVLMForCausalLM Dots3NoteForCausalLM MistralLarge3ForCausalLM "
        "KimiK25ForConditionalGeneration KimiVLForConditionalGeneration KimiLinearForCausalLM "
        "KimiK3LinearForCausalLM KimiK3ForConditionalGeneration GigaChat35ForCausalLM "
        "MiniCPM3ForCausalLM BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM "
        "BailingMoeV3VLForConditionalGeneration SarvamMLAForCausalLM",
        "llama",
        MLA,
    ),
}

# SGLang insists on a GPU's backend for these.
_TRITON = {"attention_backend": "triton"}
ARGUMENTS = {
    "IQuestQ1ForCausalLM": {"attention_backend": "fa3"},
    "Exaone4ForCausalLM": _TRITON,
    "ExaoneMoEForCausalLM": _TRITON,
    "ExaoneMoeForCausalLM": _TRITON,
}

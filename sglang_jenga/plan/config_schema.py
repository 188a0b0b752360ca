"""The door for a config.json: fields of the wrong type are turned away in one line.

What passes can be read without surprises: a count is a whole number, a list of layer types holds
names, a section is an object. Also finds the section that describes the language model, as SGLang
does. Stdlib only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]


class _Type(NamedTuple):
    """A type of field, and the test of a value that is not null."""

    words: str
    holds: Callable[[Any], bool]


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value < 1 << 40


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float(1 << 40)


def _is_count_or_auto(value: Any) -> bool:
    return value == "auto" or _is_count(value)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) or _is_count(value, 0)


_COUNT = _Type("a whole number above 0", _is_count)
_COUNT_OR_0 = _Type("a whole number", lambda value: _is_count(value, 0))
_FEW = _Type("a whole number from 1 to 1,000", lambda value: _is_count(value) and value <= 1000)
_NAME = _Type("a text", lambda value: isinstance(value, str))
_NAMES = _Type("a list of texts", lambda value: _all(value, lambda one: isinstance(one, str)))
_IDS = _Type("a list of whole numbers", lambda value: _all(value, lambda one: _is_count(one, 0)))
_SECTION = _Type("an object", lambda value: isinstance(value, Mapping))
_SWITCH = _Type("true or false", lambda value: isinstance(value, bool))

_NAMES_OF_FIELDS: dict[_Type, str] = {
    _COUNT: """
        num_attention_heads num_key_value_heads hidden_size head_dim n_head n_heads n_embd
        d_model n_head_kv num_kv_heads
        multi_query_group_num num_attention_groups swa_num_key_value_heads swa_head_dim
        swa_v_head_dim num_global_key_value_heads global_head_dim
        full_attention_interval attn_layer_period linear_num_value_heads
        linear_num_key_heads linear_value_head_dim linear_key_head_dim
        linear_conv_kernel_dim mamba_num_heads mamba_head_dim mamba_n_heads
        mamba_n_groups mamba_d_ssm mamba_d_state mamba_d_conv mamba_expand mamba_chunk_size n_groups
        ssm_state_size conv_kernel conv_L_cache state_size expand num_heads
        max_position_embeddings max_sequence_length seq_length max_seq_len
        n_positions n_ctx model_max_length kv_lora_rank attn_config.kv_n_heads
        attention_other_setting.num_attention_groups
        efficient_attention_config.jet.num_heads efficient_attention_config.jet.head_dim
        efficient_attention_config.jet.conv_size
        efficient_attention_config.swa.window_size
    """,
    _COUNT_OR_0: """
        sliding_window sliding_window_size attention_chunk_size v_head_dim
        attn_layer_offset index_topk
    """,
    _FEW: """
        num_hidden_layers n_layer n_layers num_layers loop_num num_loops
        num_hybrid_layers_block
    """,
    _NAME: """
        model_type dtype torch_dtype mamba_ssm_dtype hybrid_override_pattern
        rope_scaling.rope_type rope_scaling.type rope_parameters.rope_type
        rope_parameters.type quantization_config.quant_algo
        quantization_config.quant_method
    """,
    _NAMES: """
        architectures layer_types layers_block_type first_layers_types
        hybrid_layers_types_block last_layers_types
    """,
    _SECTION: """
        text_config llm_config language_config thinker_config thinker_config.text_config
        vision_config attn_config attention_other_setting efficient_attention_config
        efficient_attention_config.jet efficient_attention_config.swa
        quantization_config quantization_config.quantization compression_config
        rope_scaling rope_parameters auto_map
    """,
    _SWITCH: """
        use_sliding_window use_hybrid_layers multi_query new_decoder_architecture
        attention_k_eq_v use_mla is_hybrid_swa
    """,
    _IDS: "hybrid_layer_pattern full_attn_idxs cross_attention_layers",
    _Type("a number above 0", _is_number): """
        efficient_attention_config.jet.expand_v rope_scaling.factor rope_parameters.factor
    """,
    _Type("a whole number above 0 or auto", _is_count_or_auto): "mamba_d_head",
    _Type("a text or a whole number", _is_pattern): "sliding_window_pattern",
    _Type("a list", lambda value: isinstance(value, list)): "block_configs",
}
_FIELDS = {name: field for field, names in _NAMES_OF_FIELDS.items() for name in names.split()}
FIELD_NAMES = tuple(_FIELDS)
"""Fields that are looked at; a dot leads into a nested section."""
MODEL_SECTIONS = ("thinker_config", "llm_config", "language_config", "text_config")


def check(config: Config, *, where: str = "") -> None:
    """Raise ValueError, one line, if a field that matters has a value of the wrong type."""
    for name, field in _FIELDS.items():
        value: Any = config
        for step in name.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is not None and not field.holds(value):
            raise ValueError(f"{where}{name} must be {field.words}, got {_shown(value)}")
    for section in MODEL_SECTIONS:
        if config.get(section) is not None:
            check(config[section], where=f"{where}{section}.")


def architectures_of(config: Config) -> list[str]:
    """Return the architectures that a checked config names."""
    names: list[str] | None = config.get("architectures")
    if not names:
        raise ValueError("config.json lacks architectures")
    return names


def section_of(config: Config) -> Config:
    """Return the part of a checked config that describes the language model, as SGLang finds it:
    a nested section if there is one."""
    name = architectures_of(config)[0]
    if name.startswith("Llava") and name.endswith("ForCausalLM"):
        return config
    for key in MODEL_SECTIONS:
        section: Config | None = config.get(key)
        if section is not None:
            nested: Config | None = section.get("text_config")
            return nested if key == "thinker_config" and nested is not None else section
    return config


def _shown(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."

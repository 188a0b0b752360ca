"""Jet-Nemotron's checkpoint: its config, and the names and shapes of its weights.

transformers has no such model; SGLang brings the config, and names its weights as the published
checkpoints do. A "jet" layer is a gated delta rule whose values pass a short convolution with
kernels made from the token itself; "swa" and "attn" are attention with a window and without.
"""

from __future__ import annotations

Shape = tuple[int, ...]

CONFIG = {
    "architectures": ["JetNemotronForCausalLM"],
    "model_type": "jet_nemotron",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
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
        "swa": {},  # the window's length, put in by the writer
    },
}


def shapes(config: dict) -> dict[str, Shape]:
    """Every weight of the model of a whole config, by its name in the checkpoint."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number, kind in enumerate(config["layer_types"]):
        mixer = _jet(config) if kind == "jet" else _attention(config)
        layer = f"model.layers.{number}."
        found |= {f"{layer}self_attn.{name}": shape for name, shape in mixer.items()}
        found |= {f"{layer}mlp.{name}": shape for name, shape in _mlp(config).items()}
        found[f"{layer}input_layernorm.weight"] = (hidden,)
        found[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    return found


def _jet(config: dict) -> dict[str, Shape]:
    hidden, jet = config["hidden_size"], config["efficient_attention_config"]["jet"]
    heads, value_dim = jet["num_heads"], int(jet["head_dim"] * jet["expand_v"])
    keys, values = heads * jet["head_dim"], heads * value_dim
    generator = values // jet["dconv_generator_reduction"]
    return {
        "q_proj.weight": (keys, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (values, hidden),
        "a_proj.weight": (heads, hidden),
        "b_proj.weight": (heads, hidden),
        "g_proj.weight": (values, hidden),
        "o_proj.weight": (hidden, values),
        "o_norm.weight": (value_dim,),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "dynamic_conv1d.kernel_generator.w1.weight": (generator, hidden),
        "dynamic_conv1d.kernel_generator.w2.weight": (values * jet["conv_size"], generator),
        "dynamic_conv1d.kernel_generator.w2.bias": (values * jet["conv_size"],),
    }


def _attention(config: dict) -> dict[str, Shape]:
    hidden = config["hidden_size"]
    head_dim = hidden // config["num_attention_heads"]
    found: dict[str, Shape] = {"o_proj.weight": (hidden, hidden)}
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
    for part, count in heads.items():
        found[f"{part}_proj.weight"] = (config[count] * head_dim, hidden)
        found[f"{part}_proj.bias"] = (config[count] * head_dim,)
    return found


def _mlp(config: dict) -> dict[str, Shape]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return {
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
    }

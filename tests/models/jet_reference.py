"""Jet-Nemotron's forward written out in float64 NumPy, one sequence and no cache.

transformers has no such model, so this is the other implementation that SGLang's is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.models.recurrences import delta_rule, silu, softplus


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The next ``count`` tokens of a checkpoint written by `write_tiny_model`."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(_logits(config, weights, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class _Part:
    """The weights under a prefix."""

    def __init__(self, weights: dict[str, np.ndarray], prefix: str):
        self.weights, self.prefix = weights, prefix

    def __call__(self, name: str) -> np.ndarray:
        return self.weights[self.prefix + name]

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        bias = self.weights.get(f"{self.prefix}{name}.bias", 0.0)
        return x @ self(f"{name}.weight").T + bias


def _logits(config: dict, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    x = weights["model.embed_tokens.weight"][tokens]
    eps = config["rms_norm_eps"]
    for number, kind in enumerate(config["layer_types"]):
        layer = _Part(weights, f"model.layers.{number}.")
        mixer = _Part(weights, f"model.layers.{number}.self_attn.")
        mix = _jet if kind == "jet" else _attention
        x = x + mix(config, mixer, kind, _norm(x, layer("input_layernorm.weight"), eps))
        normed = _norm(x, layer("post_attention_layernorm.weight"), eps)
        inner = silu(layer.project("mlp.gate_proj", normed)) * layer.project("mlp.up_proj", normed)
        x = x + layer.project("mlp.down_proj", inner)
    return _norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def _heads(x: np.ndarray, count: int) -> np.ndarray:
    """``[tokens, heads * dim]`` to ``[heads, tokens, dim]``."""
    return x.reshape(len(x), count, -1).swapaxes(0, 1)


def _attention(config: dict, part: _Part, kind: str, x: np.ndarray) -> np.ndarray:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (
        _heads(part.project(f"{name}_proj", x), count)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = _rotated(q, config["rope_theta"]), _rotated(k, config["rope_theta"])
    k, v = (np.repeat(part, heads // kv_heads, axis=0) for part in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    age = np.arange(len(x))[:, None] - np.arange(len(x))
    hidden = age < 0
    if kind == "swa":
        # SGLang takes the length as the number of tokens besides the current one.
        hidden |= age > config["efficient_attention_config"]["swa"]["window_size"]
    scores = np.where(hidden, -np.inf, scores)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = scores / scores.sum(-1, keepdims=True) @ v
    return part.project("o_proj", out.swapaxes(0, 1).reshape(len(x), -1))


def _rotated(x: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _jet(config: dict, part: _Part, kind: str, x: np.ndarray) -> np.ndarray:
    jet = config["efficient_attention_config"]["jet"]
    heads, width = jet["num_heads"], jet["conv_size"]
    q, k = (_heads(silu(part.project(f"{name}_proj", x)), heads) for name in "qk")
    values = part.project("v_proj", x)
    generated = silu(part.project("dynamic_conv1d.kernel_generator.w1", x))
    kernels = part.project("dynamic_conv1d.kernel_generator.w2", generated)
    kernels = kernels.reshape(*values.shape, width)
    line = np.concatenate([np.zeros((width - 1, values.shape[1])), values])
    taps = [line[tap : tap + len(x)] * kernels[:, :, tap] for tap in range(width)]
    v = _heads(silu(sum(taps)), heads)
    g = -np.exp(part("A_log")) * softplus(part.project("a_proj", x) + part("dt_bias"))
    beta = 1 / (1 + np.exp(-part.project("b_proj", x)))
    gates = silu(_heads(part.project("g_proj", x), heads))
    outs = []
    for head in range(heads):
        state = np.zeros((v.shape[-1], k.shape[-1]))
        out, _ = delta_rule(q[head], k[head], v[head], g[:, head], beta[:, head], state)
        outs.append(_norm(out, part("o_norm.weight"), float(jet["norm_eps"])) * gates[head])
    return part.project("o_proj", np.concatenate(outs, axis=1))

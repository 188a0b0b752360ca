"""Write tiny random-weight checkpoints of real model families, for tests and demos without a GPU.

The weights are scaled so that greedy output depends on every token it should depend on: attention
is peaked (`sharpness`), each layer adds as much to the residual stream as the embedding holds, and
so one wrong KV page, or a window one token short, changes the tokens that follow. torch and
transformers are imported when a model is written, not before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")
HEAD_DIM = 16
_RECORD = "tiny_model.json"


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from the common tiny config.

    `window_run` window layers stand before each full layer (0: the family has no window).
    `sharpness` is the standard deviation of the attention scores, the knob of sensitivity.
    `written` goes into config.json as it is.
    """

    model_type: str
    window_run: int = 0
    config: dict = field(default_factory=dict)
    sharpness: float = 2.0
    score_scale: float = HEAD_DIM**-0.5
    embedding_scale: float = 1.0
    norm_adds_one: bool = False
    has_state: bool = False
    written: dict = field(default_factory=dict)


_GEMMA = {
    # SGLang reads the first name, transformers the second.
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": HEAD_DIM,
    "tie_word_embeddings": True,
}
_GEMMA_SCALE = 64**0.5
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LAYER_TYPES = ("sliding_attention", "full_attention")

_FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral", config={"sliding_window": None}),  # SGLang ignores one
    "gemma2": Family("gemma2", 1, _GEMMA, embedding_scale=_GEMMA_SCALE, norm_adds_one=True),
    "gemma3_text": Family(
        "gemma3_text", 5, _GEMMA, embedding_scale=_GEMMA_SCALE, norm_adds_one=True
    ),
    "olmo2": Family("olmo2"),
    # transformers' default rope differs between its config and SGLang's.
    "olmo3": Family("olmo3", 3, {"rope_parameters": dict.fromkeys(_LAYER_TYPES, _ROPE)}),
    # SGLang reads the pattern where transformers reads layer_types.
    "exaone4": Family("exaone4", 3, {"sliding_window_pattern": "LLLG"}),
    # SGLang's layers see `window` tokens besides the current one here, one more than elsewhere.
    "cohere2": Family("cohere2", 3, {"logit_scale": 1.0, "tie_word_embeddings": True}),
    "gpt_oss": Family(
        "gpt_oss",
        1,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE},
    ),
    "gemma4": Family(
        "gemma4_text",
        5,
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
        config={
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": HEAD_DIM,
            "linear_value_head_dim": HEAD_DIM,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25},
        },
        # SGLang reads these where transformers reads layer_types and rope_parameters.
        written={"full_attention_interval": 4, "rope_theta": 10000.0},
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
}
FAMILIES = tuple(_FAMILIES)
STATE_FAMILIES = tuple(name for name, family in _FAMILIES.items() if family.has_state)
WINDOW_FAMILIES = tuple(name for name, family in _FAMILIES.items() if family.window_run)
# Stock SGLang does not serve the others with torch_native: attention sinks, a list of backends.
CPU_FAMILIES = tuple(name for name in FAMILIES if name not in ("gpt_oss", "exaone4"))


def write_tiny_model(
    family: str,
    folder: str | Path,
    *,
    num_layers: int | None = None,
    window: int = 64,
    dtype: str = "float32",
    seed: int = 0,
    **overrides,
) -> Path:
    """Write config, weights and tokenizer of a tiny model to `folder` and return it.

    Nothing is written if `folder` already holds the model of the same arguments. `overrides` go
    into the config last; `sharpness` among them sets the family's knob.
    """
    folder = Path(folder)
    arguments = {
        "recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12],
        "family": family,
        "num_layers": num_layers,
        "window": window,
        "dtype": dtype,
        "seed": seed,
        "overrides": overrides,
    }
    record = json.dumps(arguments, sort_keys=True)
    if (folder / _RECORD).exists() and (folder / _RECORD).read_text() == record:
        return folder
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    folder.mkdir(parents=True, exist_ok=True)
    overrides = dict(overrides)
    sharpness = overrides.pop("sharpness", _FAMILIES[family].sharpness)
    _write_weights(_FAMILIES[family], folder, num_layers, window, dtype, seed, sharpness, overrides)
    _write_tokenizer(folder)
    (folder / _RECORD).write_text(record)  # last: a half-written folder is written again
    return folder


def tiny_config(family: Family, num_layers: int | None, window: int, overrides: dict):
    """Return the transformers config; window families default to whole runs of their pattern."""
    from transformers import AutoConfig

    run = family.window_run + 1
    if num_layers is None:
        num_layers = 4 if run <= 2 else 2 * run
    values: dict = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if family.window_run:
        values["sliding_window"] = window
        values["layer_types"] = [
            _LAYER_TYPES[(layer + 1) % run == 0] for layer in range(num_layers)
        ]
    return AutoConfig.for_model(family.model_type, **values | family.config | overrides)


def _write_weights(
    family: Family,
    folder: Path,
    num_layers: int | None,
    window: int,
    dtype: str,
    seed: int,
    sharpness: float,
    overrides: dict,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, num_layers, window, overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    names = dict(model.named_parameters())
    draw = _Drawer(family, sharpness, config, has_query_norm=any("q_norm" in n for n in names))
    with torch.no_grad():
        for name, weight in names.items():
            # One generator per name: a layer keeps its weights when others come or go.
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            mean, std = draw(name, weight.shape)
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.copy_(mean + std * noise)
    model.save_pretrained(folder)
    if family.written:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | family.written, indent=2))


class _Drawer:
    """Mean and standard deviation of every weight, from its name and shape."""

    def __init__(self, family: Family, sharpness: float, config, *, has_query_norm: bool):
        self.family = family
        self.has_query_norm = has_query_norm
        # Tied to the head, a strong embedding makes every token predict itself.
        self.embedding = 0.25 if config.tie_word_embeddings else 1.0
        # Scores are q.k * score_scale over head_dim; q and k have RMS `gain` each.
        self.gain = math.sqrt(sharpness / (family.score_scale * math.sqrt(config.head_dim)))

    def __call__(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        kind = name.rsplit(".", 2)[-2] if name.endswith((".weight", ".bias")) else name
        if name.endswith("sinks"):
            return 0.0, 1.0
        if name.endswith("A_log"):
            return -4.0, 0.5  # a state remembers hundreds of tokens, so a lost one shows
        if name.endswith("bias"):
            return 0.0, 0.2
        if kind in ("q_norm", "k_norm"):
            return self.gain - self.family.norm_adds_one, 0.1
        if "norm" in kind:
            return 1.0 - self.family.norm_adds_one, 0.1
        if kind == "embed_tokens":
            return 0.0, self.embedding / self.family.embedding_scale
        # Experts hold [expert, in, out]; a linear layer [out, in], a convolution [out, 1, width].
        fan_in = shape[-2] if len(shape) == 3 and shape[1] > 1 else shape[-1]
        gain = {"o_proj": 1.5, "out_proj": 1.5, "down_proj": 2.0}.get(kind.rsplit(".", 1)[-1], 1.0)
        if kind in ("q_proj", "k_proj") and not self.has_query_norm:
            gain = self.gain
        return 0.0, gain / math.sqrt(fan_in)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def _write_tokenizer(folder: Path) -> None:
    """A byte tokenizer: any text encodes, and ids that no byte has decode to syllables."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    syllables = (f"Ġ{a}{b}{c}" for c in "nsrl" for b in "aeiou" for a in "bdfgklmnprstvz")
    words += itertools.islice(syllables, VOCAB_SIZE - len(words))
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    pad, eos, bos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)

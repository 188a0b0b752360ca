"""Write tiny random-weight checkpoints of real model families, for tests and demos without a GPU.

The weights are scaled so that greedy output depends on every token it should depend on: attention
is peaked (`sharpness`), each layer adds as much to the residual stream as the embedding holds, and
so one wrong KV page, or a window one token short, changes the tokens that follow. torch and
transformers are imported when a model is written, not before.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

from sglang_jenga.testing import tiny_families, tiny_jet
from sglang_jenga.testing.tiny_families import (
    BY_NAME,
    CPU_FAMILIES,
    FAMILIES,
    HEAD_DIM,
    STATE_FAMILIES,
    VOCAB_SIZE,
    WINDOW_FAMILIES,
    Family,
)

__all__ = [
    "CPU_FAMILIES",
    "FAMILIES",
    "STATE_FAMILIES",
    "VOCAB_SIZE",
    "WINDOW_FAMILIES",
    "write_tiny_model",
]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")
_RECORD = "tiny_model.json"
_SOURCES = (__file__, tiny_families.__file__, tiny_jet.__file__)


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
        "recipe": _recipe(),
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
    if family not in BY_NAME:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    folder.mkdir(parents=True, exist_ok=True)
    overrides = dict(overrides)
    sharpness = overrides.pop("sharpness", BY_NAME[family].sharpness)
    _write_weights(BY_NAME[family], folder, num_layers, window, dtype, seed, sharpness, overrides)
    write_tokenizer(folder)
    (folder / _RECORD).write_text(record)  # last: a half-written folder is written again
    return folder


def _recipe() -> str:
    """Changes when a line does that decides what a model is."""
    sources = (Path(file).read_bytes() for file in _SOURCES)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def config_values(family: Family, num_layers: int | None, window: int, overrides: dict) -> dict:
    """Return what goes into the config; the layers default to whole runs of their pattern."""
    run = len(family.layer_types)
    if num_layers is None:
        num_layers = 4 if run <= 2 else 2 * run
    values: dict = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if family.has_attention:
        values |= {
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 8192,
        }
    if run:
        values["layer_types"] = [family.layer_types[layer % run] for layer in range(num_layers)]
    values |= copy.deepcopy(family.config) | overrides
    if family.has_window:
        *path, key = family.window_key
        functools.reduce(dict.__getitem__, path, values).setdefault(key, window)
    return values


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

    values = config_values(family, num_layers, window, overrides)
    if family.shapes is None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(family.model_type, **values)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        weights = dict(model.named_parameters())
        values = config.to_dict()
    else:
        weights = {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, shape in family.shapes(values).items()
        }
    draw = _Drawer(family, sharpness, values, has_query_norm=any("q_norm" in n for n in weights))
    with torch.no_grad():
        for name, weight in weights.items():
            # One generator per name: a layer keeps its weights when others come or go.
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            mean, std = draw(name, weight.shape)
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.copy_(mean + std * noise)
    config_file = folder / "config.json"
    if family.shapes is None:
        model.save_pretrained(folder)
        values = json.loads(config_file.read_text())
    else:
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        values["torch_dtype"] = dtype
    config_file.write_text(json.dumps(values | family.written, indent=2) + "\n")


class _Drawer:
    """Mean and standard deviation of every weight, from its name and shape."""

    def __init__(self, family: Family, sharpness: float, config: dict, *, has_query_norm: bool):
        self.family = family
        self.has_query_norm = has_query_norm
        # Tied to the head, a strong embedding makes every token predict itself.
        self.embedding = 0.25 if config["tie_word_embeddings"] else 1.0
        # Scores are q.k * score_scale over head_dim; q and k have RMS `gain` each.
        self.gain = math.sqrt(
            sharpness / (family.score_scale * math.sqrt(config.get("head_dim", HEAD_DIM)))
        )

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
        if kind in ("embed_tokens", "embeddings"):
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


def write_tokenizer(folder: Path, *more: str) -> Any:
    """A byte tokenizer: any text encodes, and ids that no byte has decode to syllables. ``more``:
    special tokens beside `SPECIAL_TOKENS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL_TOKENS, *more]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    syllables = (f"Ġ{a}{b}{c}" for c in "nsrl" for b in "aeiou" for a in "bdfgklmnprstvz")
    words += itertools.islice(syllables, VOCAB_SIZE - len(words))
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    pad, eos, bos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast

"""Tiny random-weight models that see images, with processors, and pictures for them.

The language model is drawn as in `tiny_models`, so that one wrong KV page changes what follows; the
vision tower so that its rows are as large as the text's. torch and transformers are imported when a
model is written, not before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sglang_jenga.testing.tiny_families import BY_NAME, HEAD_DIM
from sglang_jenga.testing.tiny_models import Drawer, config_values, write_tokenizer

PATCH = 14
_TEXT_WEIGHTS = ("language_model.", "lm_head.")


class VisionFamily(NamedTuple):
    """``text``: the family of `tiny_families` that the language model is drawn as. ``image``: how a
    prompt has a picture in its text. ``specials``: tokens beside those of every tiny model.
    ``arguments``: what SGLang must be told. ``write`` saves model and processor to a folder."""

    text: str
    image: str
    specials: tuple[str, ...]
    arguments: dict[str, Any]
    write: Callable[[Path, VisionFamily, dict[str, Any]], None]


def write_tiny_vision_model(name: str, folder: str | Path, *, window: int = 64) -> Path:
    """Write config, weights, tokenizer and processor of a tiny model to `folder` and return it."""
    family, folder = VISION_FAMILIES[name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = config_values(BY_NAME[family.text], 6 if "gemma" in name else 3, window, {})
    family.write(folder, family, text | {"max_position_embeddings": 4096})
    return folder


def picture(seed: int, width: int = 112, height: int = 112) -> Any:
    """A PIL image of coloured blocks, the same for the same arguments."""
    import numpy
    from PIL import Image

    blocks = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def _qwen2_5_vl(folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    import transformers as of

    tokenizer = write_tokenizer(folder, family.specials)
    token_id = tokenizer.convert_tokens_to_ids
    section = [HEAD_DIM // 8, HEAD_DIM // 16 * 3, HEAD_DIM // 16 * 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    config = of.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    _save(of.Qwen2_5_VLForConditionalGeneration(config), folder, family, text)
    images = of.Qwen2VLImageProcessor(
        min_pixels=56 * 56, max_pixels=224 * 224, patch_size=PATCH, merge_size=2
    )
    videos = of.Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=2)
    of.Qwen2_5_VLProcessor(images, tokenizer, videos).save_pretrained(folder)


def _gemma3(folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    import transformers as of

    begin, end, soft = family.specials
    named = {"boi_token": begin, "eoi_token": end, "image_token": soft}
    tokenizer = write_tokenizer(folder, family.specials, extra_special_tokens=named)
    token_id = tokenizer.convert_tokens_to_ids
    config = of.Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 8 * PATCH,
            "patch_size": PATCH,
        },
        mm_tokens_per_image=16,
        boi_token_index=token_id(begin),
        eoi_token_index=token_id(end),
        image_token_index=token_id(soft),
        tie_word_embeddings=True,
    )
    _save(of.Gemma3ForConditionalGeneration(config), folder, family, text)
    size = {"height": 8 * PATCH, "width": 8 * PATCH}
    images = of.Gemma3ImageProcessor(size=size)
    of.Gemma3Processor(images, tokenizer, image_seq_length=16).save_pretrained(folder)
    _rename_vision_tower(folder / "model.safetensors")


def _rename_vision_tower(file: Path) -> None:
    """As the real checkpoints have it, and SGLang reads it: Transformers 5 leaves out a level, and
    writes a head that nobody uses."""
    from safetensors.torch import load_file, save_file

    tower, weights = "vision_tower.", {}
    for name, weight in load_file(file).items():
        before, found, rest = name.partition(tower)
        if not found or rest.startswith("vision_model."):
            weights[name] = weight
        elif not rest.startswith("head."):
            weights[f"{before}{tower}vision_model.{rest}"] = weight
    save_file(weights, file, metadata={"format": "pt"})


def _save(model: Any, folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    import torch

    weights = dict(model.float().named_parameters())
    of_text = BY_NAME[family.text]
    has_query_norm = any("language_model" in name and "q_norm" in name for name in weights)
    draw = Drawer(of_text, of_text.sharpness, text, has_query_norm=has_query_norm)
    with torch.no_grad():
        for name, weight in weights.items():
            digest = hashlib.sha256(name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            noise = torch.randn(weight.shape, generator=generator)
            of_language = any(part in name for part in _TEXT_WEIGHTS)
            mean, std = (draw if of_language else _of_vision)(name, tuple(weight.shape))
            weight.copy_(mean + std * noise)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2))


def _of_vision(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("bias"):
        return 0.0, 0.1
    if "norm" in name or len(shape) == 1:
        return 1.0, 0.1
    if "position_embedding" in name:
        return 0.0, 0.3
    # A linear layer or a convolution holds [out, ...], Gemma's projection [in, out].
    fan_in = shape[0] if name.endswith("projection_weight") else math.prod(shape[1:])
    return 0.0, 1.6 / math.sqrt(fan_in)


VISION_FAMILIES: dict[str, VisionFamily] = {
    # Full attention alone; so many tokens for a picture as its size says.
    "qwen2_5_vl": VisionFamily(
        "qwen2",
        "<|vision_start|><|image_pad|><|vision_end|>",
        ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
        {},
        _qwen2_5_vl,
    ),
    # Windows beside full attention; 16 tokens for every picture.
    "gemma3": VisionFamily(
        "gemma3_text",
        "<start_of_image>",
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        {"enable_multimodal": True},
        _gemma3,
    ),
}

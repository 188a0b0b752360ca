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
VIDEO_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 16 * 224 * 224}
INTERN_TILE = 448
"""Pixels of a tile's side: SGLang's processor for InternVL asks no config."""
INTERN_WIDTH = 32
_QWEN_SPECIALS = tuple(
    f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
)
_TEXT_WEIGHTS = ("language_model.", "lm_head.")


class VisionFamily(NamedTuple):
    """``text``: the family of `tiny_families` that the language model is drawn as. ``image``: how a
    prompt has a picture in its text. ``specials``: tokens beside those of every tiny model.
    ``arguments``: what SGLang must be told. ``write`` saves model and processor to a folder.
    ``video``: how a prompt has a video in its text, where the model takes one here."""

    text: str
    image: str
    specials: tuple[str, ...]
    arguments: dict[str, Any]
    write: Callable[[Path, VisionFamily, dict[str, Any]], None]
    video: str | None = None


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


def film(seed: int, text: str, folder: Path, frames: int = 8) -> dict[str, Any]:
    """A video of as many pictures in ``text``, as the processor of the model in ``folder`` hands it
    to SGLang: nothing has to be decoded, and the text is its tokens already."""
    import numpy
    from transformers import AutoProcessor

    shown = numpy.stack([numpy.asarray(picture(1000 * seed + i)) for i in range(frames)])
    processed = AutoProcessor.from_pretrained(folder)(
        text=[text],
        videos=[shown.transpose(0, 3, 1, 2)],
        videos_kwargs={
            "video_metadata": [
                {"fps": 2.0, "total_num_frames": frames, "frames_indices": [*range(frames)]}
            ],
            "do_sample_frames": False,
        },
        return_tensors="pt",
    )
    return {**processed, "format": "processor_output"}


def _qwen2_5_vl(folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    import transformers as of

    tokenizer = write_tokenizer(folder, family.specials)
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
        **_qwen_ids(tokenizer),
        tie_word_embeddings=False,
    )
    _save(of.Qwen2_5_VLForConditionalGeneration(config), folder, family, text)
    images = of.Qwen2VLImageProcessor(
        min_pixels=56 * 56, max_pixels=224 * 224, patch_size=PATCH, merge_size=2
    )
    videos = of.Qwen2VLVideoProcessor(size=VIDEO_SIZE, patch_size=PATCH, merge_size=2)
    of.Qwen2_5_VLProcessor(images, tokenizer, videos).save_pretrained(folder)


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    token_id = tokenizer.convert_tokens_to_ids
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    return {f"{name.removesuffix('_pad')}_token_id": token_id(f"<|{name}|>") for name in names}


def _qwen3_vl(folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    import transformers as of

    tokenizer = write_tokenizer(folder, family.specials)
    section = [HEAD_DIM // 4, HEAD_DIM // 8, HEAD_DIM // 8]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    config = of.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope | {"mrope_interleaved": True}},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": PATCH,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            # Rows of the first two layers as well, for the language model's first two layers.
            "deepstack_visual_indexes": [0, 1],
        },
        **_qwen_ids(tokenizer),
        tie_word_embeddings=False,
    )
    _save(of.Qwen3VLForConditionalGeneration(config), folder, family, text)
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    images = of.Qwen2VLImageProcessor(size=size, patch_size=PATCH, merge_size=2)
    videos = of.Qwen3VLVideoProcessor(size=VIDEO_SIZE, patch_size=PATCH, merge_size=2)
    of.Qwen3VLProcessor(images, tokenizer, videos).save_pretrained(folder)


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


def _llava(folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    import transformers as of

    mark, line, end = family.specials
    tokenizer = write_tokenizer(folder, family.specials)
    config = of.LlavaConfig(
        text_config=text | {"model_type": "mistral", "sliding_window": None},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 16 * PATCH,
            "patch_size": PATCH,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(mark),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    _save(of.LlavaForConditionalGeneration(config), folder, family, text)
    images = of.PixtralImageProcessor(size={"longest_edge": 16 * PATCH}, patch_size=PATCH)
    of.PixtralProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        image_token=mark,
        image_break_token=line,
        image_end_token=end,
    ).save_pretrained(folder)


def _internvl(folder: Path, family: VisionFamily, text: dict[str, Any]) -> None:
    """SGLang has config, model and processor of its own for it, Transformers none of them."""
    import transformers as of
    from safetensors.torch import save_file

    write_tokenizer(folder, family.specials)
    language = of.Qwen3ForCausalLM(of.Qwen3Config(**text)).float()
    weights = {f"language_model.{name}": weight for name, weight in language.named_parameters()}
    weights |= _intern_vision(2, INTERN_WIDTH, language.config.hidden_size)
    _draw(weights, family, text)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "dtype": "float32",
        "llm_config": text | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_size": INTERN_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 2 * INTERN_WIDTH,
            "image_size": INTERN_TILE,
            "patch_size": INTERN_TILE // 4,
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
        },
        "force_image_size": INTERN_TILE,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "template": "internvl2_5",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _intern_vision(layers: int, width: int, text_width: int) -> dict[str, Any]:
    """Empty weights of a vision tower of 4 by 4 patches, and of what carries it to the text."""
    import torch

    tower, patch = "vision_model.", INTERN_TILE // 4
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.class_embedding": (1, 1, width),
        f"{tower}embeddings.position_embedding": (1, 17, width),
        f"{tower}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{tower}embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(layers):
        at = f"{tower}encoder.layers.{layer}."
        shapes |= {f"{at}{name}": (width,) for name in ("ls1", "ls2")}
        shapes |= _linear(f"{at}attn.qkv", 3 * width, width)
        shapes |= _linear(f"{at}attn.proj", width, width)
        shapes |= _linear(f"{at}mlp.fc1", 2 * width, width)
        shapes |= _linear(f"{at}mlp.fc2", width, 2 * width)
        shapes |= _linear(f"{at}norm1", width) | _linear(f"{at}norm2", width)
    # Two by two patches are one token of the text.
    shapes |= _linear("mlp1.0", 4 * width)
    shapes |= _linear("mlp1.1", text_width, 4 * width)
    shapes |= _linear("mlp1.3", text_width, text_width)
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


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
    _draw(dict(model.float().named_parameters()), family, text)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2))


def _draw(weights: dict[str, Any], family: VisionFamily, text: dict[str, Any]) -> None:
    import torch

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
        _QWEN_SPECIALS,
        {},
        _qwen2_5_vl,
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
    # Rows three times as wide as the text's: those of two more layers are appended (deepstack).
    "qwen3_vl": VisionFamily(
        "qwen3",
        "<|vision_start|><|image_pad|><|vision_end|>",
        _QWEN_SPECIALS,
        {},
        _qwen3_vl,
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
    # Each row of patches ends with a token of its own, so an image is several runs of tokens.
    "llava": VisionFamily("mistral", "[IMG]", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"), {}, _llava),
    # Tiles of 4 tokens each, and as many as fit the image's shape.
    "internvl": VisionFamily(
        "qwen3", "<image>", ("<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>"), {}, _internvl
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
